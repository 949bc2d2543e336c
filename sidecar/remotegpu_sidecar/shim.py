"""One run: owns its process tree, output, deadline and record, whatever becomes of the agent.

Runs in a child of the spawner, imports nothing after that fork (an upgrade replaces the files under it), and never
returns. `enforcement.py` decides when a run is over; this module does it. Standard library only.

Messages to the agent, over the run's channel: {"hello": identity}, then {"started": ...} or {"ended": ...}, or
{"error": sentence, "errno": N} when the shim itself cannot work. From the agent: {"go": {}}, with the path of the run's
"cgroup" if it has one; the channel's end before that means that nothing is to be started. Signals: SIGTERM asks for a
stop with grace (as does SIGWINCH, from systemd), SIGUSR1 for a kill at once, SIGHUP says that the directory is to be
looked at: `deadline` has moved earlier, or `suspend` has come or gone. While that file is there the tree stands still;
it means the same however often it is looked at, and whoever made it.

Long, because it may import nothing after its fork and is read as one story.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import time

from remotegpu_sidecar import cgroups, enforcement, identity, kernel, output, record, taskstart
from remotegpu_sidecar.processes import Processes

DEADLINE_FILE = "deadline"
SUSPEND_FILE = "suspend"
COMM = b"remotegpu-shim"
MESSAGE_MAX_BYTES = 64 * 1024
STOP_SIGNAL, KILL_SIGNAL, REREAD_SIGNAL = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
# What stops a whole scope reaches the task as well: this one means nothing to it, so that the shim stops it in order.
SCOPE_STOP_SIGNAL = signal.SIGWINCH

_WATCHED_SIGNALS = (STOP_SIGNAL, SCOPE_STOP_SIGNAL, KILL_SIGNAL, REREAD_SIGNAL, signal.SIGCHLD)
_LINES_RESERVE_BYTES = 8192
# A record stays readable however often a run is suspended: later times are not on it.
_SUSPENSIONS_NOTED_MAX = 100
_REHEARSALS = 20
_BLOCK_BYTES = 512  # of ru_inblock and ru_oublock, whatever the disk's are
_RETRY_S = 1.0
_PIPE_BYTES = 256 * 1024
# Of a loud task so much is taken before the other stream, the signals and the clock have their turn: a millisecond.
_PUMPS_MAX = 4
_NS_PER_S = 1_000_000_000
# As one number: their enumeration's arithmetic is a page of memory here and there, in every shim. So is
# contextlib.suppress, which stands only where a run does not come by as a rule.
_SEND_FLAGS = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def main(directory: str, channel: socket.socket) -> None:
    """Be the shim of the run in `directory`; never returns."""
    try:
        Shim(directory, channel).live()
    except BaseException as error:  # noqa: BLE001 - nothing may get back into the spawner's code
        number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
        _tell(channel, {"error": f"the shim failed: {_where(error)}", "errno": number})
    finally:
        os._exit(0)


def rehearse() -> None:
    """Do what every run does, before the first fork and without a run. Safe to repeat.

    The interpreter rewrites code that it has run a few times, and remembers where attributes were found (PEP 659): in
    pages that every shim would write to, and so have for itself (100 kB, measured).
    """
    spec = record.encode("spec", b'{"env":{"A":"b"},"argv":["a"],"timeout_s":null,"grace_period_s":1.5,"n":1}')
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd, timer_fd = os.memfd_create("rehearsal"), kernel.timerfd()
    with ours, theirs:
        for _ in range(_REHEARSALS):
            me = identity.identify(os.getpid())
            Processes()
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 0)
            signal.signal(REREAD_SIGNAL, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED_SIGNALS))
            record.parse(spec + spec)
            kernel.reserve(fd, _LINES_RESERVE_BYTES)
            record.append(fd, record.encode("shim", json.dumps({"shim": me.as_json()}).encode("ascii")))
            _tell(ours, {"go": {"n": 1}})
            _integer(json.loads(theirs.recv(MESSAGE_MAX_BYTES))["go"].get("n"))
            kernel.arm_timer(timer_fd, None)
            poll = select.poll()
            poll.register(timer_fd, select.POLLIN)
            poll.poll(0)
            _drained(timer_fd)
            _widen(fd)
            _optional(_number(1))
            now_ns = identity.boottime_ns()
            enforced = enforcement.Enforcement(
                now_ns=now_ns, timeout_s=None, grace_period_s=1.0, lease_grace_s=1.0, deadline_ns=now_ns * 2
            )
            enforced.strike(now_ns)
            enforced.next_ns()
    os.close(fd)
    os.close(timer_fd)


class Shim:
    """The life of one run, in order: prepare, wait for go, start, follow, finish."""

    def __init__(self, directory: str, channel: socket.socket) -> None:
        self._channel = channel
        self._dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._record_fd = os.open(record.FILE_NAME, flags, dir_fd=self._dir_fd)
        self._identity = identity.identify(os.getpid())
        self._processes = Processes()
        self._poll = select.poll()
        self._wake_fd = -1
        self._timer_fd = kernel.timerfd()
        self._armed_ns: int | None = None
        self._pipes: dict[int, int] = {}
        self._report_fd = -1
        self._report = b""
        self._launch_error: dict[str, object] = {}
        self._started_ns = self._started_wall_ns = 0
        self._deadline_ns: int | None = None
        self._is_still = False
        self._suspensions = 0
        self._spec: dict[str, object] = {}
        self._cgroup: str | None = None
        self._enforcement: enforcement.Enforcement
        self._output: output.OutputWriter

    def live(self) -> None:
        """Do all of it."""
        self._prepare()
        if not self._is_told_to_go():
            self._write_ended({"ended_by": enforcement.ABANDONED, "error": "the agent went away before the start"})
            return
        try:
            self._begin()
        except Exception as error:  # noqa: BLE001 - whatever it is, the agent is told why
            self._kill_until_gone()
            self._write_ended({"ended_by": enforcement.LAUNCH, **_why_not(error)})
            return
        try:
            self._follow()
        except Exception as error:  # noqa: BLE001 - a fault of this program must not leave a tree behind
            self._kill_until_gone()
            sentence = f"the shim failed and killed the task: {_where(error)}"
            self._write_ended({"ended_by": self._enforcement.ended_by or enforcement.ABANDONED, "error": sentence})

    # --- before the start ---

    def _prepare(self) -> None:
        os.setsid()
        os.dup2(0, 2)  # whoever reads the agent's log to its end does not wait for this run
        os.chdir("/")
        os.umask(0o077)
        kernel.prctl(kernel.PR_SET_NAME, COMM)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        self._watch_signals()
        lines, complaints = record.read(record.FILE_NAME, self._dir_fd)
        if "spec" not in lines:
            raise ValueError(f"the run record has no spec: {'; '.join(complaints) or 'it is empty'}")
        self._spec = lines["spec"]
        segments_max = _integer(self._spec.get("output_segments", output.SEGMENTS_DEFAULT))
        self._output = output.OutputWriter(self._dir_fd, _integer(self._spec["output_limit_bytes"]), segments_max)
        # What is to be written at the end has its place on the disk before anything begins.
        kernel.reserve(self._record_fd, _LINES_RESERVE_BYTES)
        self._append("shim", {"shim": self._identity.as_json()})
        _tell(self._channel, {"hello": self._identity.as_json()})

    def _watch_signals(self) -> None:
        self._wake_fd, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _WATCHED_SIGNALS:
            signal.signal(number, _noted)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._poll.register(self._wake_fd, select.POLLIN)
        self._poll.register(self._timer_fd, select.POLLIN)

    def _is_told_to_go(self) -> bool:
        try:
            message = self._channel.recv(MESSAGE_MAX_BYTES)
            if not message:
                return False
            self._cgroup = json.loads(message)["go"].get("cgroup")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def _begin(self) -> None:
        """Start the task, unless its lease is about to end."""
        self._deadline_ns = self._read_deadline(missing=None)
        self._started_ns, self._started_wall_ns = identity.boottime_ns(), time.time_ns()
        self._enforcement = enforcement.Enforcement(
            now_ns=self._started_ns,
            timeout_s=_optional(self._spec["timeout_s"]),
            grace_period_s=_number(self._spec["grace_period_s"]),
            lease_grace_s=_number(self._spec["lease_grace_s"]),
            deadline_ns=self._deadline_ns,
            warn_before_s=_optional(self._spec.get("warn_before_s")),
            lease_warn_s=_optional(self._spec.get("lease_warn_s")),
        )
        if not self._enforcement.strike(self._started_ns):
            group = {"cgroup": self._cgroup} if self._cgroup else {}
            self._append("starting", {"shim": self._identity.as_json(), **group})
            if self._cgroup:
                self._processes.group = cgroups.TaskGroup(self._cgroup)
                self._poll.register(self._processes.group.events_fd, select.POLLPRI)
            self._fork()

    def _fork(self) -> None:
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in output.STREAMS]
        self._report_fd, report_write_fd = os.pipe2(os.O_CLOEXEC)
        # A signal between fork and exec would run this program's handlers in the child, and write to its wake-up pipe.
        # Only those that it handles: all there are, as an enumeration's members, are 40 kB in every shim.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                fds = pipes[0][1], pipes[1][1], report_write_fd
                taskstart.start(self._spec, self._identity.pid, self._cgroup, *fds)
            self._processes.main = identity.identify(pid, self._identity.boot_id)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(report_write_fd)
        self._poll.register(self._report_fd, select.POLLIN)
        for stream, (reader, writer) in enumerate(pipes):
            os.close(writer)
            os.set_blocking(reader, False)
            _widen(reader)
            self._pipes[reader] = stream
            self._poll.register(reader, select.POLLIN)

    # --- while it runs ---

    def _follow(self) -> None:
        while not self._is_over():
            self._arm_timer()
            signals = b""
            for fd, _events in self._poll.poll():
                if fd in self._pipes:
                    self._pump(fd)
                elif fd == self._report_fd:
                    self._read_report()
                elif fd == self._wake_fd:
                    signals = _drained(fd)
                elif fd == self._timer_fd:
                    _drained(fd)
                elif self._processes.group:
                    self._processes.group.is_populated()  # to look at it is to take note
            now_ns = identity.boottime_ns()
            due_ns = self._enforcement.next_ns()
            if due_ns is not None and now_ns >= due_ns:
                # A shim that has not had its turn for a while may see the clock first, and then signals that are older.
                signals += _drained(self._wake_fd)
            # First: what had ended before a request was seen has ended by itself.
            if signal.SIGCHLD in signals and self._processes.reap() and self._enforcement.main_exited(now_ns):
                self._processes.dismiss_leftovers()
            self._obey(signals, now_ns)
            self._look_at_the_clock(now_ns)
        self._finish()

    def _is_over(self) -> bool:
        if self._processes.main is None:
            return True
        return self._processes.main_status is not None and self._report_fd < 0 and self._processes.are_gone()

    def _arm_timer(self) -> None:
        due_ns = self._enforcement.next_ns()
        if due_ns is not None and self._enforcement.ended_by is not None:
            due_ns = max(due_ns, self._processes.round_at_ns)
        if self._enforcement.is_suspended and not self._is_still:
            due_ns = min(due_ns or self._processes.still_at_ns, self._processes.still_at_ns)
        if due_ns != self._armed_ns:
            kernel.arm_timer(self._timer_fd, due_ns)
            self._armed_ns = due_ns

    def _pump(self, fd: int) -> None:
        for _ in range(_PUMPS_MAX):
            count = self._output.pump(self._pipes[fd], fd)
            if count == 0:
                self._close_pipe(fd)
            if count < output.MORE_BYTES:
                return

    def _close_pipe(self, fd: int) -> None:
        del self._pipes[fd]
        self._poll.unregister(fd)
        os.close(fd)

    def _read_report(self) -> None:
        """The child has something to say from between fork and exec, or has become the task, which closes its end."""
        part = os.read(self._report_fd, taskstart.REPORT_MAX_BYTES)
        self._report += part
        if part:
            return
        self._poll.unregister(self._report_fd)
        os.close(self._report_fd)
        self._report_fd = -1
        if self._report:
            self._launch_error = json.loads(self._report)
            return
        main = self._processes.main
        started: dict[str, object] = {
            "process": main.as_json() if main else None,
            "shim": self._identity.as_json(),
            "started_wall_ns": self._started_wall_ns,
            "started_boottime_ns": self._started_ns,
        }
        self._append("started", started)
        _tell(self._channel, {"started": started})
        self._channel.close()

    def _obey(self, signals: bytes, now_ns: int) -> None:
        if REREAD_SIGNAL in signals:
            self._move_deadline(now_ns)
            self._suspend_or_resume(now_ns)
        is_stop = STOP_SIGNAL in signals or SCOPE_STOP_SIGNAL in signals
        if is_stop and self._enforcement.request_stop(now_ns):
            self._processes.signal_all(_integer(self._spec["stop_signal"]))
        if KILL_SIGNAL in signals:
            self._enforcement.request_kill(now_ns)

    def _suspend_or_resume(self, now_ns: int) -> None:
        if self._is_to_be_suspended():
            if self._enforcement.suspend(now_ns):
                self._is_still = False
                self._processes.still_at_ns = 0
        elif self._enforcement.resume(now_ns):
            self._processes.move_again()
            self._note("resumed", now_ns)

    def _is_to_be_suspended(self) -> bool:
        try:
            os.stat(SUSPEND_FILE, dir_fd=self._dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError:  # the disk is failing: as it was
            return self._enforcement.is_suspended
        return True

    def _note(self, kind: str, now_ns: int) -> None:
        """Put it on record, for people and for a lost database; the run does not depend on it."""
        self._suspensions += kind == "suspended"
        if self._suspensions <= _SUSPENSIONS_NOTED_MAX:
            with contextlib.suppress(OSError):  # a full disk
                self._append(kind, {"wall_ns": time.time_ns(), "boottime_ns": now_ns})

    def _look_at_the_clock(self, now_ns: int) -> None:
        if self._enforcement.is_suspended and not self._is_still and now_ns >= self._processes.still_at_ns:
            self._is_still = self._processes.still_round()
            if self._is_still:
                self._note("suspended", now_ns)
        due_ns = self._enforcement.next_ns()
        if due_ns is None or now_ns < due_ns:
            return
        if self._enforcement.ended_by is None:
            self._move_deadline(now_ns)
            if self._enforcement.strike(now_ns):
                self._processes.signal_all(_integer(self._spec["stop_signal"]))
            elif self._enforcement.warn(now_ns):
                self._processes.warn(_integer(self._spec["warn_signal"]))
        if self._enforcement.is_kill_due(now_ns) and now_ns >= self._processes.round_at_ns:
            self._processes.kill_round()

    def _move_deadline(self, now_ns: int) -> None:
        self._deadline_ns = self._read_deadline(missing=self._deadline_ns)
        self._enforcement.move_deadline(self._deadline_ns, now_ns)

    def _read_deadline(self, missing: int | None) -> int | None:
        """The lease's deadline; `missing` without a file, or while it cannot be read once there was one."""
        flags = (
            os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )  # a pipe that was put there is not waited for
        try:
            fd = os.open(DEADLINE_FILE, flags, dir_fd=self._dir_fd)
        except FileNotFoundError:
            return missing
        except OSError:
            if missing is None:
                raise
            return missing
        try:
            content = os.read(fd, 8)
        finally:
            os.close(fd)
        if len(content) == 8:
            return int.from_bytes(content, "little", signed=True)
        if missing is None:
            raise ValueError(f"{DEADLINE_FILE} holds {len(content)} bytes, not 8")
        return missing

    # --- the end ---

    def _finish(self) -> None:
        for fd in list(self._pipes):
            self._drain(fd)
        ended: dict[str, object] = {"ended_by": self._enforcement.ended_by}
        status = self._processes.main_status
        if self._launch_error and self._enforcement.ended_by == enforcement.EXIT:
            ended = {"ended_by": enforcement.LAUNCH, **self._launch_error}
        elif status is not None and not self._launch_error:
            ended["exit_code" if status[0] == os.CLD_EXITED else "signal"] = status[1]
        self._write_ended(ended)

    def _drain(self, fd: int) -> None:
        """Take what is in the pipe now; a stranger who still writes into it is not waited for."""
        moved = 0
        while moved < _PIPE_BYTES:
            count = self._output.pump(self._pipes[fd], fd)
            if count <= 0:
                break
            moved += count
        self._close_pipe(fd)

    def _kill_until_gone(self) -> None:
        """After a fault of this program: nothing that it was to watch may live on, however long the kernel takes."""
        while True:
            self._processes.kill_round()
            self._processes.reap()
            if self._processes.are_gone():
                return
            time.sleep(self._processes.pause_s())

    def _write_ended(self, ended: dict[str, object]) -> None:
        """Put the end on record, tell the agent if it listens. While it cannot be written: again and again."""
        self._output.close()
        ended |= {
            "ended_wall_ns": time.time_ns(),
            "stdout_bytes": self._output.end_offset(0),
            "stderr_bytes": self._output.end_offset(1),
            "output_dropped_bytes": self._output.dropped_bytes,
            "stragglers_killed": self._processes.stragglers,
            "usage": self._usage(),
        }
        if self._processes.group:
            ended["oom_kills"] = cgroups.oom_kills(self._processes.group.path)
        while True:
            try:
                self._append("ended", ended)
                break
            except OSError:
                time.sleep(_RETRY_S)
        if self._processes.group:
            cgroups.remove(self._processes.group.path)  # the shim's own leaf is for the agent to remove
        _tell(self._channel, {"ended": ended})

    def _usage(self) -> dict[str, object]:
        """By the control group where it counts, which misses nobody; else of those who were waited for."""
        wall_ns = identity.boottime_ns() - self._started_ns if self._processes.main else 0
        waited = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s, memory_peak_bytes = waited.ru_utime + waited.ru_stime, waited.ru_maxrss * 1024
        io_bytes = waited.ru_inblock * _BLOCK_BYTES, waited.ru_oublock * _BLOCK_BYTES
        if self._processes.group:
            path = self._processes.group.path
            cpu_s = max(cpu_s, cgroups.cpu_s(path) or 0.0)
            memory_peak_bytes = cgroups.memory_peak_bytes(path) or memory_peak_bytes
            io_bytes = cgroups.io_bytes(path) or io_bytes
        return {
            "wall_s": wall_ns / _NS_PER_S,
            "cpu_s": cpu_s,
            "memory_peak_bytes": memory_peak_bytes,
            "io_read_bytes": io_bytes[0],
            "io_write_bytes": io_bytes[1],
        }

    def _append(self, kind: str, data: dict[str, object]) -> None:
        record.append(self._record_fd, record.encode(kind, json.dumps(data).encode("ascii")))


