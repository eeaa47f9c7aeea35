"""The group of ranks: watch, stop, exit code.

One thread, one loop: ends of processes (pidfds), signals, output, typed input and deadlines.
Nothing blocks. Ranks are looked at every second beside, for an end of which nobody tells us: that
of a rank whose debugger lets it go later, or where pidfds are refused and SIGCHLD is blocked.

Exit codes; the first cause decides:

    all ranks end with 0             0
    a rank fails                     its own exit code, or 128 + the signal that killed it
    a rank calls ``abort(code)``     that code
    INT, TERM or HUP to us           128 + signal
    ``--timeout``                    124
    our output is closed             141, as if SIGPIPE had ended us

Ranks that fail only because a peer did never decide: the meeting names the culprit. After a
failure the others have a moment to end by themselves, woken through the meeting; then their
process groups get SIGTERM, and after the grace time SIGKILL. SIGINT is passed on and followed by
the same two steps, each after the grace time, or at the next ^C; ranks whose collectives are called
by jitted code, which hears no signal, are woken a moment after it. Another signal that comes again
takes the next step too, but not within a second.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from cobre_shm.errors import CobreError
from cobre_shm.spawn.descriptors import more_descriptors
from cobre_shm.spawn.errors import exit_code_of
from cobre_shm.spawn.events import Events
from cobre_shm.spawn.guard import Guard
from cobre_shm.spawn.job import Job
from cobre_shm.spawn.ladder import (
    CULPRIT_SECS,
    MOMENT,
    Ladder,
    Step,
    ending_steps,
    failing_steps,
    interrupting_steps,
)
from cobre_shm.spawn.loop import Loop
from cobre_shm.spawn.memory import MemoryGroup
from cobre_shm.spawn.monitor import Monitor
from cobre_shm.spawn.rank import KILLED_SECS, Rank, group_members
from cobre_shm.spawn.rank_output import RankOutput
from cobre_shm.spawn.report import judge
from cobre_shm.spawn.signals import SignalInbox
from cobre_shm.spawn.stacks import STACKS_SECS, Stacks
from cobre_shm.spawn.starting import Start
from cobre_shm.spawn.table import table_of_ranks
from cobre_shm.spawn.terminal import TerminalInput

if TYPE_CHECKING:
    from cobre_shm.spawn.meeting import Meeting

__all__ = ["TIMED_OUT", "Group", "Outcome"]

TIMED_OUT = 124
_LOOK_SECS = 1.0
# Two ending signals this close are one request: of a terminal that is closed the kernel sends a
# SIGHUP and the shell another one. A second ^C means what it says.
_AGAIN_SECS = 1.0

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
class Outcome:
    """How a run ended.

    Attributes:
        code: Exit code.
        has_failed: Whether a rank failed by itself, and nobody has asked for the end since, so
            that another attempt makes sense.
    """

    code: int
    has_failed: bool = False


class Group:
    """The ranks of one run, from their start to their end.

    Args:
        job: What to run.
        meeting: How the ranks find each other; it stays the caller's.
        guard: Told of every rank.
        events: Told of what happens.
        attempt: How many runs of the job have failed already.
        deadline: Of ``--timeout`` by the monotonic clock, in seconds, or None.
        monitor: Shows the group, or None.
    """

    def __init__(
        self,
        job: Job,
        meeting: Meeting,
        guard: Guard,
        events: Events,
        attempt: int,
        deadline: float | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.job = job
        self.meeting = meeting
        self.loop: Loop = Loop()
        self.inbox: SignalInbox = SignalInbox(_WATCHED_SIGNALS)
        self.output: RankOutput = RankOutput(job, self.loop, self._on_broken_output, attempt > 0)
        self.ranks: list[Rank] = []
        self.terminal: TerminalInput | None = None
        self._guard = guard
        self._events = events
        self._attempt = attempt
        self._deadline = deadline
        self._monitor = monitor
        self._ladder = Ladder(self.loop, self._take_step)
        self._memory = MemoryGroup()
        self._running: set[int] = set()
        self._unwatched: list[Rank] = []
        self._strays: set[int] = set()
        self._first_failure: Rank | None = None
        self._ended_by: int | None = None
        # When somebody last asked for the end by a signal, by the monotonic clock.
        self._asked_at: float | None = None
        self._is_overdue = self._has_timed_out = False
        self._is_asking = False
        self._write_error: OSError | None = None
        self._has_spared = False
        self._has_given_up = False
        self._is_abandoned = False

    @property
    def is_ending(self) -> bool:
        """Whether we were told to end."""
        return self._ended_by is not None or self._has_timed_out

    def run(self, start: Start) -> Outcome:
        """Start the ranks, and watch them to their end.

        Raises:
            ProgramNotRunnable: The system refuses to start a rank.
        """
        try:
            with self.inbox:
                self.loop.selector.register(self.inbox, selectors.EVENT_READ, self._on_signals)
                try:
                    with more_descriptors(self.job.size) as limits:
                        self.descriptor_limits: tuple[int, int] = limits
                        outcome = self._run(start)
                finally:
                    start.cancel()
                    self._end_all()
                # Also while the last was written.
                is_asked = self._asked_at is not None or any(
                    number in _ENDING_SIGNALS for number in self.inbox.take()
                )
                return replace(outcome, has_failed=outcome.has_failed and not is_asked)
        finally:
            self.loop.close()

    def _run(self, start: Start) -> Outcome:
        self._look_at_all()
        if self._deadline is not None:
            self.loop.call_after(self._deadline - time.monotonic(), self._on_timeout)
        self._events.start(self, self._attempt, start.method)
        try:
            start.begin(self)
            self.loop.turn_until(lambda: start.is_done or self.is_ending)
        except (CobreError, OSError) as error:
            # What runs already has no say any more, and shall not write while we do.
            start.cancel()
            self._running.clear()
            self._kill_ranks()
            self.output.finish()
            self._events.exit_of_run(exit_code_of(error))
            self._flush()
            raise
        # Too long a start is told as too long a run is; it may be over when that has been done.
        self.loop.turn_until(lambda: not self._is_asking)
        if start.is_done:
            self._events.follow()
            self.loop.turn_until(lambda: not self._running and not self._is_asking)
            self._stop_strays()
            if self._monitor is not None:
                self._monitor.wait_for_last_table(self.loop)
        self.output.finish()
        # Only now is it known whether somebody took all of it.
        self._flush()
        outcome = self._report()
        self._events.exit_of_run(outcome.code)
        self._flush()
        return outcome

    def add(self, rank: Rank) -> None:
        """Take in a rank that was started; ``watch`` follows when it is a child of ours."""
        self.ranks.append(rank)
        self._guard.watch(rank.pid)

    def watch(self, rank: Rank) -> None:
        """Begin to look for the end of a rank."""
        self._running.add(rank.number)
        if not self.loop.call_at_end_of(rank.pid, lambda: self._look_at(rank)):
            # SIGCHLD tells only that someone ended, so all of these are looked at then.
            if not self._unwatched and self.loop.is_pidfd_refused:
                text = "this system refuses pidfd_open: ends of ranks are seen by SIGCHLD instead"
                self.output.say(f"cobre_shm.spawn: {text}\n".encode())
            self._unwatched.append(rank)
            self._look_at(rank)

    # What happens

    def _look_at_all(self) -> None:
        for rank in self.ranks:
            self._look_at(rank)
        self.loop.call_after(_LOOK_SECS, self._look_at_all)

    def _look_at(self, rank: Rank) -> None:
        if rank.number not in self._running:
            return
        ending = rank.look()
        if ending is None:
            return
        self._running.remove(rank.number)
        self.meeting.report_exit(rank.number, exit_code=ending.exit_code, signal=ending.signal)
        self._events.exit_of_rank(rank)
        if rank.number == 0 and self.terminal is not None:
            self.terminal.close()
        if ending.code != 0 and not rank.was_stopped:
            if ending.signal == signal.SIGKILL and self._memory.has_killed():
                rank.cause = self._memory.describe()
            if self._first_failure is None:
                self._first_failure = rank
            self._ladder.begin(failing_steps(self.job.grace))

    def _on_signals(self) -> None:
        for number in self.inbox.take():
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
                if number == signal.SIGCONT and self.terminal is not None:
                    self.terminal.resume()

    def _on_ending_signal(self, number: int) -> None:
        now = time.monotonic()
        is_again = self._asked_at is None or now - self._asked_at >= _AGAIN_SECS
        if is_again:
            self._asked_at = now
        if self._first_failure is None and not self.is_ending:
            self._ended_by = number
        if not self._running and not self._strays:
            # All that is left is output which nobody takes.
            self._is_abandoned = True
        elif not self._ladder.is_used_up:
            if number == signal.SIGINT or is_again:
                self._ladder.advance()
        elif number == signal.SIGINT:
            self._ladder.begin(interrupting_steps(self.job.grace))
        else:
            self._ladder.begin(ending_steps(number, self.job.grace))

    def _on_timeout(self) -> None:
        self._is_overdue = True
        if self.is_ending or self._first_failure is not None:
            return
        self._has_timed_out = self._is_asking = True
        rows = self._table() if self.ranks else ["  No rank has been started yet"]
        stacks = Stacks(self.ranks, self.output)
        stacks.request()

        def show() -> None:
            self._is_asking = False
            head = f"cobre_shm.spawn: The run takes longer than {self.job.timeout:g} s (--timeout)"
            self.output.say("\n".join([head, *rows]).encode() + b"\n" + stacks.collect())
            self._ladder.begin(failing_steps(self.job.grace, 0))

        self.loop.call_after(STACKS_SECS, show)

    def _on_broken_output(self, error: OSError) -> None:
        if self._write_error is None:
            self._write_error = error
        self._ladder.begin(failing_steps(self.job.grace, 0))

    # Stopping

    def _take_step(self, step: Step) -> None:
        if step.signal is None:
            self.meeting.interrupt(signal.SIGINT)
        elif step.signal == signal.SIGKILL:
            self.meeting.stop(self._ended_by or signal.SIGKILL)
        if step.signal == signal.SIGTERM:
            self._terminate()
        elif step.signal is not None:
            self._send(step.signal)
        if step.signal == signal.SIGKILL:
            self.loop.call_after(KILLED_SECS, self._give_up)

    def _give_up(self) -> None:
        """Wait no longer for ranks that were killed and have not ended."""
        from cobre_shm.segment.process import state_of

        for rank in [rank for rank in self.ranks if rank.number in self._running]:
            self._running.remove(rank.number)
            self._has_given_up = True
            text = f"Rank {rank.number} (pid {rank.pid}) was killed and cannot be reaped"
            self.output.say(f"cobre_shm.spawn: {text}: {state_of(rank.pid)}\n".encode())

    def _terminate(self) -> None:
        """Send SIGTERM, once to each rank, and a little later to the one that is to blame."""
        culprit = None
        if self._first_failure is not None and not self._has_spared:
            culprit = self.meeting.first_failed()
        if culprit in self._running:
            self._has_spared = True
            self._ladder.insert(Step(CULPRIT_SECS, signal.SIGTERM))
        for rank in self.ranks:
            if not rank.was_stopped and (rank.number != culprit or rank.ending is not None):
                rank.send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            rank.send(number)

    def _stop_strays(self) -> None:
        """End what ranks started in their process groups and left behind."""
        strays = group_members(rank.pid for rank in self.ranks)
        for pid in strays:
            if self.loop.call_at_end_of(pid, partial(self._strays.discard, pid)):
                self._strays.add(pid)
        if strays:
            self._ladder.begin(failing_steps(self.job.grace, MOMENT))
            self.loop.turn_until(lambda: not self._strays or self._ladder.is_used_up)
        self._ladder.clear()

    def _flush(self) -> None:
        """Wait until all output is written: as long as it takes, unless we are to end."""

        def abandon() -> None:
            self._is_abandoned = True

        def is_over() -> bool:
            return self.output.is_flushed or self._is_abandoned

        self.loop.turn_until(lambda: is_over() or self.is_ending or self._is_overdue)
        # While ranks are asked for their stacks, something is still to be said.
        self.loop.turn_until(lambda: not self._is_asking)
        if not is_over():
            self.loop.call_after(self.job.grace, abandon)
            self.loop.turn_until(is_over)

    def _kill_ranks(self) -> None:
        if self.terminal is not None:
            self.terminal.close()
        for rank in self.ranks:
            rank.send(signal.SIGKILL)

    def _end_all(self) -> None:
        self._kill_ranks()
        deadline = time.monotonic() + (0.0 if self._has_given_up else KILLED_SECS)
        for rank in self.ranks:
            rank.reap(deadline)
        self.output.discard()

    # Reporting

    def _table(self) -> list[str]:
        return table_of_ranks(self.meeting.progress(), self.ranks)

    def _report(self) -> Outcome:
        """Write what went wrong, last and in one block, and return the outcome."""
        if self._ended_by is not None:
            return Outcome(128 + self._ended_by)
        if self._has_timed_out:
            return Outcome(TIMED_OUT)
        verdict = judge(
            self.ranks,
            self._first_failure,
            self.meeting.first_failed(),
            self.meeting.abort_code(),
        )
        if verdict is not None:
            tail, is_last = self.output.last_words(verdict.rank.number)
            if self.job.json_errors:
                block = verdict.to_json(self.job.group_size, tail)
            else:
                rows = self._table() if self.job.size > 1 else []
                # With nothing behind them, the last words can be read where they stand.
                shown = () if is_last else tail
                block = verdict.to_text(self.job.group_size, rows, shown)
            self.output.say(block)
            return Outcome(verdict.code, has_failed=True)
        error = self._write_error
        if error is None:
            return Outcome(0)
        if error.errno == errno.EPIPE:
            return Outcome(128 + signal.SIGPIPE)
        self.output.say(f"cobre_shm.spawn: Output cannot be written: {error.strerror}\n".encode())
        return Outcome(1)
