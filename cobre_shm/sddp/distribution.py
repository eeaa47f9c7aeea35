"""Who does which trajectory, and the exchange of what the ranks found."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.errors import AllocationFailed
from cobre_shm.sddp.errors import SolverError
from cobre_shm.sddp.sharing import share_failure

Floats = npt.NDArray[np.float64]
_Items = npt.NDArray[Any]


class Shares:
    """Contiguous blocks of work items per rank; ranks beyond the number of items have none.

    Attributes:
        mine: The items of this rank.
        counts: Number of items of each rank.
    """

    def __init__(self, items: int, comm: Communicator) -> None:
        base, rest = divmod(items, comm.size)
        self.counts: list[int] = [base + (rank < rest) for rank in range(comm.size)]
        start = sum(self.counts[: comm.rank])
        self.mine: range = range(start, start + self.counts[comm.rank])


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """Return zeros for as many items as a case asks for, which may be any number.

    Raises:
        AllocationFailed: The memory is not there.
    """
    try:
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError) as error:
        # The second where numpy cannot express the size.
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        raise AllocationFailed(
            nbytes, str(error), suggestion="Ask for fewer trajectories or scenarios"
        ) from error


def gather_items(local: _Items, shares: Shares, comm: Communicator) -> _Items:
    """Return the rows of all ranks in item order; ``local`` has one per item. Collective."""
    width = local.shape[1]
    counts = [count * width for count in shares.counts]
    everything = zeros((sum(shares.counts), width), local.dtype)
    if everything.size:
        displs = [sum(counts[:rank]) for rank in range(comm.size)]
        comm.allgatherv(local.reshape(-1), everything.reshape(-1), counts, displs)
    return everything


class ItemGather:
    """Repeated gathering of a fixed number of values per work item, in item order.

    The buffers live as long as the object, so that a gather allocates nothing and is checked once:
    between two problems, with cold caches, the checks take longer than the exchange. A rank that
    has no memory for them raises :class:`AllocationFailed`.

    Attributes:
        local: float64, (items of this rank, width); to be filled before a gather.
        everything: float64, (all items, width); valid after a gather until the next one.
        seconds: Time spent in gathers.
        nbytes: Bytes received by gathers.
    """

    def __init__(self, shares: Shares, width: int, comm: Communicator) -> None:
        self._comm = comm
        self._shares = shares
        self.local: Floats = zeros((len(shares.mine), width))
        self.everything: Floats = zeros((sum(shares.counts), width))
        self._send, self._recv = self.local.reshape(-1), self.everything.reshape(-1)
        counts = [count * width for count in shares.counts]
        self._run = comm.allgatherv_init(self._send, self._recv, counts)
        self.seconds: float = 0.0
        self.nbytes: int = 0

    def gather(self, failure: SolverError | None = None) -> Floats:
        """Exchange the rows of all ranks and return ``everything``. Collective.

        A rank that could not fill its rows takes part all the same, so that none waits for it.

        Args:
            failure: Why this rank could not fill its rows.

        Raises:
            SolverError: Some rank could not; the error of the first item concerned, on every
                rank.
        """
        if failure is not None:
            self._send[:] = np.nan
        start = time.perf_counter()
        if self._recv.size:
            self._run()
        self.seconds += time.perf_counter() - start
        self.nbytes += self._recv.nbytes
        missing = np.isnan(self.everything[:, 0])
        if missing.any():
            self._share_failure(int(missing.argmax()), failure)
        return self.everything

    def _share_failure(self, item: int, failure: SolverError | None) -> None:
        ends = np.cumsum(self._shares.counts)
        owner = int(np.searchsorted(ends, item, side="right"))
        if failure is None:
            failure = SolverError(f"item {item} has no number for a result")
        share_failure(failure.to_dict(), self._comm, owner)
