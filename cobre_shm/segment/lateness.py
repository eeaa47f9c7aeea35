"""Ranks that are alive and late: who keeps the others waiting, and what it is doing."""

from __future__ import annotations

from cobre_shm.segment.failure import missing_ranks, named_ranks
from cobre_shm.segment.recorder import last_entry
from cobre_shm.segment.segment import Segment

__all__ = ["Reminder", "lateness"]

# A rank that stays late is named again after so many times the first interval.
_REPEAT = 6


class Reminder:
    """When a wait is worth a line: after a while, and then every six times as long.

    Attributes:
        count: How many it has been worth so far.
    """

    def __init__(self, seconds: float) -> None:
        self.count: int = 0
        self._seconds = self._next = seconds

    def is_due(self, waited: float) -> bool:
        """Whether it is now, after so many seconds; True once for each line."""
        if waited <= self._next:
            return False
        self._next += _REPEAT * self._seconds
        self.count += 1
        return True


def lateness(segment: Segment, rank: int, epoch: int, steps: int, seconds: float) -> str:
    """Return one line on the ranks that keep ``rank`` waiting for ``epoch`` (see missing_ranks)."""
    late = missing_ranks(segment, epoch, steps)
    named = named_ranks(segment, late)
    waiting = segment.size - len(late)
    entry = last_entry(segment, rank)
    where = f"collective {entry.sequence}, {entry.call}" if entry else "a collective"
    return f"{waiting} rank(s) have waited {seconds:.0f} s in {where}, for {named}"
