"""Ranks as threads: enough of a communicator to run the workload on several of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from cobre_shm.datatypes import ReduceOp
from cobre_shm.heap import HeapRegion
from cobre_shm.local import LocalCommunicator

_OPERATIONS = {
    ReduceOp.SUM: np.add,
    ReduceOp.PROD: np.multiply,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
}


# A rank that is slow to hear of the error is not one that waits in vain.
_PATIENCE_SECONDS = 5.0


class _Group:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size


class ThreadCommunicator:
    """One rank of a group of threads."""

    backend = "threads"
    is_leader = True

    def __init__(self, group: _Group, rank: int) -> None:
        self._group, self.rank, self.size = group, rank, group.size

    def _exchange(self, value: Any) -> list[Any]:
        self._group.slots[self.rank] = value
        self._group.barrier.wait()
        values = list(self._group.slots)
        self._group.barrier.wait()
        return values

    def allgatherv(self, send, recv=None, counts=None, displs=None):
        blocks = self._exchange(send.copy())
        if recv is None:
            return np.concatenate(blocks)
        for block, count, start in zip(blocks, counts, displs, strict=True):
            assert block.size == count
            recv[start : start + count] = block
        return recv

    def allgatherv_init(self, send, recv, counts):
        displs = np.cumsum(counts) - counts
        return lambda: self.allgatherv(send, recv, counts, displs)

    def allreduce(self, send, recv=None, op=ReduceOp.SUM):
        blocks = self._exchange(send.copy())
        result = blocks[0]
        for block in blocks[1:]:
            result = _OPERATIONS[op](result, block)
        return result

    def broadcast(self, buf, root=0):
        buf[...] = self._exchange(buf.copy())[root]
        return buf

    def barrier(self) -> None:
        self._group.barrier.wait()

    def create_shared_region(self, shape, dtype=np.float64):
        return HeapRegion(shape, np.dtype(dtype))

    def split_local(self):
        return LocalCommunicator()


def run_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Run ``work(comm)`` on every rank; return what each returned, or the error it raised."""
    group = _Group(size)
    outcomes: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadCommunicator(group, rank))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(_PATIENCE_SECONDS)
        # Whoever still waits for a rank that has failed waits in vain.
        if any(isinstance(outcome, Exception) for outcome in outcomes):
            group.barrier.abort()
    return outcomes
