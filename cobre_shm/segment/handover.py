"""A new segment for the ranks of a group that exists already: all of them get it, or none does.

Rank 0 makes it before the others hear of it, and says in a collective whether it could.

* By name: rank 0 tells the name, and all join by it as any group does.
* Without a name: rank 0 tells where its descriptor is; each rank opens that, says in a second
  collective whether it could, and they join by it as by an inherited one. Rank 0 keeps its
  descriptor until all have joined.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple

import numpy as np

from cobre_shm import layout
from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed, CobreError
from cobre_shm.segment.posix import remove_objects
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.unnamed import Whereabouts, open_unnamed

__all__ = ["NotAName", "new_named_segment", "new_unnamed_segment"]

# What Segment.region_prefix and a number give, as for a region: who removes what a group left knows
# such names.
_NAME = re.compile(r"/cobre-[0-9a-f]{32}-\d+-\d+")
# As long as one can be whatever the group's words say.
_NAME_BYTES = 96


class NotAName(ValueError):
    """What was told as a segment's name cannot be one: the group's memory is damaged."""


@contextmanager
def new_named_segment(
    comm: Communicator, prefix: str, slot_bytes: int
) -> Iterator[tuple[str, Segment | None]]:
    """Make a segment for all ranks of ``comm``; yield its name and, on rank 0, the segment.

    Collective. The segment is rank 0's to join with; its name goes when all have joined, or when
    the block is left by an exception, also by those that survive rank 0.

    Args:
        comm: The group.
        prefix: Of the names of its regions.
        slot_bytes: Of the new segment.

    Raises:
        AllocationFailed: On all ranks; the memory is not there.
        NotAName: The group's memory is damaged.
    """
    made: Segment | None = None
    refused: CobreError | None = None
    words = np.zeros(_NAME_BYTES, dtype=np.uint8)
    if comm.rank == 0:
        try:
            name = f"{prefix}{int.from_bytes(os.urandom(4))}"
            made = Segment.create(name, comm.size, slot_bytes=slot_bytes)
            words[: len(made.name)] = np.frombuffer(made.name.encode(), dtype=np.uint8)
        except CobreError as error:
            refused = error
    try:
        comm.broadcast(words)
        name = words.tobytes().rstrip(b"\0").decode("ascii", "replace")
        if not name:
            raise refused or _refused_elsewhere(comm.size, slot_bytes)
        if not _NAME.fullmatch(name):
            raise NotAName(name)
        yield name, made
    except BaseException:
        # Names of the group are made behind a collective, so there is no other now.
        with suppress(OSError):
            remove_objects(prefix)
        if made is not None:
            made.close()
        raise


@contextmanager
def new_unnamed_segment(comm: Communicator, slot_bytes: int) -> Iterator[str]:
    """Make a segment for all ranks of ``comm``; yield its name ``fd:N`` in this process.

    Collective. The descriptor N is closed afterwards: who has joined has one of its own.

    Raises:
        AllocationFailed: On all ranks; the memory is not there, or somebody cannot open it.
    """
    segment: Segment | None = None
    error: CobreError | None = None
    words = np.zeros(3, dtype=np.int64)
    fd = -1
    try:
        if comm.rank == 0:
            try:
                segment = Segment.create_unnamed(comm.size, slot_bytes=slot_bytes)
                words[:] = astuple(Whereabouts.of(segment.descriptor))
            except (CobreError, OSError) as refused:
                error = _allocation_failed(comm.size, slot_bytes, refused)
        where = Whereabouts(*comm.allreduce(words, op=ReduceOp.MAX).tolist())
        if where.pid and segment is None:
            try:
                fd = open_unnamed(where, layout.segment_bytes(comm.size, slot_bytes))
            except OSError as refused:
                error = _allocation_failed(comm.size, slot_bytes, refused)
        failed = np.array([error is not None], dtype=np.int64)
        if comm.allreduce(failed, op=ReduceOp.MAX)[0]:
            raise error or _refused_elsewhere(comm.size, slot_bytes)
        yield segment.name if segment is not None else f"fd:{fd}"
    finally:
        if segment is not None:
            segment.close()
        if fd >= 0:
            os.close(fd)


def _allocation_failed(size: int, slot_bytes: int, cause: Exception) -> CobreError:
    if isinstance(cause, CobreError):
        return cause
    error = AllocationFailed(layout.segment_bytes(size, slot_bytes), str(cause))
    error.__cause__ = cause
    return error


def _refused_elsewhere(size: int, slot_bytes: int) -> AllocationFailed:
    return AllocationFailed(layout.segment_bytes(size, slot_bytes), "refused on another rank")
