"""Reduction of blocks that lie in one buffer, in rank order: row r is rank r's."""

from __future__ import annotations

from cobre_shm.kernels.copying import call_reduction, copy_bytes
from cobre_shm.kernels.jit import inlined

__all__ = ["reduce_rows"]

# The part of the accumulator that stays in the first-level cache while the rows stream by.
_PART_BYTES = 8192


@inlined
def reduce_rows(
    reduction: int,
    target: int,
    rows: int,
    row_bytes: int,
    size: int,
    count: int,
    item_bytes: int,
) -> int:
    """Reduce ``size`` rows of ``count`` elements, ``row_bytes`` apart, to ``target``."""
    part = _PART_BYTES // item_bytes
    first = 0
    while first < count:
        n = min(part, count - first)
        start = first * item_bytes
        row = rows + start
        if size == 1:
            copy_bytes(target + start, row, n * item_bytes)
        else:
            call_reduction(reduction, target + start, row, row + row_bytes, n)
        for other in range(2, size):
            call_reduction(reduction, target + start, target + start, row + other * row_bytes, n)
        first += n
    return 0
