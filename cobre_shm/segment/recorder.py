"""Reading the flight recorder: what a rank called last, also after its death."""

from __future__ import annotations

from typing import NamedTuple

from cobre_shm import layout
from cobre_shm.datatypes import ReduceOp, tag_text
from cobre_shm.segment.segment import Segment

__all__ = ["Entry", "call_text", "last_entry"]


class Entry(NamedTuple):
    """One collective of one rank.

    Attributes:
        sequence: Its number in this communicator, from 1.
        call: Readable form of what was called.
        start_ns: Monotonic clock at the call.
        waited_ns: Time spent waiting, beyond spinning.
        end_ns: Monotonic clock at the return; 0: it has not returned.
    """

    sequence: int
    call: str
    start_ns: int
    waited_ns: int
    end_ns: int

    def __str__(self) -> str:
        state = "finished" if self.end_ns else "was inside"
        return f"{state} collective {self.sequence}, {self.call}"


def call_text(what: int, tag: int, count: int) -> str:
    """Return the readable form of three call words."""
    operation = layout.OPERATIONS.get(what & 0xFF, f"operation {what & 0xFF}")
    if what & 0xFF == layout.BARRIER:
        return operation
    parts = [f"{count} x {tag_text(tag)}"]
    if what & 0xFF == layout.ALLREDUCE:
        reduction = what >> 8 & 0xFF
        parts.append(ReduceOp(reduction).name if reduction in list(ReduceOp) else str(reduction))
    if what & 0xFF == layout.BROADCAST:
        parts.append(f"root {what >> 16 & 0xFFFF}")
    if what & 0xFF == layout.ALLGATHERV:
        parts.append(f"counts {what >> 32 & 0xFFFFFFFF:08x}")
    return f"{operation}({', '.join(parts)})"


def last_entry(segment: Segment, rank: int) -> Entry | None:
    """Return the last collective that ``rank`` began, or None."""
    words = segment.words
    recorded = words.load(segment.control(rank) + layout.RECORDED)  # <SYNC recorded>
    if recorded <= 0:
        return None
    ring = layout.recorder_offset(segment.size) + rank * layout.RECORDER_BYTES
    entry = ring + (recorded - 1) % layout.RECORDER_ENTRIES * layout.ENTRY_BYTES
    call = [words.load(entry + layout.ENTRY_CALL + 8 * i) for i in range(layout.CALL_WORDS)]
    return Entry(
        words.load(entry + layout.ENTRY_SEQUENCE),
        call_text(*call),
        words.load(entry + layout.ENTRY_START),
        words.load(entry + layout.ENTRY_WAITED),
        words.load(entry + layout.ENTRY_END),
    )
