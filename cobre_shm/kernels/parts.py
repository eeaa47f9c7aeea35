"""One rank's part of a reduce-scatter: which elements, and their reduction in rank order."""

from __future__ import annotations

from typing import Any

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.copying import call_reduction, copy_bytes, copy_streaming, move_bytes
from cobre_shm.kernels.failing import REDUCE, fail_at
from cobre_shm.kernels.jit import inlined
from cobre_shm.kernels.switches import PIECE_BYTES

__all__ = ["part_start", "reduce_part"]


@inlined
def part_start(elements: int, item_bytes: int, size: int, part: int) -> int:
    """First element of a rank's part of ``elements``; parts start on cache lines."""
    per_line = max(1, layout.LINE_BYTES // item_bytes)
    lines = (elements + per_line - 1) // per_line
    return min(elements, (lines * part // size) * per_line)


@inlined
def reduce_part(
    ctx: Any,
    result: int,
    recv: int,
    first: int,
    own: int,
    count: int,
    item_bytes: int,
    reduction: int,
    streams: bool,
) -> None:
    """Reduce ``count`` elements of the own part to ``result``, and copy them to ``recv`` if not 0.

    The peers' values are in their slots, rank 0's at ``first``; the own ones are at ``own``.
    """
    size = ctx[context.SIZE]
    rank = ctx[context.RANK]
    stride = ctx[context.RING_BYTES]
    per_piece = PIECE_BYTES // item_bytes
    done = 0
    streams_in = ctx[context.STREAMS_IN] != 0
    while done < count:
        elements = min(per_piece, count - done)
        at = done * item_bytes
        place = ctx[context.SCRATCH] if streams_in else result + at
        a = own + at if rank == 0 else first + at
        if size == 1:
            copy_bytes(place, a, elements * item_bytes)
        for other in range(1, size):
            b = own + at if other == rank else first + other * stride + at
            call_reduction(reduction, place, a, b, elements)
            fail_at(ctx, REDUCE)
            a = place
        if streams_in:
            copy_streaming(result + at, place, elements * item_bytes)
        if recv != 0:
            move_bytes(recv + at, place, elements * item_bytes, streams)
        done += elements
