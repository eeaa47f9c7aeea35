"""The collectives on two levels: shared memory within a node, MPI between the nodes' leaders.

Only for ranks that are placed node by node (see nodes.py). The bits are those of the flat
collectives, because an element is still reduced in the order of all ranks:

* Integers wrap, so any grouping gives the same bits. The smallest and largest take the later of
  two equal operands and the first NaN, in any grouping of consecutive ranks. These are reduced
  within each node, then between the leaders.
* Sums and products of floats: (x0 + x1) + (x2 + x3) is not ((x0 + x1) + x2) + x3. Small ones are
  gathered on two levels and reduced by everybody. Large ones go along a *chain*: a node's leader
  takes what the nodes before it have added up, adds its own ranks one by one, and passes it on,
  piece after piece, so that all nodes work at once. The last one's result goes to all.

A chain sends the payload once over each link, and once more as the broadcast of the result; every
node would have to send all its ranks' operands to do without it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cobre_net.mpi.flat import BYTE, Flat
from cobre_shm.arrays import bytes_of
from cobre_shm.communicator import Array
from cobre_shm.datatypes import ReduceOp
from cobre_shm.native.rows import reduce_rows
from cobre_shm.shm import ShmCommunicator

__all__ = ["TwoLevel"]

# What goes from node to node at once: large beside the latency of a network, small beside caches.
CHAIN_BYTES = 1 << 20
_TAG = 1


class TwoLevel:
    """The same collectives as :class:`Flat`.

    Args:
        flat: All ranks.
        group: The ranks of this node.
        leaders: The nodes' leaders, in the order of the nodes; None on a follower.
        firsts: The first rank of each node.
    """

    def __init__(
        self, flat: Flat, group: ShmCommunicator, leaders: Flat | None, firsts: list[int]
    ) -> None:
        self.size = flat.size
        self.small_bytes = flat.small_bytes
        self._group = group
        self._leaders = leaders
        self._edges = np.array([*firsts, flat.size], np.int64)
        self._node = int(np.searchsorted(self._edges, flat.rank, "right")) - 1
        self._scratch = np.empty(0, np.uint8)

    def barrier(self) -> None:
        """See :class:`Flat`."""
        self._group.barrier()
        if self._leaders is not None:
            self._leaders.barrier()
        self._group.barrier()

    def broadcast(self, buf: Array, root: int) -> None:
        """See :class:`Flat`."""
        node = int(np.searchsorted(self._edges, root, "right")) - 1
        if node == self._node:
            self._group.broadcast(buf, root - int(self._edges[node]))
        if self._leaders is not None:
            self._leaders.broadcast(buf, node)
        if node != self._node:
            self._group.broadcast(buf, 0)

    def gather_equal(self, send: Array, recv: Array) -> None:
        """See :class:`Flat`."""
        counts = np.full(self.size, send.size)
        self.allgatherv(send, recv, counts, np.arange(self.size) * send.size)

    def allgatherv(
        self, send: Array, recv: Array, counts: NDArray[np.int64], displs: NDArray[np.int64]
    ) -> None:
        """See :class:`Flat`: within the nodes, between the leaders, and to the followers."""
        lengths = counts * send.itemsize
        ends = np.cumsum(lengths)
        starts = ends - lengths
        total, target = int(ends[-1]), bytes_of(recv)
        is_packed = bool((displs * send.itemsize == starts).all())
        packed = target[:total] if is_packed else self._room(total)
        edges = np.append(starts, total)[self._edges]
        first, behind = int(edges[self._node]), int(edges[self._node + 1])
        mine = slice(int(self._edges[self._node]), int(self._edges[self._node + 1]))
        own = packed[first:behind]
        self._group.allgatherv(bytes_of(send), own, lengths[mine], starts[mine] - first)
        if self._leaders is not None:
            self._leaders.allgatherv(own, packed, np.diff(edges), edges[:-1])
        for others in (packed[:first], packed[behind:]):
            if others.size:
                self._group.broadcast(others, 0)
        if not is_packed:
            for rank in range(self.size):
                start = int(displs[rank]) * send.itemsize
                block = packed[starts[rank] : ends[rank]]
                target[start : start + block.size] = block

    def allreduce(self, send: Array, recv: Array, op: ReduceOp) -> None:
        """See :class:`Flat`."""
        source, target = send.reshape(-1), recv.reshape(-1)
        if send.dtype.kind in "iub" or op in (ReduceOp.MIN, ReduceOp.MAX):
            self._group.allreduce(source, target, op)
            if self._leaders is not None:
                self._leaders.allreduce(target, target, op)
            self._group.broadcast(target, 0)
        elif source.nbytes * self.size <= self.small_bytes:
            room = self._room(self.size * source.nbytes).view(source.dtype)
            self.gather_equal(source, room)
            reduce_rows(op, room.reshape(self.size, -1), target)
        else:
            self._reduce_along_chain(source, target, op)

    def _reduce_along_chain(self, source: Array, target: Array, op: ReduceOp) -> None:
        step = max(1, CHAIN_BYTES // source.itemsize)
        height = self._group.size + 2
        counts = np.empty(self._group.size, np.int64)
        is_last = self._node == len(self._edges) - 2
        for start in range(0, source.size, step):
            part = source[start : start + step]
            counts[:] = part.size
            room = self._room(height * part.nbytes).view(source.dtype).reshape(height, -1)
            # What this node passes on, what comes from the node before, and what its ranks have.
            passed, rows = room[0], room[1:]
            self._group.allgatherv(part, rows[1:], counts)
            if self._leaders is None:
                continue
            comm = self._leaders.comm
            if self._node > 0:
                comm.Recv([bytes_of(rows[0]), BYTE], self._node - 1, _TAG)
            result = target[start : start + step] if is_last else passed
            reduce_rows(op, rows if self._node > 0 else rows[1:], result)
            if not is_last:
                comm.Send([bytes_of(result), BYTE], self._node + 1, _TAG)
        if self._leaders is not None:
            self._leaders.broadcast(target, len(self._edges) - 2)
        self._group.broadcast(target, 0)

    def _room(self, nbytes: int) -> NDArray[np.uint8]:
        if self._scratch.size < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch[:nbytes]
