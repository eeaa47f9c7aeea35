"""Ranks that are alive and late: who keeps the others waiting, and what it is doing."""

from __future__ import annotations

from cobre_shm.segment.failure import missing_ranks, named_ranks
from cobre_shm.segment.recorder import last_entry
from cobre_shm.segment.segment import Segment

__all__ = ["lateness"]


def lateness(segment: Segment, rank: int, epoch: int, steps: int, seconds: float) -> str:
    """Return one line on the ranks that keep ``rank`` waiting for ``epoch`` (see missing_ranks)."""
    late = missing_ranks(segment, epoch, steps)
    named = named_ranks(segment, late)
    waiting = segment.size - len(late)
    entry = last_entry(segment, rank)
    where = f"collective {entry.sequence}, {entry.call}" if entry else "a collective"
    return f"{waiting} rank(s) have waited {seconds:.0f} s in {where}, for {named}"
