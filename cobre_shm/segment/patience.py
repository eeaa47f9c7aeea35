"""What a rank looks at between the slices of a long wait."""

from __future__ import annotations

import sys
import time

from cobre_shm import layout
from cobre_shm.segment.failure import missing_ranks
from cobre_shm.segment.lateness import lateness
from cobre_shm.segment.poison import Poison, poison, read_poison
from cobre_shm.segment.process import is_alive
from cobre_shm.segment.segment import Segment

__all__ = ["Patience"]

# How often a waiting rank asks the process table; the kernel's death marks are seen sooner.
_PROCESS_CHECK_SECS = 0.25
# A rank that stays late is named again after so many times the first interval.
_REPEAT_WARNING = 6


class Patience:
    """One wait of one rank: the time limit, the late, the dead, and the failure of the group.

    Time runs only while nothing moves: any rank's progress starts it anew.
    """

    def __init__(self, segment: Segment, rank: int, timeout: float, stall_warn: float) -> None:
        self._segment = segment
        self._rank = rank
        self._timeout = timeout
        self._stall_warn = self._next_warning = stall_warn
        self._progress = -1
        self._since = self._checked = time.monotonic()

    def look(self, epoch: int, steps: int = 0) -> Poison | None:
        """Return the group's first failure, if it has one now.

        Args:
            epoch: At which this rank is.
            steps: Which it awaits inside a chain; 0: it does not.
        """
        segment, words = self._segment, self._segment.words
        first = read_poison(segment)
        if first is not None:
            return first
        now = time.monotonic()
        arrived = [segment.arrived(rank) for rank in range(segment.size)]
        done = [segment.steps(rank) for rank in range(segment.size)]
        # Nobody can be two rounds ahead. Otherwise words that jump would count as progress.
        if arrived[self._rank] != epoch or not all(0 <= seen <= epoch + 1 for seen in arrived):
            return poison(segment, layout.DAMAGED, self._rank)
        progress = sum(arrived) + sum(done)
        if progress != self._progress:
            self._progress, self._since = progress, now
            self._next_warning = self._stall_warn
        elif now - self._since > self._timeout:
            return poison(segment, layout.TIMED_OUT, self._rank)
        elif now - self._since > self._next_warning:
            self._next_warning += _REPEAT_WARNING * self._stall_warn
            if self._is_speaker(arrived, epoch, steps):
                line = lateness(segment, self._rank, epoch, steps, now - self._since)
                print(line, file=sys.stderr, flush=True)
        if now - self._checked < _PROCESS_CHECK_SECS:
            return None
        self._checked = now
        for rank in range(segment.size):
            if rank == self._rank or (arrived[rank] >= epoch and done[rank] >= steps):
                continue
            block = segment.control(rank)
            if words.load(block + layout.STATE) == layout.CLOSED:
                return poison(segment, layout.LEFT, rank)
            pid, start = words.load(block + layout.PID), words.load(block + layout.START)
            if not is_alive(pid, start):
                return poison(segment, layout.DIED, rank)
        return None

    def _is_speaker(self, arrived: list[int], epoch: int, steps: int) -> bool:
        """Whether of all that wait this rank is the one to say so."""
        if not steps:
            return not any(seen >= epoch for seen in arrived[: self._rank])
        late = missing_ranks(self._segment, epoch, steps)
        return late == [(self._rank - 1) % self._segment.size]
