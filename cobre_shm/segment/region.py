"""Shared regions: one copy for all ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from cobre_shm import layout
from cobre_shm.arrays import bytes_of_shape
from cobre_shm.communicator import Array, SharedRegion
from cobre_shm.errors import AllocationFailed
from cobre_shm.failpoints import reach
from cobre_shm.member import Member
from cobre_shm.segment.common import MemorySource
from cobre_shm.segment.libc import map_shared
from cobre_shm.segment.mapping import Mapping, array_at
from cobre_shm.segment.pages import make_read_only, populate, share_of

__all__ = ["ShmRegion"]


class ShmRegion(SharedRegion):
    """A region that all ranks have mapped, or none (see ``common.py``).

    Its pages are allocated, and lie near the rank that allocated them: of ``size`` equal blocks
    rank r has block r. The mapping goes with the last view of ``array``.

    Args:
        comm: The group.
        source: Where its memory comes from.
        shape: Of the array.
        dtype: Of its elements.
        barrier_of: Returns a barrier of the group that is the call with a code of ``layout``.

    Raises:
        AllocationFailed: On every rank.
    """

    def __init__(
        self,
        comm: Member,
        source: MemorySource,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        barrier_of: Callable[[int], Callable[[], None]],
    ) -> None:
        self._comm = comm
        self._source = source
        self._fence, self._freeze = barrier_of(layout.FENCE), barrier_of(layout.FREEZE)
        self._shape, self._dtype = shape, dtype
        self._nbytes = max(1, bytes_of_shape(shape, dtype))
        self._mapping: Mapping | None = None
        try:
            source.share(self._nbytes, self._map)
        except BaseException:
            self._unmap()
            raise
        self._show(writable=True)

    def _map(self, fd: int) -> None:
        self._mapping = Mapping(self._nbytes)
        address, pages = self._mapping.address, self._source.pages
        map_shared(fd, self._nbytes, at=address)
        pages.apply(address, self._nbytes, spread=True)
        first, last = share_of(self._nbytes, self._comm.rank, self._comm.size)
        pages.collapse(fd, first, address + first, last - first)
        populate(fd, first, address + first, last - first)

    def _unmap(self) -> None:
        # Not by forgetting it: who keeps the error keeps this object.
        if self._mapping is not None:
            self._mapping.release()

    def _show(self, *, writable: bool) -> None:
        assert self._mapping is not None
        address = self._mapping.address
        self.array: Array = array_at(
            address, self._shape, self._dtype, self._mapping, writable=writable
        )

    def fence(self) -> None:
        """See :meth:`SharedRegion.fence`: a barrier publishes and observes everything."""
        self._fence()

    def freeze(self) -> None:
        """See :meth:`SharedRegion.freeze`."""
        with self._comm._in_one_call():
            self._freeze()
            error = None
            if not self._comm.is_leader and self._mapping is not None:
                try:
                    make_read_only(self._mapping.address, self._nbytes)
                except OSError as cause:
                    error = AllocationFailed(self._nbytes, str(cause))
                    error.__cause__ = cause
                else:
                    self._show(writable=False)
            self._freeze()
            if error is not None:
                raise error

    def close(self) -> None:
        """See :meth:`SharedRegion.close`."""
        if self._mapping is not None:
            reach("region_close", self._comm.rank)
        self.array = np.empty(0, dtype=self._dtype)
        self._mapping = None
        with suppress(OSError):
            self._source.remove_names()
