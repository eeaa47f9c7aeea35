"""Memory that all ranks of a group have mapped, or none has.

Rank 0 makes an object whose name all ranks can derive or, where that does not fit and the group
may, memory without a name that they open through rank 0's descriptor (see ``unnamed.py``). Each
rank allocates a share of it, so that its pages lie on the memory node of that rank, and the time
that clearing them takes is divided. Two allreduces of four words, in each of which everybody says
whether it has failed:

1. after rank 0 has made the object; it says there where the memory is, all zeros for by its name;
2. after all have opened it, mapped it and allocated their shares. Nobody touches it before. Until
   then rank 0 keeps its descriptor, and the name.

So all ranks raise or none does. Nothing keeps the memory but the mappings.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed
from cobre_shm.failpoints import reach
from cobre_shm.segment.pages import PagePolicy
from cobre_shm.segment.posix import (
    allocation_failed,
    check_room,
    create_object,
    open_object,
    remove_object,
)
from cobre_shm.segment.unnamed import Whereabouts, check_available, create_unnamed, open_unnamed

__all__ = ["MemorySource", "Show"]

# Maps the memory behind a descriptor, which it must not keep, and allocates this rank's share.
Show = Callable[[int], None]

# No process has pid 0.
_BY_NAME = Whereabouts(0, 0, 0)


class MemorySource:
    """Where the ranks of a group get the memory that they share.

    Args:
        comm: The group.
        prefix: Of POSIX names that nobody else uses, the same on all ranks.
        may_be_unnamed: Whether memory without a name serves where no POSIX object fits.
        pages: What pages it should have.
    """

    def __init__(
        self,
        comm: Communicator,
        prefix: str,
        *,
        may_be_unnamed: bool = False,
        pages: PagePolicy | None = None,
    ) -> None:
        self.pages: PagePolicy = pages or PagePolicy()
        self._comm = comm
        self._prefix = prefix
        self._may_be_unnamed = may_be_unnamed
        self._made = 0
        self._names: set[str] = set()

    def share(self, nbytes: int, show: Show) -> None:
        """Make memory and have every rank map it. Collective.

        Its name exists until every rank has mapped it. If that fails in any way, every rank that
        survives removes it; the launcher removes what is left when nobody survives.

        Args:
            nbytes: How much, at least one byte.
            show: Maps it and allocates this rank's share; raises OSError if it cannot.

        Raises:
            AllocationFailed: The memory is not there, or a rank could not map it; on every rank.
                What ``show`` has mapped is the caller's to undo.
        """
        self._made += 1
        object_ = _Object(self._comm, f"{self._prefix}{self._made}", nbytes)
        self._names.add(object_.name)
        try:
            error = self._agree(object_, show)
        finally:
            # Also where the group failed: who is left cleans up after whoever is not.
            self.remove_names()
            object_.close()
        if error is not None:
            raise error

    def remove_names(self) -> None:
        """Remove the names that are still there. The system may refuse: then call it again."""
        for name in list(self._names):
            with suppress(OSError):
                remove_object(name)
                self._names.discard(name)

    def _agree(self, object_: _Object, show: Show) -> AllocationFailed | None:
        """Allocate and map on all ranks; the error, on all ranks, if any of them cannot."""
        comm = self._comm
        error, where = None, _BY_NAME
        if comm.rank == 0:
            error, where = object_.create(may_be_unnamed=self._may_be_unnamed)
        reach("region_create", comm.rank)
        failed, where = self._tell(error, where)
        if failed:
            return error or object_.refused()
        error = object_.attempt(lambda: object_.take_part(where, show))
        reach("region_mapped", comm.rank)
        failed, _ = self._tell(error, _BY_NAME)
        # Every rank: rank 0 may be killed before it comes to this line.
        self.remove_names()
        return error or object_.refused() if failed else None

    def _tell(self, error: AllocationFailed | None, where: Whereabouts) -> tuple[bool, Whereabouts]:
        """Return whether anybody failed, and what the one who knows says of the memory."""
        words = np.array([error is not None, *astuple(where)], dtype=np.int64)
        failed, *told = self._comm.allreduce(words, op=ReduceOp.MAX).tolist()
        return bool(failed), Whereabouts(*told)


class _Object:
    """One object of shared memory while it is being made."""

    def __init__(self, comm: Communicator, name: str, nbytes: int) -> None:
        self.name = name
        self._comm = comm
        self._nbytes = nbytes
        self._fd = -1

    def create(self, *, may_be_unnamed: bool) -> tuple[AllocationFailed | None, Whereabouts]:
        """Make it; return what went wrong, and where it is."""
        error = self.attempt(self._create_named)
        if error is None or not may_be_unnamed:
            return error, _BY_NAME
        refused = self.attempt(self._create_unnamed)
        if refused is None:
            try:
                return None, Whereabouts.of(self._fd)
            except OSError as cause:
                return self._failed(cause), _BY_NAME
        if "free_bytes" not in refused.context:
            # The system knows no memfd: what helps is room for a name.
            refused.context |= error.context
            refused.suggestion = error.suggestion
        return refused, _BY_NAME

    def _create_named(self) -> None:
        check_room(self._nbytes)
        check_available(self._nbytes)
        self._fd = create_object(self.name, self._nbytes, allocate=False)

    def _create_unnamed(self) -> None:
        self._fd = create_unnamed(self.name, self._nbytes, allocate=False)

    def take_part(self, where: Whereabouts, show: Show) -> None:
        """Open it, where another rank has made it, and map it."""
        if self._comm.rank != 0:
            if where == _BY_NAME:
                self._fd, _ = open_object(self.name, self._nbytes)
            else:
                self._fd = open_unnamed(where, self._nbytes)
        show(self._fd)

    def attempt(self, make: Callable[[], None]) -> AllocationFailed | None:
        """Return what went wrong, if anything did."""
        try:
            make()
        except AllocationFailed as error:
            return error
        except (OSError, OverflowError, ValueError) as error:
            return self._failed(error)
        return None

    def _failed(self, cause: Exception) -> AllocationFailed:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            error = allocation_failed(self._nbytes, cause)
        else:
            error = AllocationFailed(self._nbytes, str(cause))
        error.__cause__ = cause
        return error

    def refused(self) -> AllocationFailed:
        """Return the error where it was another rank that failed."""
        return AllocationFailed(self._nbytes, "refused on another rank")

    def close(self) -> None:
        """Close the descriptor; mappings stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
