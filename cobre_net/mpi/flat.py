"""The collectives on one MPI communicator, without checks of arguments.

Everything travels as bytes, so that every dtype can and MPI never converts. Reductions are done
here, strictly in rank order, by the kernels of the other backends; MPI only moves the operands:

* small: one Allgather, and every rank reduces everything;
* large: Alltoall of blocks, rank r reduces block r, Allgather of the blocks. This is the
  reduce-scatter and all-gather of Rabenseifner (2004) without its halving, which would change the
  order. Each rank sends and receives about twice the payload, whatever the number of ranks.

Either way an element is reduced by one loop over the ranks 0, 1, ..., size-1, so the bits do not
depend on which way was taken.

Counts of MPI before version 4 are 32-bit, and not all libraries have the newer calls. So nothing
larger than ``piece_bytes`` goes in one call: broadcasts and reductions go in pieces, and an
allgatherv beyond it is one broadcast from each rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobre_net.mpi.library import MPI
from cobre_shm.arrays import bytes_of
from cobre_shm.communicator import Array
from cobre_shm.datatypes import ReduceOp
from cobre_shm.native.rows import reduce_rows

__all__ = ["Flat", "native_operation"]

BYTE = MPI.BYTE
# The largest message of one call: below 2**31, so that its end has a 32-bit displacement too.
PIECE_BYTES = 1 << 30
# Of an allreduce, so that its buffers stay small: operands of that many bytes go at once.
REDUCE_BYTES = 16 << 20
# Up to this size times the ranks one Allgather is faster than three steps; see bench/mpi_cost.py.
SMALL_BYTES = 512 << 10

_OPERATIONS = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.PROD: MPI.PROD,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
}
_TYPES = {
    np.dtype(np.int8): MPI.INT8_T,
    np.dtype(np.int16): MPI.INT16_T,
    np.dtype(np.int32): MPI.INT32_T,
    np.dtype(np.int64): MPI.INT64_T,
    np.dtype(np.uint8): MPI.UINT8_T,
    np.dtype(np.uint16): MPI.UINT16_T,
    np.dtype(np.uint32): MPI.UINT32_T,
    np.dtype(np.uint64): MPI.UINT64_T,
    np.dtype(np.float32): MPI.FLOAT,
    np.dtype(np.float64): MPI.DOUBLE,
}


def native_operation(
    dtype: np.dtype[Any], op: ReduceOp, *, deterministic: bool
) -> tuple[Any, Any] | None:
    """Return the datatype and operation with which MPI itself may reduce, or None.

    With bits that must not depend on the order: the smallest and the largest of integers. Without
    that demand sums and products too; but not the smallest and largest of floats, for what
    MPI does with NaN is not defined.
    """
    datatype = _TYPES.get(dtype)
    is_extreme = op in (ReduceOp.MIN, ReduceOp.MAX)
    if datatype is None or (dtype.kind == "f" if is_extreme else deterministic):
        return None
    return datatype, _OPERATIONS[op]


class Flat:
    """Collectives of all ranks of ``comm`` by MPI alone.

    Args:
        comm: Of mpi4py; ours alone.
        deterministic: See :class:`MpiConfig`.

    Attributes:
        piece_bytes: The largest message of one call of MPI.
        small_bytes: Payload times ranks up to which a reduction takes one step.
        reduce_bytes: Payload that a reduction handles at once.
    """

    def __init__(self, comm: Any, *, deterministic: bool) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.deterministic = deterministic
        self.piece_bytes = PIECE_BYTES
        self.small_bytes = SMALL_BYTES
        self.reduce_bytes = REDUCE_BYTES
        self._scratch = np.empty(0, np.uint8)

    def barrier(self) -> None:
        """Return after all have entered."""
        self.comm.Barrier()

    def broadcast(self, buf: Array, root: int) -> None:
        """Copy ``root``'s ``buf`` to all."""
        if buf.nbytes <= self.piece_bytes:
            self.comm.Bcast([bytes_of(buf), BYTE], root)
            return
        memory = bytes_of(buf)
        for start in range(0, memory.size, self.piece_bytes):
            self.comm.Bcast([memory[start : start + self.piece_bytes], BYTE], root)

    def gather_equal(self, send: Array, recv: Array) -> None:
        """Copy rank r's ``send`` to the r-th part of ``recv``; the same size on all ranks."""
        self.comm.Allgather([bytes_of(send), BYTE], [bytes_of(recv), BYTE])

    def allgatherv(
        self, send: Array, recv: Array, counts: NDArray[np.int64], displs: NDArray[np.int64]
    ) -> None:
        """Copy rank r's ``send`` to ``recv[displs[r]]`` and on. ``send`` may lie there already."""
        item_bytes = send.itemsize
        lengths, starts = counts * item_bytes, displs * item_bytes
        source, target = bytes_of(send), bytes_of(recv)
        in_place = send.size > 0 and np.may_share_memory(send, recv)
        # All ranks must decide alike, and their displacements may differ: only counts decide.
        if int(lengths.sum()) <= self.piece_bytes:
            if int(starts.max()) <= self.piece_bytes:
                message = [target, (lengths, starts), BYTE]
                self.comm.Allgatherv(MPI.IN_PLACE if in_place else [source, BYTE], message)
                return
            packed = self._room(int(lengths.sum()))
            ends = np.cumsum(lengths)
            self.comm.Allgatherv([source, BYTE], [packed, (lengths, ends - lengths), BYTE])
            for rank in range(self.size):
                start = int(starts[rank])
                block = packed[ends[rank] - lengths[rank] : ends[rank]]
                target[start : start + block.size] = block
            return
        start = int(starts[self.rank])
        if not in_place:
            target[start : start + source.size] = source
        for root in range(self.size):
            start, length = int(starts[root]), int(lengths[root])
            if length:
                self.broadcast(target[start : start + length], root)

    def allreduce(self, send: Array, recv: Array, op: ReduceOp) -> None:
        """Reduce element by element; ``recv`` may be ``send``."""
        native = native_operation(send.dtype, op, deterministic=self.deterministic)
        source, target = send.reshape(-1), recv.reshape(-1)
        if source.nbytes * self.size <= self.small_bytes:
            if native is not None:
                self._reduce_by_mpi(source, target, *native)
            else:
                self._reduce_gathered(source, target, op)
            return
        step = max(1, (self.piece_bytes if native else self.reduce_bytes) // source.itemsize)
        for start in range(0, source.size, step):
            part, result = source[start : start + step], target[start : start + step]
            if native is not None:
                self._reduce_by_mpi(part, result, *native)
            else:
                self._reduce_scattered(part, result, op)

    def _reduce_by_mpi(self, source: Array, target: Array, datatype: Any, operation: Any) -> None:
        in_place = source.ctypes.data == target.ctypes.data
        message = MPI.IN_PLACE if in_place else [source, datatype]
        self.comm.Allreduce(message, [target, datatype], operation)

    def _reduce_gathered(self, source: Array, target: Array, op: ReduceOp) -> None:
        nbytes = source.nbytes
        room = self._room(self.size * nbytes)
        self.comm.Allgather([bytes_of(source), BYTE], [room, BYTE])
        reduce_rows(op, room.view(source.dtype).reshape(self.size, -1), target)

    def _reduce_scattered(self, source: Array, target: Array, op: ReduceOp) -> None:
        size, item_bytes = self.size, source.itemsize
        edges = np.arange(size + 1) * source.size // size
        lengths, starts = np.diff(edges) * item_bytes, edges[:-1] * item_bytes
        own = slice(int(edges[self.rank]), int(edges[self.rank + 1]))
        count = own.stop - own.start
        room = self._room(size * count * item_bytes)
        row = np.full(size, count * item_bytes)
        self.comm.Alltoallv(
            [bytes_of(source), (lengths, starts), BYTE],
            [room, (row, np.arange(size) * count * item_bytes), BYTE],
        )
        if count:
            reduce_rows(op, room.view(source.dtype).reshape(size, count), target[own])
        self.comm.Allgatherv(MPI.IN_PLACE, [bytes_of(target), (lengths, starts), BYTE])

    def _room(self, nbytes: int) -> NDArray[np.uint8]:
        if self._scratch.size < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch[:nbytes]