def _tell(channel: socket.socket, message: dict[str, object]) -> None:
    if channel.fileno() < 0:
        return
    try:
        channel.send(json.dumps(message).encode("ascii"), _SEND_FLAGS)
    except OSError:  # the agent is gone; the record says it as well
        return


def _why_not(error: Exception) -> dict[str, object]:
    if not isinstance(error, OSError):
        return {"error": f"the task could not be started: {_where(error)}"}
    mends = {
        errno.EAGAIN: ": too many processes (see 'ulimit -u' and TasksMax); run fewer tasks at once",
        errno.ENOMEM: ": no memory for another process; run fewer tasks at once",
        errno.EMFILE: ": too many open files; raise LimitNOFILE",
        errno.ENFILE: ": too many open files on this host; raise fs.file-max",
        errno.ENOSPC: ": the disk is full; make room in the state directory",
    }
    number = error.errno or 0
    sentence = f"the task's process could not be made: {os.strerror(number)}{mends.get(number, '')}"
    return {"errno": number, "error": sentence}


def _where(error: BaseException) -> str:
    line, name = 0, ""
    trace = error.__traceback__
    while trace is not None:
        line, name = trace.tb_lineno, os.path.basename(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return f"{error!r} at {name}:{line}"[:1000]


def _noted(_number: int, _frame: object) -> None:
    """The wake-up pipe carries the signal's number."""


def _drained(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""


def _widen(fd: int) -> None:
    """Fewer wake-ups for loud tasks. The sum per user is bounded (pipe(7)); the default will do as well."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        return


def _integer(value: object) -> int:
    if isinstance(value, int):
        return value
    raise TypeError(f"not an integer: {value!r}")


def _number(value: object) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise TypeError(f"not a number: {value!r}")


def _optional(value: object) -> float | None:
    return None if value is None else _number(value)
