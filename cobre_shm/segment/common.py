"""Memory that all ranks of a group have mapped, or none has.

Rank 0 makes an object whose name all ranks can derive or, where that does not fit and the group
may, memory without a name that they open through rank 0's descriptor (see ``unnamed.py``). Each
rank allocates a share of it, so that its pages lie on the memory node of that rank, and the time
that clearing them takes is divided. Two allreduces of four words, in each of which everybody says
whether it has failed:

1. after rank 0 has made the object; it says there where the memory is, all zeros for by its name;
2. after all have opened it, allocated their shares and mapped it. Nobody touches it before. Until
   then rank 0 keeps its descriptor, and the name.

So all ranks raise or none does. Nothing keeps the memory but the mappings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple

import numpy as np

from cobre_shm import layout
from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed
from cobre_shm.failpoints import reach
from cobre_shm.segment.posix import (
    allocation_failed,
    check_room,
    create_object,
    open_object,
    remove_object,
)
from cobre_shm.segment.unnamed import Whereabouts, check_available, create_unnamed, open_unnamed

__all__ = ["CommonMemory"]

# No process has pid 0.
_BY_NAME = Whereabouts(0, 0, 0)


class CommonMemory:
    """Makes an object and has every rank map it. Construction is collective.

    The object's name exists until every rank has mapped it. If that fails in any way, every rank
    that survives removes it; the launcher removes what is left when nobody survives.

    Args:
        comm: The group.
        name: POSIX name that nobody else uses.
        nbytes: How much memory, at least one byte.
        show: Maps the memory behind a descriptor, which it must not keep; raises OSError if it
            cannot.
        may_be_unnamed: Whether memory without a name serves where no POSIX object fits.

    Raises:
        AllocationFailed: The memory is not there, or a rank could not map it; on every rank.
            What ``show`` has mapped is the caller's to undo.
    """

    def __init__(
        self,
        comm: Communicator,
        name: str,
        nbytes: int,
        show: Callable[[int], None],
        *,
        may_be_unnamed: bool = False,
    ) -> None:
        self._comm, self._name, self._nbytes = comm, name, nbytes
        self._may_be_unnamed = may_be_unnamed
        self._fd = -1
        try:
            error = self._agree(show)
        finally:
            # Also where the group failed: who is left cleans up after whoever is not.
            self.remove_name()
            if self._fd >= 0:
                os.close(self._fd)
        if error is not None:
            raise error

    def remove_name(self) -> None:
        """Remove the name, if it is still there. The system may refuse: then call it again."""
        if self._name:
            with suppress(OSError):
                remove_object(self._name)
                self._name = ""

    def _agree(self, show: Callable[[int], None]) -> AllocationFailed | None:
        """Allocate and map on all ranks; the error, on all ranks, if any of them cannot."""
        comm = self._comm
        error, where = self._create() if comm.rank == 0 else (None, _BY_NAME)
        reach("region_create", comm.rank)
        failed, where = self._tell(error, where)
        if failed:
            return error or self._refused()
        error = self._try(lambda: self._take_part(where, show))
        reach("region_mapped", comm.rank)
        failed, _ = self._tell(error, _BY_NAME)
        # Every rank: rank 0 may be killed before it comes to this line.
        self.remove_name()
        return error or self._refused() if failed else None

    def _create(self) -> tuple[AllocationFailed | None, Whereabouts]:
        error = self._try(self._create_named)
        if error is None or not self._may_be_unnamed:
            return error, _BY_NAME
        error = self._try(self._create_unnamed)
        return error, _BY_NAME if error is not None else Whereabouts.of(self._fd)

    def _create_named(self) -> None:
        check_room(self._nbytes)
        check_available(self._nbytes)
        self._fd = create_object(self._name, self._nbytes, allocate=False)

    def _create_unnamed(self) -> None:
        self._fd = create_unnamed(self._name, self._nbytes, allocate=False)

    def _take_part(self, where: Whereabouts, show: Callable[[int], None]) -> None:
        if self._comm.rank != 0:
            if where == _BY_NAME:
                self._fd, _ = open_object(self._name, self._nbytes)
            else:
                self._fd = open_unnamed(where, self._nbytes)
        first, last = self._share(self._comm.rank), self._share(self._comm.rank + 1)
        if last > first:
            try:
                os.posix_fallocate(self._fd, first, last - first)
            except OSError as error:
                raise allocation_failed(self._nbytes, error) from error
        show(self._fd)

    def _share(self, rank: int) -> int:
        """Where the share of ``rank`` begins: equal blocks of whole pages."""
        pages = -(-self._nbytes // layout.PAGE_BYTES)
        return min(self._nbytes, pages * rank // self._comm.size * layout.PAGE_BYTES)

    def _try(self, make: Callable[[], None]) -> AllocationFailed | None:
        try:
            make()
        except AllocationFailed as error:
            return error
        except (OSError, OverflowError, ValueError) as error:
            failed = AllocationFailed(self._nbytes, str(error))
            failed.__cause__ = error
            return failed
        return None

    def _tell(self, error: AllocationFailed | None, where: Whereabouts) -> tuple[bool, Whereabouts]:
        """Return whether anybody failed, and what the one who knows says of the memory."""
        words = np.array([error is not None, *astuple(where)], dtype=np.int64)
        failed, *told = self._comm.allreduce(words, op=ReduceOp.MAX).tolist()
        return bool(failed), Whereabouts(*told)

    def _refused(self) -> AllocationFailed:
        return AllocationFailed(self._nbytes, "refused on another rank")
