"""The poison word: the first failure of a group, seen by every wait.

Written at most once, under the control lock, by whoever notices first: a rank that sees a peer
dead or gives up waiting, a rank that aborts or is interrupted, the launcher. Every wait reads it
in each step beyond spinning. Zero means healthy.
"""

from __future__ import annotations

from typing import NamedTuple

from cobre_shm import layout
from cobre_shm.segment.segment import Segment

__all__ = ["Poison", "poison", "read_poison"]


_KINDS = range(layout.DIED, layout.DAMAGED + 1)


class Poison(NamedTuple):
    """What the poison word says.

    Attributes:
        kind: One of the kinds in ``cobre_shm.layout``.
        rank: The rank that failed, or gave up, or was missed.
        value: Exit code of an abort, signal of a stop, pid of a conflict; otherwise 0.
    """

    kind: int
    rank: int
    value: int


def poison(segment: Segment, kind: int, rank: int, value: int = 0) -> Poison:
    """Fail the group, unless it has failed already; return the first failure.

    Everybody who sleeps is woken.
    """
    with segment.control_lock():
        first = read_poison(segment)
        if first is None:
            first = Poison(kind, rank, value)
            word = layout.pack_poison(*first)
            signed = word - (1 << 64) if word >> 63 else word
            segment.words.store(layout.HEADER_POISON, signed)  # <SYNC poison>
    segment.wake_all()
    return first


def read_poison(segment: Segment) -> Poison | None:
    """Return the first failure of the group, or None.

    Whoever uses the rank as an index may: a word that nobody of the group can have written comes
    back as DAMAGED.
    """
    word = segment.words.load(layout.HEADER_POISON)  # <SYNC poison>
    if not word:
        return None
    first = Poison(*layout.unpack_poison(word))
    if first.kind not in _KINDS or first.rank >= segment.size:
        return Poison(layout.DAMAGED, 0, 0)
    return first
