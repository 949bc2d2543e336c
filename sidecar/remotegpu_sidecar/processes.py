"""The task's process tree as its subreaper sees it: signals it, kills it, reaps it, knows when nothing is left.

Used by the shim, for the shim's own descendants only. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal

from remotegpu_sidecar import cgroups, identity, tree

_PAUSE_FIRST_MS, _PAUSE_LAST_MS = 1, 1000
_SWEEP_MAX_MS = 50
# A thousand processes are listed in 0.1 s. Who is not found in time hears no stop signal, or is not counted.
_TELL_MAX_MS = 500
_COUNT_MAX_MS = 20
_RESUME_MAX_MS = 10_000
_FREEZE_MS = 20
_PRIORITY = -20


class Processes:
    """The tree below this process. The main process leads a process group of its own, named by its pid.

    It stays a zombie until the rest is gone: as long as it is not reaped its group keeps its number, and a signal to
    the group cannot reach a stranger. The same holds for this process's other children, orphans included, since nobody
    else reaps them. Who is further down is signalled by pidfd, after a look at its start time.

    `group` is the task's control group if it has one: who is in there belongs to it as well.
    """

    __slots__ = (
        "_is_killing",
        "_is_reaped",
        "_killed",
        "_pause_ms",
        "_still_before",
        "_told",
        "group",
        "main",
        "main_status",
        "round_at_ns",
        "still_at_ns",
    )

    def __init__(self) -> None:
        self.group: cgroups.TaskGroup | None = None
        self.main: identity.Identity | None = None
        self.main_status: tuple[int, int] | None = None
        self.round_at_ns = 0
        self.still_at_ns = 0
        self._is_reaped = False
        self._is_killing = False
        self._pause_ms = _PAUSE_FIRST_MS
        self._still_before: frozenset[tuple[int, int]] | None = None
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
        """Whether the main process has ended and nothing else is left; then all is reaped.

        No child, and nobody in the control group, is the proof.
        """
        if self.main and not self._is_reaped:
            if self.main_status is None or self._others():
                return False
            os.waitpid(self.main.pid, 0)
            self._is_reaped = True
        with contextlib.suppress(ChildProcessError):
            while self._bury(-1):
                pass
            return False
        return self.group is None or not self.group.is_populated()

    def signal_all(self, number: int) -> None:
        """Tell everyone, once: the main group in one call, then those who have left it."""
        _take_precedence()
        found = _family(_TELL_MAX_MS)
        others = [stat for stat in found if not self._is_in_main_group(stat.pid)]
        for each in (number, signal.SIGCONT):  # a suspended process hears nothing
            self._signal_main_group(each)
            for stat in others:
                _signal(stat, each)
        self._thaw()

    def dismiss_leftovers(self) -> None:
        """The main process has ended by itself: whoever is still there is told to go, and counted."""
        if self._others():
            self._told.update(stat.pid for stat in _family(_TELL_MAX_MS))
            self.signal_all(signal.SIGTERM)

    def warn(self, number: int) -> None:
        """Signal those who listen for it: the default of most signals is death, and a warning must not kill."""
        for stat in _family(_TELL_MAX_MS):
            if identity.hears(stat.pid, number):
                _signal(stat, number)

    def still_round(self) -> bool:
        """SIGSTOP all that moves. True once /proc shows that nothing does; else again, at `still_at_ns`.

        Who has stopped can neither fork nor end, so that what one look misses because somebody has just ended is found
        by the next one: two looks in a row that find nothing are the proof. Who waits in the kernel (D) stops before it
        returns, and cannot fork once it is told (fork(2) restarts): the parent of a stopped vfork stays there. Of a
        process whose first thread has ended (Z) nothing is shown of the others.
        """
        now_ns = identity.boottime_ns()
        if self._freeze():
            self.still_at_ns = now_ns + _FREEZE_MS * 1_000_000
            return self.group is not None and self.group.is_frozen()
        if self._still_before is None:
            stopped = (stat for stat in _family(_TELL_MAX_MS) if stat.state in "Tt")
            self._still_before = frozenset((stat.pid, stat.start_ticks) for stat in stopped)
        self._signal_main_group(signal.SIGSTOP)
        give_up_ns, quiet_looks = now_ns + _SWEEP_MAX_MS * 1_000_000, 0
        told: set[int] = set()
        while quiet_looks < 2 and now_ns < give_up_ns:
            try:
                awake = [stat for stat in tree.descendants(os.getpid(), _TELL_MAX_MS) if stat.state not in "Tt"]
            except OSError:  # as in _family, but here nobody found is the proof
                break
            for stat in awake:
                _signal(stat, signal.SIGSTOP)
            moving = [stat for stat in awake if stat.state not in "DZ" or stat.pid not in told]
            told.update(stat.pid for stat in awake)
            before_ns, now_ns = now_ns, identity.boottime_ns()
            is_whole = now_ns - before_ns < _TELL_MAX_MS * 1_000_000
            quiet_looks = quiet_looks + 1 if is_whole and not moving else 0
        self._pause_ms = min(self._pause_ms * 2, _PAUSE_LAST_MS)
        self.still_at_ns = now_ns + self._pause_ms * 1_000_000
        return quiet_looks == 2

    def move_again(self) -> None:
        """Undo `still_round`; whom the task itself had stopped before stays so."""
        self._pause_ms = _PAUSE_FIRST_MS
        still_before, self._still_before = self._still_before or frozenset(), None
        if self._thaw():
            return
        found = _family(_RESUME_MAX_MS)
        if not still_before or not found:
            self._signal_main_group(signal.SIGCONT)
        for stat in found:
            if (stat.pid, stat.start_ticks) not in still_before:
                _signal(stat, signal.SIGCONT)

    def kill_round(self) -> None:
        """SIGKILL all that is there; what is not gone by then is for the next round, at `round_at_ns`.

        Those who die hand their children to this process, so that killing and reaping its own children again and again
        reaches everyone, at a few microseconds each: faster than a family can fork.
        """
        if not self._is_killing:
            self._is_killing = True
            _take_precedence()
            found = _family(_COUNT_MAX_MS)
            self._killed.update(stat.pid for stat in found if self.main and stat.pid != self.main.pid)
        if self.group is not None:
            self.group.kill()
        self._signal_main_group(signal.SIGKILL)
        give_up_ns = identity.boottime_ns() + _SWEEP_MAX_MS * 1_000_000
        has_moved = False
        while self._sweep() and identity.boottime_ns() < give_up_ns:
            has_moved = True
        if not has_moved:
            # Somebody above hangs in the kernel and cannot die: the family below it must be reached all the same.
            for stat in _family(_TELL_MAX_MS):
                _signal(stat, signal.SIGKILL)
        self._pause_ms = _PAUSE_FIRST_MS if has_moved else min(self._pause_ms * 2, _PAUSE_LAST_MS)
        self.round_at_ns = identity.boottime_ns() + self._pause_ms * 1_000_000

    def pause_s(self) -> float:
        """How long to wait before the next round, when there is nothing else to do."""
        return self._pause_ms / 1000

    def _freeze(self) -> bool:
        """Let the control group stop everyone, whoever forks meanwhile. False if there is none."""
        if self.group is None:
            return False
        try:
            self.group.freeze()
        except OSError:
            return False
        return True

    def _thaw(self) -> bool:
        """Undo `_freeze`. False if there is no control group."""
        if self.group is None:
            return False
        try:
            self.group.thaw()
        except OSError:
            return False
        return True

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
        try:
            return [pid for pid in tree.own_children() if pid != main_pid]
        except OSError:  # this host has no descriptor left (ENFILE); the last word has waitpid, which needs none
            return []

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


def _family(within_ms: int) -> list[identity.Stat]:
    """All below this process, as far as they are found: nobody while this host has no descriptor left (ENFILE)."""
    try:
        return tree.descendants(os.getpid(), within_ms)
    except OSError:
        return []


def _take_precedence() -> None:
    """Among a thousand busy processes this one must get its turn. Allowed to root only."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)


def _signal(stat: identity.Stat, number: int) -> None:
    with contextlib.suppress(PermissionError):  # as above; it is waited for all the same
        identity.send_signal(stat.pid, stat.start_ticks, number)
