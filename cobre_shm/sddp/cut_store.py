"""Memory for the cuts of a training: one copy per machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator

Floats = npt.NDArray[np.float64]

_FIRST_BYTES = 64 * 1024


class CutStore:
    """Keeps batches of cuts that every rank has, in memory that its node has once.

    The leader of a node writes, all read. What it has written everybody sees behind the next
    collective in which all ranks wait for all: in a training, the end of the iteration.

    Args:
        comm: The communicator.
        width: Numbers per cut.
    """

    def __init__(self, comm: Communicator, width: int) -> None:
        self._comm = comm
        self._rows: Floats = np.zeros((0, width))
        self._used = 0
        self._total = 0

    def keep(self, batch: Floats) -> Floats:
        """Return a lasting, read-only copy of ``batch``: (cuts, width). Collective.

        Raises:
            AllocationFailed: There is no memory for more; on every rank.
        """
        count, width = batch.shape
        if self._used + count > len(self._rows):
            # By half of what there is, so that there are few regions.
            rows = max(count, self._total // 2, _FIRST_BYTES // (8 * width))
            with self._comm.create_shared_region((rows, width)) as region:
                self._rows = region.array
            self._used = 0
        kept = self._rows[self._used : self._used + count]
        if self._comm.is_leader:
            kept[:] = batch
        self._used += count
        self._total += count
        kept.flags.writeable = False
        return kept
