"""The group of ranks: start, watch, stop, exit code.

One thread, one loop, one selector: ends of processes (pidfds), signals, output, typed input and
deadlines. Nothing polls and nothing blocks.

Exit codes; the first cause decides:

    all ranks end with 0             0
    a rank fails                     its own exit code, or 128 + the signal that killed it
    a rank calls ``abort(code)``     that code
    INT, TERM or HUP to us           128 + signal
    our output is closed             141, as if SIGPIPE had ended us

Ranks that fail only because a peer did never decide: the shared memory's poison word names the
culprit. After a failure the others have a moment to end by themselves, woken through the
segment; then their process groups get SIGTERM, and after the grace time SIGKILL. SIGINT is
passed on and followed by the same two steps, each after the grace time, or at the next ^C.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from cobre_shm.errors import AllocationFailed, BackendNotAvailable, CobreError, InitializationFailed
from cobre_shm.spawn.environment import rank_environment
from cobre_shm.spawn.errors import ProgramNotRunnable
from cobre_shm.spawn.guard import Guard
from cobre_shm.spawn.output import Output, Stream
from cobre_shm.spawn.program import interpreter
from cobre_shm.spawn.rank import Rank, die_with_parent, group_members
from cobre_shm.spawn.report import judge
from cobre_shm.spawn.signals import SignalInbox
from cobre_shm.spawn.tcp import Network, TcpGroup
from cobre_shm.spawn.terminal import TerminalInput, is_controlled_by_terminal

if TYPE_CHECKING:
    from cobre_shm.segment.watch import WatchedSegment

__all__ = ["Job", "launch"]

# Time for the other ranks to fail by themselves: they then say where they were.
_MOMENT = 0.25
# Time for the culprit to end by itself, if others who noticed were faster: its code decides.
_CULPRIT_SECS = 2.0

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FORWARDED_SIGNALS = (
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGCONT,
)
_WATCHED_SIGNALS = (*_ENDING_SIGNALS, *_FORWARDED_SIGNALS, signal.SIGTSTP, signal.SIGCHLD)


@dataclass(frozen=True)
class Job:
    """What to launch.

    Attributes:
        arguments: What each rank's interpreter is given.
        size: Number of ranks that are started here.
        network: Where they meet the others, over tcp; None: shared memory.
        labels: Whether every line says which rank wrote it.
        grace: Seconds between SIGTERM and SIGKILL.
        json_errors: Whether a failure is reported as JSON.
    """

    arguments: list[str]
    size: int
    network: Network | None = None
    labels: bool = False
    grace: float = 5.0
    json_errors: bool = False


def launch(job: Job) -> int:
    """Run a job to its end and return the exit code. Nothing of it is left afterwards.

    Raises:
        BackendNotAvailable: What shared memory needs is not installed.
        InitializationFailed: The segment cannot be created.
        AllocationFailed: There is not enough shared memory.
        ProgramNotRunnable: The system refuses to start a rank.
    """
    _open_standard_descriptors()
    if job.network is not None:
        with TcpGroup(job.network, job.size, os.environ) as group, Guard(lambda: None) as guard:
            return _Launcher(job, group, guard).run()
    try:
        from cobre_shm.segment.watch import WatchedSegment
    except ImportError as error:
        raise BackendNotAvailable(
            "shm", ["local"], install_hint='pip install "cobre-shm[shm]"'
        ) from error
    try:
        segment = _make_segment(WatchedSegment, job.size)
    except CobreError:
        raise
    except Exception as error:
        # What the system says comes as OSError or as one of posix_ipc's own classes.
        raise InitializationFailed(
            "shm",
            f"The shared memory segment cannot be created: {error}",
            operation="create",
            source=error,
        ) from error
    try:
        with Guard(segment.unlink) as guard:
            return _Launcher(job, segment, guard).run()
    finally:
        segment.unlink()
        segment.close()


def _make_segment(kind: type[WatchedSegment], size: int) -> WatchedSegment:
    """Make the segment, of memory without a name where that of POSIX objects is too small."""
    try:
        return kind.create(kind.random_name(), size, launched=True)
    except AllocationFailed as error:
        mount, free = error.context.get("mount"), error.context.get("free_bytes")
        if mount is None:
            raise
        line = (
            f"cobre_shm.spawn: {mount} has {free} bytes free, {error.requested_bytes} are needed: "
            "using memory without a name (memfd) instead\n"
        )
        try:
            segment = kind.create_unnamed(size, launched=True)
        except AllocationFailed as refused:
            # The first error says what helps.
            raise error from refused
        # Nobody need read it.
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        return segment


def _open_standard_descriptors() -> None:
    """Give missing standard descriptors to the null device, or a pipe of ours would become one."""
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == standard:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, standard)
                os.close(null)


@dataclass(frozen=True)
class _Step:
    """One rung of stopping the group: after so many seconds, a signal, or poison for None."""

    delay: float
    signal: int | None


class _Launcher:
    def __init__(self, job: Job, segment: WatchedSegment | TcpGroup, guard: Guard) -> None:
        self._job = job
        self._segment = segment
        self._first_rank = segment.first_rank if isinstance(segment, TcpGroup) else 0
        self._size = segment.size
        self._guard = guard
        self._selector = selectors.DefaultSelector()
        self._output = Output(self._selector, self._on_broken_output)
        self._inbox = SignalInbox(_WATCHED_SIGNALS)
        self._die_with_us = die_with_parent()
        self._ranks: list[Rank] = []
        self._stderr: list[Stream] = []
        self._running: set[int] = set()
        self._pidfds: set[int] = set()
        self._unwatched: list[Rank] = []
        self._strays: set[int] = set()
        self._terminal: TerminalInput | None = None
        self._first_failure: Rank | None = None
        self._ended_by: int | None = None
        self._write_error: OSError | None = None
        self._steps: deque[_Step] = deque()
        self._deadline: float | None = None
        self._has_spared = False
        self._is_abandoned = False

    def run(self) -> int:
        with self._selector, self._inbox:
            self._selector.register(self._inbox, selectors.EVENT_READ, self._on_signals)
            try:
                for number in range(self._job.size):
                    self._start(number)
                self._turn_until(lambda: not self._running)
                self._stop_strays()
                self._output.finish()
                # Only now is it known whether somebody took all of it.
                self._flush()
                code = self._report()
                self._flush()
                return code
            finally:
                self._end_all()

    # Starting

    def _start(self, number: int) -> None:
        size = self._job.size
        mask = self._inbox.block()

        def before_exec() -> None:
            self._die_with_us()
            self._inbox.reset_in_child(mask)

        typed, typed_end = None, None
        if number == 0 and is_controlled_by_terminal():
            typed, typed_end = os.pipe()
        try:
            rank = Rank(
                number,
                [*interpreter(), *self._job.arguments],
                self._environment(number),
                stdin=typed if number == 0 else subprocess.DEVNULL,
                descriptors=self._descriptors(number),
                before_exec=before_exec,
            )
        except (OSError, subprocess.SubprocessError) as error:
            if typed_end is not None:
                os.close(typed_end)
            raise ProgramNotRunnable(
                f"Rank {number} of {size} cannot be started: {error}",
                context={"rank": number, "size": size},
            ) from error
        finally:
            self._inbox.unblock(mask)
            if typed is not None:
                os.close(typed)
        self._ranks.append(rank)
        self._running.add(number)
        self._guard.watch(rank.pid)
        self._watch_end(rank)
        if typed_end is not None:
            self._terminal = TerminalInput(typed_end, self._selector)
        mark = str(self._first_rank + number) if self._job.labels else ""
        self._output.add(rank.stdout, self._output.stdout, label=_label(mark, ""))
        self._stderr.append(
            self._output.add(
                rank.stderr, self._output.stderr, label=_label(mark, ":err"), keeps_tail=True
            )
        )

    def _environment(self, number: int) -> dict[str, str]:
        group = self._segment
        if isinstance(group, TcpGroup):
            return group.environment(number)
        return rank_environment(os.environ, group.name, number, self._size)

    def _descriptors(self, number: int) -> list[int]:
        group = self._segment
        if isinstance(group, TcpGroup):
            return group.descriptors(number)
        return [group.descriptor] if group.is_unnamed else []

    def _watch_end(self, rank: Rank) -> None:
        if not self._wait_for(rank.pid, lambda: self._look_at(rank)):
            # SIGCHLD tells only that someone ended, so all of these are looked at then.
            self._unwatched.append(rank)
            self._look_at(rank)

    def _wait_for(self, pid: int, on_end: Callable[[], None]) -> bool:
        """Have ``on_end`` called when the process ends; False if the kernel refuses."""
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False

        def on_event() -> None:
            self._forget(descriptor)
            on_end()

        self._selector.register(descriptor, selectors.EVENT_READ, on_event)
        self._pidfds.add(descriptor)
        return True

    def _forget(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        self._pidfds.remove(pidfd)
        os.close(pidfd)

    # The loop

    def _turn_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            timeout = None
            if self._deadline is not None:
                timeout = max(0.0, self._deadline - time.monotonic())
            for key, _ in self._selector.select(timeout):
                key.data()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._take_step()

    def _look_at(self, rank: Rank) -> None:
        ending = rank.look()
        if ending is None or rank.number not in self._running:
            return
        self._running.remove(rank.number)
        self._segment.report_exit(rank.number, exit_code=ending.exit_code, signal=ending.signal)
        if rank.number == 0 and self._terminal is not None:
            self._terminal.close()
        if ending.code != 0 and not rank.was_stopped:
            if self._first_failure is None:
                self._first_failure = rank
            self._stop([_Step(_MOMENT, signal.SIGTERM), _Step(self._job.grace, signal.SIGKILL)])

    def _on_signals(self) -> None:
        for number in self._inbox.take():
            if number == signal.SIGCHLD:
                for rank in self._unwatched:
                    self._look_at(rank)
            elif number == signal.SIGTSTP:
                # ^Z reaches our process group only.
                self._send(signal.SIGTSTP)
                os.kill(os.getpid(), signal.SIGSTOP)
            elif number in _ENDING_SIGNALS:
                self._on_ending_signal(number)
            else:
                self._send(number)
                if number == signal.SIGCONT and self._terminal is not None:
                    self._terminal.resume()

    def _on_ending_signal(self, number: int) -> None:
        if self._first_failure is None and self._ended_by is None:
            self._ended_by = number
        if not self._running and not self._strays:
            # All that is left is output which nobody takes.
            self._is_abandoned = True
        elif self._steps:
            while self._steps and self._steps[0].signal is None:
                self._steps.popleft()
            self._take_step()
        elif number == signal.SIGINT:
            grace = self._job.grace
            self._stop(
                [
                    _Step(0, number),
                    _Step(_MOMENT, None),
                    _Step(grace, signal.SIGTERM),
                    _Step(grace, signal.SIGKILL),
                ]
            )
        else:
            # Not poisoned before the grace time is over: a program may want to save its state
            # on SIGTERM, and needs its communicator for that.
            self._stop([_Step(0, number), _Step(self._job.grace, signal.SIGKILL)])

    def _on_broken_output(self, error: OSError) -> None:
        if self._write_error is None:
            self._write_error = error
        self._stop([_Step(0, signal.SIGTERM), _Step(self._job.grace, signal.SIGKILL)])

    # Stopping

    def _stop(self, steps: list[_Step]) -> None:
        """Begin to stop the group, unless that has begun already."""
        if self._deadline is None and not self._steps:
            self._steps.extend(steps)
            self._set_deadline()

    def _set_deadline(self) -> None:
        self._deadline = time.monotonic() + self._steps[0].delay if self._steps else None

    def _take_step(self) -> None:
        if self._steps:
            step = self._steps.popleft()
            if step.signal is None or step.signal == signal.SIGKILL:
                self._segment.stop(self._ended_by or signal.SIGKILL)
            if step.signal == signal.SIGTERM:
                self._terminate()
            elif step.signal is not None:
                self._send(step.signal)
        else:
            self._is_abandoned = True
        self._set_deadline()

    def _terminate(self) -> None:
        """Send SIGTERM, once to each rank, and a little later to the one that is to blame."""
        culprit = None
        if self._first_failure is not None and not self._has_spared:
            culprit = self._segment.first_failed()
        if culprit in self._running:
            self._has_spared = True
            self._steps.appendleft(_Step(_CULPRIT_SECS, signal.SIGTERM))
        for rank in self._ranks:
            if not rank.was_stopped and (rank.number != culprit or rank.ending is not None):
                rank.send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            rank.send(number)

    def _stop_strays(self) -> None:
        """End what ranks started in their process groups and left behind."""
        strays = group_members(rank.pid for rank in self._ranks)
        for pid in strays:
            if self._wait_for(pid, partial(self._strays.discard, pid)):
                self._strays.add(pid)
        if strays:
            self._stop([_Step(_MOMENT, signal.SIGTERM), _Step(self._job.grace, signal.SIGKILL)])
            self._turn_until(lambda: not self._strays or not self._steps)
        self._steps.clear()
        self._deadline = None

    def _flush(self) -> None:
        """Wait until all output is written: as long as it takes, unless we were told to end."""
        if self._ended_by is not None and not self._is_abandoned:
            self._deadline = time.monotonic() + self._job.grace
        self._turn_until(lambda: self._output.is_flushed or self._is_abandoned)

    def _end_all(self) -> None:
        if self._terminal is not None:
            self._terminal.close()
        for rank in self._ranks:
            rank.send(signal.SIGKILL)
        for rank in self._ranks:
            rank.reap()
        for pidfd in list(self._pidfds):
            self._forget(pidfd)
        self._output.discard()

    # Reporting

    def _report(self) -> int:
        """Write what went wrong, last and in one block, and return the exit code."""
        if self._ended_by is not None:
            return 128 + self._ended_by
        verdict = judge(
            self._ranks,
            self._first_failure,
            self._segment.first_failed(),
            self._segment.abort_code(),
        )
        if verdict is not None:
            verdict = replace(verdict, first_rank=self._first_rank)
            stream = self._stderr[verdict.rank.number]
            if self._job.json_errors:
                block = verdict.to_json(self._size, stream.tail)
            else:
                # With nothing behind them, the last words can be read where they stand.
                block = verdict.to_text(self._size, () if stream.is_last else stream.tail)
            self._output.stderr.put(None, block)
            return verdict.code
        error = self._write_error
        if error is None:
            return 0
        if error.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE
        text = f"cobre_shm.spawn: Output cannot be written: {error.strerror}\n"
        self._output.stderr.put(None, text.encode())
        return 1


def _label(mark: str, suffix: str) -> bytes:
    return f"[{mark}{suffix}] ".encode() if mark else b""
