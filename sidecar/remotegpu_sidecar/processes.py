"""The task's process tree as its subreaper sees it: signals it, kills it, reaps it, knows when nothing is left.

Used by the shim, for the shim's own descendants only. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal

from remotegpu_sidecar import identity, tree

_PAUSE_FIRST_MS, _PAUSE_LAST_MS = 1, 1000
_SWEEP_MAX_MS = 50
# A thousand processes are listed in 0.1 s. Who is not found in time hears no stop signal, or is not counted.
_TELL_MAX_MS = 500
_COUNT_MAX_MS = 20
_PRIORITY = -20


class Processes:
    """The tree below this process. The main process leads a process group of its own, named by its pid.

    It stays a zombie until the rest is gone: as long as it is not reaped its group keeps its number, and a signal to
    the group cannot reach a stranger. The same holds for this process's other children, orphans included, since nobody
    else reaps them. Who is further down is signalled by pidfd, after a look at its start time.
    """

    __slots__ = ("_is_killing", "_is_reaped", "_killed", "_pause_ms", "_told", "main", "main_status", "round_at_ns")

    def __init__(self) -> None:
        self.main: identity.Identity | None = None
        self.main_status: tuple[int, int] | None = None
        self.round_at_ns = 0
        self._is_reaped = False
        self._is_killing = False
        self._pause_ms = _PAUSE_FIRST_MS
        self._told: set[int] = set()
        self._killed: set[int] = set()

    @property
    def stragglers(self) -> int:
        """How many but the main process had to be told to go after its end, or were killed."""
        return len(self._told | self._killed)

    def reap(self) -> bool:
        """Note the end of the main process and bury orphans. True if the main process's end is news."""
        is_news = False
        while self.main and self.main_status is None:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                return False
            if found.si_pid == self.main.pid:
                self.main_status = (found.si_code, found.si_status)
                is_news = True
            else:
                self._bury(found.si_pid)
        for pid in self._others():
            self._bury(pid)
        return is_news

    def are_gone(self) -> bool:
        """Whether the main process has ended and nothing else is left; then all is reaped. No child is the proof."""
        if self.main and not self._is_reaped:
            if self.main_status is None or self._others():
                return False
            os.waitpid(self.main.pid, 0)
            self._is_reaped = True
        with contextlib.suppress(ChildProcessError):
            while self._bury(-1):
                pass
            return False
        return True

    def signal_all(self, number: int) -> None:
        """Tell everyone, once: the main group in one call, then those who have left it."""
        _take_precedence()
        found = tree.descendants(os.getpid(), _TELL_MAX_MS)
        others = [stat for stat in found if not self._is_in_main_group(stat.pid)]
        for each in (number, signal.SIGCONT):  # a suspended process hears nothing
            self._signal_main_group(each)
            for stat in others:
                _signal(stat, each)

    def dismiss_leftovers(self) -> None:
        """The main process has ended by itself: whoever is still there is told to go, and counted."""
        if self._others():
            self._told.update(stat.pid for stat in tree.descendants(os.getpid(), _TELL_MAX_MS))
            self.signal_all(signal.SIGTERM)

    def kill_round(self) -> None:
        """SIGKILL all that is there; what is not gone by then is for the next round, at `round_at_ns`.

        Those who die hand their children to this process, so that killing and reaping its own children again and again
        reaches everyone, at a few microseconds each: faster than a family can fork.
        """
        if not self._is_killing:
            self._is_killing = True
            _take_precedence()
            found = tree.descendants(os.getpid(), _COUNT_MAX_MS)
            self._killed.update(stat.pid for stat in found if self.main and stat.pid != self.main.pid)
        self._signal_main_group(signal.SIGKILL)
        give_up_ns = identity.boottime_ns() + _SWEEP_MAX_MS * 1_000_000
        has_moved = False
        while self._sweep() and identity.boottime_ns() < give_up_ns:
            has_moved = True
        if not has_moved:
            # Somebody above hangs in the kernel and cannot die: the family below it must be reached all the same.
            for stat in tree.descendants(os.getpid(), _TELL_MAX_MS):
                _signal(stat, signal.SIGKILL)
        self._pause_ms = _PAUSE_FIRST_MS if has_moved else min(self._pause_ms * 2, _PAUSE_LAST_MS)
        self.round_at_ns = identity.boottime_ns() + self._pause_ms * 1_000_000

    def pause_s(self) -> float:
        """How long to wait before the next round, when there is nothing else to do."""
        return self._pause_ms / 1000

    def _sweep(self) -> bool:
        """Bury or kill each child. True if any has gone."""
        has_moved = False
        for pid in self._others():
            if self._bury(pid):
                has_moved = True
            else:
                with contextlib.suppress(PermissionError):
                    os.kill(pid, signal.SIGKILL)
        return has_moved

    def _bury(self, pid: int) -> bool:
        """Reap a child (-1: any) if it is dead. Raises ChildProcessError if there is none."""
        dead, status = os.waitpid(pid, os.WNOHANG)
        if dead and self._is_killing and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self._killed.add(dead)
        return dead != 0

    def _others(self) -> list[int]:
        """The children but for the main process."""
        main_pid = self.main.pid if self.main and not self._is_reaped else 0
        return [pid for pid in tree.own_children() if pid != main_pid]

    def _is_in_main_group(self, pid: int) -> bool:
        try:
            return self.main is not None and self.main.pid in {pid, os.getpgid(pid)}
        except OSError:  # it has ended
            return False

    def _signal_main_group(self, number: int) -> None:
        if not self.main or self._is_reaped:
            return
        try:
            os.killpg(self.main.pid, number)
        except ProcessLookupError:  # it has not made its group yet
            os.kill(self.main.pid, number)
        except PermissionError:  # all of it has become somebody whom an unprivileged agent may not signal
            pass


def _take_precedence() -> None:
    """Among a thousand busy processes this one must get its turn. Allowed to root only."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)


def _signal(stat: identity.Stat, number: int) -> None:
    with contextlib.suppress(PermissionError):  # as above; it is waited for all the same
        identity.send_signal(stat.pid, stat.start_ticks, number)
