"""A collective in words, as errors and tools show it."""

from __future__ import annotations

from cobre_shm import layout
from cobre_shm.datatypes import ReduceOp, tag_text

__all__ = ["WITHOUT_ELEMENTS", "call_text", "words_text"]

WITHOUT_ELEMENTS = (layout.BARRIER, layout.SPLIT, layout.ARRAY, layout.FENCE, layout.FREEZE)


def call_text(operation: int, reduction: int, root: int, hashed: int, tag: int, count: int) -> str:
    """Return the readable form of a call; what its operation has no use for is not shown.

    Args:
        operation: One of ``cobre_shm.layout.OPERATIONS``.
        reduction: Of an allreduce.
        root: Of a broadcast.
        hashed: Of the counts of an allgatherv, of the shape of a region: they have any length; of
            an allreduce_shared whether its result is new.
        tag: Of the element type.
        count: Number of elements.
    """
    name = layout.OPERATIONS.get(operation, f"operation {operation}")
    if operation in WITHOUT_ELEMENTS:
        return name
    parts = [f"{count} x {tag_text(tag)}"]
    if operation == layout.ALLREDUCE_SHARED and hashed == layout.NEW_RESULT:
        parts.append("a new result")
    elif operation in (layout.ALLREDUCE, layout.ALLREDUCE_SHARED):
        parts.append(ReduceOp(reduction).name if reduction in list(ReduceOp) else str(reduction))
    elif operation == layout.BROADCAST:
        parts.append(f"root {root}")
    elif operation == layout.ALLGATHERV:
        parts.append(f"counts {hashed:08x}")
    elif operation == layout.REGION:
        parts.append(f"shape {hashed:08x}")
    return f"{name}({', '.join(parts)})"


def words_text(what: int, tag: int, count: int) -> str:
    """Return the readable form of three call words (see ``cobre_shm.layout``)."""
    return call_text(
        what & 0xFF, what >> 8 & 0xFF, what >> 16 & 0xFFFF, what >> 32 & 0xFFFFFFFF, tag, count
    )
