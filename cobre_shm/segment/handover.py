"""A new segment without a name for the ranks of a group that exists already.

Rank 0 makes the segment and tells the others where its descriptor is; each opens it, and they
join by it as by an inherited one. Two allreduces: in the first rank 0 says where (all zeros: it
failed), in the second everybody says whether it has opened it. Rank 0 keeps its descriptor until
all have joined. So all ranks raise or none does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple

import numpy as np

from cobre_shm import layout
from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.unnamed import Whereabouts, open_unnamed

__all__ = ["new_segment"]


@contextmanager
def new_segment(comm: Communicator, slot_bytes: int) -> Iterator[str]:
    """Make a segment for all ranks of ``comm``; yield its name ``fd:N`` in this process.

    Collective. The descriptor N is closed afterwards: who has joined has one of its own.

    Raises:
        AllocationFailed: On all ranks; the memory is not there, or somebody cannot open it.
    """
    nbytes = layout.segment_bytes(comm.size, slot_bytes)
    segment, error = None, None
    words = np.zeros(3, dtype=np.int64)
    if comm.rank == 0:
        try:
            segment = Segment.create_unnamed(comm.size, slot_bytes=slot_bytes)
            words[:] = astuple(Whereabouts.of(segment.descriptor))
        except AllocationFailed as refused:
            error = refused
    fd = -1
    try:
        where = Whereabouts(*comm.allreduce(words, op=ReduceOp.MAX).tolist())
        if where.pid and segment is None:
            try:
                fd = open_unnamed(where, nbytes)
            except OSError as refused:
                error = AllocationFailed(nbytes, str(refused))
                error.__cause__ = refused
        failed = np.array([error is not None], dtype=np.int64)
        if comm.allreduce(failed, op=ReduceOp.MAX)[0]:
            raise error or AllocationFailed(nbytes, "refused on another rank")
        yield segment.name if segment is not None else f"fd:{fd}"
    finally:
        if segment is not None:
            segment.close()
        if fd >= 0:
            os.close(fd)
