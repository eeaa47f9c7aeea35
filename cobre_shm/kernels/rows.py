"""Reduction of blocks that lie in one buffer, in rank order.

For backends whose transport gathers the ranks' blocks: row r is rank r's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels.copying import call_reduction, copy_bytes
from cobre_shm.kernels.jit import compiling, entry_point
from cobre_shm.kernels.reduce import reduce_with_numpy, reduction_address

__all__ = ["address_of", "reduce_at", "reduce_rows"]

# The part of the accumulator that stays in the first-level cache while the rows stream by.
_PART_BYTES = 8192

with compiling():

    @entry_point("void(int64, int64, int64, int64, int64, int64, int64)")
    def _reduce(
        reduction: int,
        target: int,
        rows: int,
        row_bytes: int,
        size: int,
        count: int,
        item_bytes: int,
    ) -> None:
        part = _PART_BYTES // item_bytes
        first = 0
        while first < count:
            n = min(part, count - first)
            start = first * item_bytes
            copy_bytes(target + start, rows + start, n * item_bytes)
            for row in range(1, size):
                call_reduction(reduction, target + start, rows + row * row_bytes + start, n)
            first += n


def reduce_rows(op: ReduceOp, rows: NDArray[Any], target: NDArray[Any]) -> None:
    """Write ``rows[0] op rows[1] op ...`` to ``target``, strictly in this order.

    Args:
        op: The reduction.
        rows: Shape (ranks, n), C-contiguous. Unspecified afterwards where numpy reduces.
        target: n elements of the same dtype, contiguous, outside ``rows``.
    """
    size = len(rows)
    reduction = reduction_address(rows.dtype, op)
    if reduction:
        reduce_at(reduction, address_of(rows), size, target)
        return
    accumulator = rows[0]
    with np.errstate(all="ignore"):
        for row in rows[1:]:
            reduce_with_numpy(op, accumulator, row)
    target[...] = accumulator


def reduce_at(reduction: int, rows: int, size: int, target: Any) -> None:
    """The same for a kernel of ``reduction_address`` and rows at an address, of ``target``'s size.

    Without any look at the arguments: for callers that have made sure of them.
    """
    _reduce(reduction, address_of(target), rows, target.nbytes, size, target.size, target.itemsize)


def address_of(array: Any) -> int:
    """Return the address of a writable, contiguous array that exports a buffer."""
    # A fifth of the time that __array_interface__ and array.ctypes take.
    return ctypes.addressof(ctypes.c_char.from_buffer(array))
