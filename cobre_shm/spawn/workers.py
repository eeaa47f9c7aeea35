"""A group of workers that carry out one task for the process that started them.

Unlike the launcher, which has a process to itself, this runs inside anybody's process and maybe in
one of its threads: it installs no signal handler, forks nothing of its own (each worker is a fresh
interpreter, executed at once), and leaves nothing global changed. One loop, in the thread that
called: ends of processes (pidfds), messages, a cancellation, deadlines. It returns when all workers
have ended and are reaped, whatever happened.

The first failure decides. The others then have a moment to fail by themselves, woken through the
meeting: who is to blame may be known only from them. Then they are ended, SIGTERM first; whom the
meeting blames has more time, for it may be slower to end than those who noticed.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cobre_shm.descriptors import socket_above_standard
from cobre_shm.errors import CollectiveFailed, WorkerError
from cobre_shm.spawn.cancellation import Cancellation, Cancelled
from cobre_shm.spawn.environment import common_environment
from cobre_shm.spawn.errors import ProgramNotRunnable
from cobre_shm.spawn.frames import Frame, FrameReader, encode_frame
from cobre_shm.spawn.ladder import CULPRIT_SECS, MOMENT
from cobre_shm.spawn.meeting import Meeting
from cobre_shm.spawn.memory import MemoryGroup
from cobre_shm.spawn.program import interpreter
from cobre_shm.spawn.rank import Ending, look_at, wait_for_killed
from cobre_shm.spawn.remote import decode_exception

__all__ = ["OnEvent", "WorkerGroup"]

# Between SIGTERM and SIGKILL.
_GRACE = 0.25
# Where the kernel refuses pidfds, the ends of processes are looked for this often.
_LOOK_SECS = 0.05
# No wait is longer. A signal that comes between Python's last look for one and the system's wait
# does not end that wait, and the handler of a ^C runs only behind it.
_TURN_SECS = 1.0
_CHUNK_BYTES = 1 << 18
_BOTH = selectors.EVENT_READ | selectors.EVENT_WRITE

_BOOT = (
    "import sys; fd, parent, entry, sys.path[:] = *sys.argv[1:4], sys.argv[4:]; "
    "from cobre_shm.spawn.worker import main; main(int(fd), int(parent), entry)"
)

# Gets a worker's rank and an event; true asks the workers to stop.
OnEvent = Callable[[int, bytes], bool]


class _Worker:
    """One process and this end of its channel."""

    def __init__(self, rank: int, entry: str, task: bytes, meeting: Meeting) -> None:
        self.rank = rank
        self.ending: Ending | None = None
        self.result: bytes | None = None
        self.error: BaseException | None = None
        self.was_stopped = False
        self.cause = ""
        self.is_streaming = True
        self.outbox = memoryview(encode_frame(Frame.TASK, task))
        self.reader = FrameReader()
        self.socket, theirs = map(socket_above_standard, socket.socketpair())
        self.pidfd: int | None = None
        try:
            with theirs:
                self._process = _start(rank, entry, theirs.fileno(), meeting)
        except BaseException:
            self.socket.close()
            raise
        self.pid = self._process.pid
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            self.pidfd = os.pidfd_open(self.pid)

    @property
    def has_failed(self) -> bool:
        """Whether it failed by itself."""
        if self.was_stopped:
            # Also what it raises because it was told to end is no failure.
            return False
        if self.error is not None:
            return True
        # Of an end that nobody saw, the result says that all was well.
        return self.ending is not None and (bool(self.ending.returncode) or self.result is None)

    def has_ended(self) -> bool:
        """Look whether it has ended."""
        if self.ending is None:
            self.ending = look_at(self.pid)
        return self.ending is not None

    def signal(self, number: int) -> None:
        """Signal its process group, which may have members left after its own end."""
        ending = self.ending or look_at(self.pid)
        if ending is not None and ending.is_unknown:
            # Once it is reaped, its number may be another's.
            return
        if self.ending is None:
            self.was_stopped = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """End it and what it started, reap it, close the descriptors."""
        self.signal(signal.SIGKILL)
        wait_for_killed(self._process)
        self.socket.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


def _start(rank: int, entry: str, descriptor: int, meeting: Meeting) -> subprocess.Popen[bytes]:
    path = [folder or str(Path.cwd()) for folder in sys.path]
    words = [*interpreter(), "-c", _BOOT, str(descriptor), str(os.getpid()), entry, *path]
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=_stream(1),
            stderr=_stream(2),
            env={
                **common_environment(os.environ, backend=meeting.backend),
                **meeting.variables(rank),
            },
            pass_fds=[descriptor, *meeting.descriptors(rank)],
            # ^C in a terminal is for the process that started them, which then ends them.
            process_group=0,
        )
    except OSError as error:
        raise ProgramNotRunnable(
            f"Worker {rank} cannot be started: {error}", context={"rank": rank}
        ) from error


def _stream(number: int) -> int | None:
    """Return where a worker writes: where we do, or nowhere if that is no stream of ours."""
    with contextlib.suppress(OSError):
        # What was opened in the place of a missing one is not.
        if os.get_inheritable(number):
            return None
    return subprocess.DEVNULL


def _wait_for(workers: Sequence[_Worker], secs: float) -> None:
    deadline = time.monotonic() + secs
    while time.monotonic() < deadline and any(not worker.has_ended() for worker in workers):
        time.sleep(0.002)


class WorkerGroup:
    """Workers that all carry out the same task.

    Args:
        entry: ``module:function``, see :data:`cobre_shm.spawn.worker.Entry`.
        task: The payload, equal for all.
        size: Number of workers.
        meeting: How they find each other; it stays the caller's.
        on_event: Called in the thread of :meth:`run` for every event, in each worker's order.
        cancellation: Ends the group when it is requested.
    """

    def __init__(
        self,
        entry: str,
        task: bytes,
        size: int,
        meeting: Meeting,
        *,
        on_event: OnEvent | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        self._entry, self._task, self._size = entry, task, size
        self._meeting = meeting
        self._on_event = on_event
        self._cancellation = cancellation
        self._workers: list[_Worker] = []
        self._failed: list[_Worker] = []
        self._has_asked = False
        self._memory = MemoryGroup()
        self._deadline: float | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [worker.pid for worker in self._workers]

    def run(self) -> list[bytes]:
        """Start the workers, wait for all of them, and return their results by rank.

        No process, descriptor or memory of the group is left, whether it returns or raises.

        Raises:
            WorkerError: A worker raised or died; the others have been ended.
            Cancelled: It was asked for.
            ProgramNotRunnable: The system refuses to start a worker.
        """
        with selectors.PollSelector() as self._selector:
            try:
                if self._cancellation is not None:
                    self._selector.register(
                        self._cancellation, selectors.EVENT_READ, self._on_cancellation
                    )
                for rank in range(self._size):
                    self._add(_Worker(rank, self._entry, self._task, self._meeting))
                self._turn_until_ended()
            except BaseException:
                self._end()
                raise
            finally:
                for worker in self._workers:
                    worker.close()
        if self._failed:
            failure = self._failure()
            raise failure from failure.inner
        return [worker.result or b"" for worker in self._workers]

    def _add(self, worker: _Worker) -> None:
        self._workers.append(worker)
        self._selector.register(
            worker.socket,
            _BOTH,
            partial(self._on_socket, worker),
        )
        if worker.pidfd is not None:
            self._selector.register(
                worker.pidfd, selectors.EVENT_READ, partial(self._on_end, worker)
            )

    def _turn_until_ended(self) -> None:
        while any(worker.ending is None for worker in self._workers):
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._fail()
                return
            self._turn(self._deadline)

    def _turn_while_any_runs(self, workers: Sequence[_Worker], secs: float) -> None:
        deadline = time.monotonic() + secs
        while any(worker.ending is None for worker in workers) and time.monotonic() < deadline:
            self._turn(deadline)

    def _turn(self, deadline: float | None) -> None:
        unwatched = [w for w in self._workers if w.pidfd is None and w.ending is None]
        timeout = _LOOK_SECS if unwatched else _TURN_SECS
        if deadline is not None:
            timeout = min(timeout, max(0.0, deadline - time.monotonic()))
        for key, _ in self._selector.select(timeout):
            key.data()
        for worker in unwatched:
            self._on_end(worker)

    def _on_cancellation(self) -> None:
        raise Cancelled

    def _on_socket(self, worker: _Worker) -> None:
        if not worker.is_streaming:
            # Its end was seen in the same turn.
            return
        if worker.outbox:
            self._transmit(worker)
        if self._receive(worker) == 0:
            self._stop_streaming(worker)

    def _transmit(self, worker: _Worker) -> None:
        try:
            # An error also where the program has given SIGPIPE back its default.
            sent = worker.socket.send(worker.outbox, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            # It is gone; how is seen by its end.
            sent = len(worker.outbox)
        worker.outbox = worker.outbox[sent:]
        if not worker.outbox:
            self._selector.modify(
                worker.socket, selectors.EVENT_READ, partial(self._on_socket, worker)
            )

    def _receive(self, worker: _Worker) -> int | None:
        """Take a piece of what the worker sent; return its length, or None if nothing is there."""
        try:
            data = worker.socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return 0
        for kind, payload in worker.reader.feed(data):
            if kind is Frame.RESULT:
                worker.result = payload
            elif kind is Frame.ERROR:
                worker.error = decode_exception(payload)
                if worker.has_failed:
                    self._note_failure(worker)
            elif self._tell(worker.rank, payload):
                self._ask_to_stop()
        return len(data)

    def _tell(self, rank: int, payload: bytes) -> bool:
        """Pass an event on; return whether the workers are to stop."""
        if self._on_event is None or self._failed:
            return False
        return self._on_event(rank, payload)

    def _stop_streaming(self, worker: _Worker) -> None:
        if worker.is_streaming:
            worker.is_streaming = False
            self._selector.unregister(worker.socket)

    def _ask_to_stop(self) -> None:
        if self._has_asked:
            return
        self._has_asked = True
        for worker in self._workers:
            # A few bytes, which the worker reads when it likes; behind its task, if that is
            # still on the way.
            worker.outbox = memoryview(bytes(worker.outbox) + encode_frame(Frame.STOP))
            if worker.is_streaming:
                self._selector.modify(worker.socket, _BOTH, partial(self._on_socket, worker))

    def _on_end(self, worker: _Worker) -> None:
        worker.ending = look_at(worker.pid)
        if worker.ending is None:
            return
        if worker.pidfd is not None:
            self._selector.unregister(worker.pidfd)
        # What it had sent before it ended.
        while self._receive(worker):
            pass
        self._stop_streaming(worker)
        ending = worker.ending
        if ending.signal == signal.SIGKILL and not worker.was_stopped and self._memory.has_killed():
            worker.cause = self._memory.describe()
        self._meeting.report_exit(worker.rank, exit_code=ending.exit_code, signal=ending.signal)
        if worker.has_failed:
            self._note_failure(worker)

    def _note_failure(self, worker: _Worker) -> None:
        if worker not in self._failed:
            self._failed.append(worker)
        if self._deadline is None:
            self._deadline = time.monotonic() + MOMENT

    def _fail(self) -> None:
        """The first failure has had its moment: end the workers, and hear what they still say."""
        if self._cancellation is not None:
            # It comes too late: the failure is what the caller is told.
            self._selector.unregister(self._cancellation)
        self._terminate(self._turn_while_any_runs)

    def _end(self) -> None:
        """End the workers after an exception of ours, when nobody asks any more what they say."""
        self._terminate(_wait_for)

    def _terminate(self, wait: Callable[[Sequence[_Worker], float], None]) -> None:
        """Send SIGTERM to the workers; to those that are about to end by themselves, later.

        Whoever has not ended then is killed when it is closed.

        Args:
            wait: Waits for workers, at most so many seconds.
        """
        culprit = self._meeting.first_failed()
        self._meeting.stop(signal.SIGTERM)
        leaving = [
            worker for worker in self._workers if worker.error is not None or worker.rank == culprit
        ]
        for worker in self._workers:
            if worker not in leaving:
                worker.signal(signal.SIGTERM)
        wait(self._workers, _GRACE)
        wait(leaving, CULPRIT_SECS)
        late = [worker for worker in leaving if worker.ending is None]
        for worker in late:
            worker.signal(signal.SIGTERM)
        wait(late, _GRACE)

    def _failure(self) -> WorkerError:
        first = self._first_failed()
        error, ending = first.error, first.ending
        code = None if ending is None or first.was_stopped else ending.returncode
        if error is not None:
            what = f"raised {type(error).__name__}: {error}"
        elif code or (ending is not None and ending.is_unknown):
            what = f"{ending}: {first.cause}" if first.cause else str(ending)
        else:
            what = "ended without a result"
        return WorkerError(
            f"Worker {first.rank} of {self._size} (pid {first.pid}) {what}",
            rank=first.rank,
            pid=first.pid,
            exit_code=code,
            signal=-code if code is not None and code < 0 else None,
            inner=error,
            cause=first.cause or None,
        )

    def _first_failed(self) -> _Worker:
        """Who is to blame, and not who was the first to be noticed."""
        culprit = self._meeting.first_failed()
        for worker in self._failed:
            if worker.rank == culprit:
                return worker
        for worker in self._failed:
            if not isinstance(worker.error, CollectiveFailed):
                return worker
        return self._failed[0]
