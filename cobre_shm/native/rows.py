"""Reduction of blocks that lie in one buffer, in rank order.

For backends whose transport gathers the ranks' blocks: row r is rank r's.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from cobre_shm.arrays import writable_address
from cobre_shm.datatypes import ReduceOp
from cobre_shm.native.entry import function
from cobre_shm.native.reduce import reduce_with_numpy, reduction_address

__all__ = ["reduce_rows"]

_reduce = function("reduce_rows")


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
        place, source = writable_address(target), writable_address(rows)
        _reduce(reduction, place, source, target.nbytes, size, target.size, target.itemsize)
        return
    accumulator = rows[0]
    for row in rows[1:]:
        reduce_with_numpy(op, accumulator, row)
    target[...] = accumulator
