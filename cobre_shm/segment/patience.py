"""What a rank looks at between the slices of a long wait."""

from __future__ import annotations

import math
import time

from cobre_shm import layout
from cobre_shm.reminder import Reminder
from cobre_shm.segment.failure import missing_ranks
from cobre_shm.segment.lateness import lateness
from cobre_shm.segment.libc import is_futex_refused
from cobre_shm.segment.notes import NO_FUTEX, note_once, say
from cobre_shm.segment.poison import Poison, poison, read_poison
from cobre_shm.segment.process import is_alive
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.stacks import ask_for_stacks

__all__ = ["Patience", "has_marks", "look_secs"]

# How often a waiting rank looks around; poison and the kernel's death marks are seen sooner, by the
# kernel that waits. Each look wakes up much of the interpreter, and what it asks of the process
# table takes 2 ms and more where the machine was idle. So it is seldom, except for ranks whose
# death the kernel does not mark. Short limits need more looks: so many for each.
_LOOK_SECS, _UNMARKED_LOOK_SECS = 1.0, 0.2
_LOOKS = 8
# A slice of sleep that is over sooner was none. So many of them in a row are no coincidence.
_NO_SLEEP_SECS = 0.0005
_NO_SLEEPS = 3
# Without futex: a fraction of the time waited so far, within these bounds.
_NAP_FRACTION, _NAP_MIN_SECS, _NAP_MAX_SECS = 0.125, 0.0002, 0.005


def has_marks(segment: Segment) -> bool:
    """Whether the kernel marks the death of every rank; all have joined."""
    ranks = range(segment.size)
    return all(segment.words.load(segment.control(rank) + layout.GUARDED) for rank in ranks)


def look_secs(segment: Segment, timeout: float, stall_warn: float) -> float:
    """Return how long a waiting rank may go on without a look around."""
    usual = _LOOK_SECS if has_marks(segment) else _UNMARKED_LOOK_SECS
    return min(usual, timeout / _LOOKS, stall_warn / _LOOKS)


class Patience:
    """One wait of one rank: the time limit, the late, the dead, and the failure of the group.

    Time runs only while nothing moves: any rank's progress starts it anew.
    """

    def __init__(
        self, segment: Segment, rank: int, timeout: float, stall_warn: float, look_secs: float
    ) -> None:
        self._segment = segment
        self._rank = rank
        self._timeout = timeout
        self._stall_warn, self._reminder = stall_warn, Reminder(stall_warn)
        self._progress = -1
        self._interval = look_secs
        self._since = self._begun = self._looked = time.monotonic()
        self._checked = -math.inf
        self._no_sleeps = 0

    def look(self, epoch: int, steps: int = 0) -> Poison | None:
        """Return the group's first failure, if it has one now.

        Args:
            epoch: At which this rank is.
            steps: Which it awaits inside a chain; 0: it does not.
        """
        now = time.monotonic()
        if now - self._checked < self._interval:
            self._nap(now)
            return None
        self._checked = now
        segment = self._segment
        first = read_poison(segment)
        if first is not None:
            return first
        # Read before what they have published: a rank closes after its last collective.
        left = [rank for rank in range(segment.size) if self._has_left(rank)]
        lines = [segment.arrivals(rank) for rank in range(segment.size)]
        arrived = [max(line) for line in lines]
        done = [segment.steps(rank) for rank in range(segment.size)]
        late = [r for r in range(segment.size) if arrived[r] < epoch or done[r] < steps]
        for rank in late:
            if rank in left:
                return poison(segment, layout.LEFT, rank)
        # Nobody can be two rounds ahead. Otherwise words that jump would count as progress.
        is_possible = all(0 <= seen <= epoch + 1 for line in lines for seen in line)
        if arrived[self._rank] != epoch or not is_possible:
            return poison(segment, layout.DAMAGED, self._rank)
        progress = sum(arrived) + sum(done)
        if progress != self._progress:
            self._progress, self._since = progress, now
            self._reminder = Reminder(self._stall_warn)
        elif now - self._since > self._timeout:
            return poison(segment, layout.TIMED_OUT, self._rank)
        elif self._reminder.is_due(now - self._since) and self._is_speaker(arrived, epoch, steps):
            say(lateness(segment, self._rank, epoch, steps, now - self._since))
            if self._reminder.count == 1:
                ask_for_stacks(segment, missing_ranks(segment, epoch, steps))
        self._nap(now)
        if now - self._begun < self._interval:
            return None
        return self._find_the_dead(late, epoch, steps)

    def _nap(self, now: float) -> None:
        """Sleep here where the kernel's loop cannot: there the system refuses futex."""
        self._no_sleeps = self._no_sleeps + 1 if now - self._looked < _NO_SLEEP_SECS else 0
        if self._no_sleeps >= _NO_SLEEPS and is_futex_refused():
            note_once(self._segment, NO_FUTEX)
            waited = now - self._begun
            time.sleep(min(max(_NAP_FRACTION * waited, _NAP_MIN_SECS), _NAP_MAX_SECS))
        self._looked = time.monotonic()

    def _has_left(self, rank: int) -> bool:
        state = self._segment.control(rank) + layout.STATE
        return self._segment.words.load(state) == layout.CLOSED  # <SYNC state>

    def _find_the_dead(self, late: list[int], epoch: int, steps: int) -> Poison | None:
        """Ask the process table for the late ones; what the first that ended poisons with."""
        segment, words = self._segment, self._segment.words
        for rank in late:
            block = segment.control(rank)
            pid, start = words.load(block + layout.PID), words.load(block + layout.START)
            if rank == self._rank or is_alive(pid, start):
                continue
            # It may have done its part and ended since it was found late.
            if segment.arrived(rank) < epoch or segment.steps(rank) < steps:
                return poison(segment, layout.DIED, rank)
        return None

    def _is_speaker(self, arrived: list[int], epoch: int, steps: int) -> bool:
        """Whether of all that wait this rank is the one to say so."""
        if not steps:
            return not any(seen >= epoch for seen in arrived[: self._rank])
        late = missing_ranks(self._segment, epoch, steps)
        return late == [(self._rank - 1) % self._segment.size]
