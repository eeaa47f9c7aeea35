"""Shared regions: one array a node, written together, then read by everybody.

How many ranks share a region depends on the backend. ``split_local()`` tells: a rank fills the
block of its local rank, and reads the blocks of all local ranks.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import AllocationFailed
from cobre_shm.testing.conformance.expect import (
    Delays,
    assert_group_usable,
    assert_refused,
    assert_same_bytes,
    expect_error,
)
from cobre_shm.testing.conformance.payloads import MOVABLE, numbers, records, reduced
from cobre_shm.testing.conformance.registry import conformance_check


@conformance_check()
def check_create_shared_region_shape_and_zeros(comm: Communicator) -> None:
    """A new region has the shape and dtype asked for, zeros in it, and is writable."""
    shapes: tuple[Any, ...] = (5, (5,), (2, 3, 4), (1000, 7), np.int64(6))
    for shape in shapes:
        expected = shape if isinstance(shape, tuple) else (shape,)
        for dtype in ("f8", "i2", "?", "D"):
            with comm.create_shared_region(shape, dtype) as region:
                what = f"region of {shape} {dtype}"
                assert region.array.shape == expected, f"{what}: shape {region.array.shape}"
                assert region.array.dtype == np.dtype(dtype), f"{what}: {region.array.dtype}"
                assert region.array.flags.c_contiguous, f"{what}: not contiguous"
                assert region.array.flags.writeable, f"{what}: read-only before freeze"
                assert not region.array.any(), f"{what}: not zero-filled"
                # A rank that is done must not write before its peers have seen the zeros.
                region.fence()
    with comm.create_shared_region(4) as region:
        assert region.array.dtype == np.float64, f"default dtype {region.array.dtype}"


@conformance_check()
def check_create_shared_region_empty(comm: Communicator) -> None:
    """A region may have no elements."""
    for shape in (0, (0,), (0, 3), (3, 0)):
        with comm.create_shared_region(shape) as region:
            assert region.array.size == 0, f"region of {shape} has {region.array.size} elements"
            region.fence()
            region.freeze()
    assert_group_usable(comm, "empty regions")


@conformance_check()
def check_create_shared_region_odd_sizes(comm: Communicator) -> None:
    """All bytes of a region are there, whether they fill pages or not."""
    for nbytes in (1, 3, 4095, 4097, 100_003, (2 << 20) + 1):
        with comm.create_shared_region(nbytes, "u1") as region:
            expected = records(np.dtype("u1"), nbytes, nbytes % 251)
            if comm.is_leader:
                region.array[:] = expected
            region.freeze()
            assert_same_bytes(region.array, expected, f"region of {nbytes} bytes")


@conformance_check(huge=True)
def check_create_shared_region_more_than_2_to_the_31_elements(comm: Communicator) -> None:
    """Both ends of a region with more elements than a 32-bit integer counts are there."""
    count = 2**31 + 5
    with comm.create_shared_region(count, "i1") as region:
        assert region.array.size == count, f"{region.array.size} elements"
        if comm.is_leader:
            region.array[:: 2**30] = (1, 2, 3)
            region.fill_slice(count - 4, np.arange(4, dtype="i1"))
        region.freeze()
        assert region.array[:: 2**30].tolist() == [1, 2, 3], "elements 2**30 apart"
        # Element 2**31 is the fifth from the end.
        assert region.array[-5:].tolist() == [3, 0, 1, 2, 3], "the last elements"


@conformance_check()
def check_create_shared_region_every_dtype(comm: Communicator) -> None:
    """Regions hold every element type that can travel."""
    for salt, dtype in enumerate(MOVABLE):
        with comm.create_shared_region((3, 5), dtype) as region:
            expected = records(dtype, 15, salt)
            if comm.is_leader:
                region.array.reshape(-1).view(np.uint8)[:] = expected.view(np.uint8)
            region.fence()
            assert_same_bytes(region.array, expected, f"region of {dtype}")


@conformance_check()
def check_create_shared_region_too_large_fails_everywhere(comm: Communicator) -> None:
    """Memory that is not there is an error on every rank, and the group goes on."""
    for extent in (2**50, 2**60, 2**62):
        error = expect_error(
            AllocationFailed,
            f"region of 2**{extent.bit_length() - 1} float64",
            comm.create_shared_region,
            (extent, 1),
        )
        assert error.requested_bytes == 8 * extent, f"requested_bytes {error.requested_bytes}"
        assert isinstance(error, MemoryError), "AllocationFailed is no MemoryError"
        assert_group_usable(comm, "a failed allocation")


@conformance_check()
def check_shared_region_filled_by_leader(comm: Communicator) -> None:
    """What the leader wrote before a fence, everybody reads after it; and so again."""
    delays = Delays(comm, seed=21)
    with comm.create_shared_region((40, 3)) as region:
        for turn in range(30):
            expected = numbers("f8", 120, turn)
            if comm.is_leader:
                delays.maybe_sleep()
                region.array[:] = expected.reshape(40, 3)
            region.fence()
            assert_same_bytes(region.array, expected, f"filled by the leader, turn {turn}")
            region.fence()


@conformance_check()
def check_shared_region_filled_together(comm: Communicator) -> None:
    """Each rank writes its block, by fill_slice or directly; after the fence all see all."""
    delays = Delays(comm, seed=22, share=0.3)
    rows = 7
    with comm.split_local() as node, comm.create_shared_region((rows * node.size, 2)) as region:
        for turn in range(20):
            blocks = [numbers("f8", 2 * rows, turn, rank) for rank in range(node.size)]
            mine = blocks[node.rank].reshape(rows, 2)
            start = rows * node.rank
            delays.maybe_sleep()
            if turn % 2:
                region.fill_slice(start, mine)
            else:
                region.array[start : start + rows] = mine
            region.fence()
            assert_same_bytes(region.array, np.concatenate(blocks), f"filled together, {turn}")
            region.fence()


@conformance_check()
def check_shared_region_fill_slice_outside_refused(comm: Communicator) -> None:
    """A slice that leaves the region is refused, and nothing is written."""
    with comm.create_shared_region((6, 2)) as region:
        for start, rows in ((-1, 2), (5, 2), (6, 1), (0, 7), (2**40, 1)):
            assert_refused(
                comm,
                ValueError,
                f"fill_slice of {rows} rows at {start}",
                region.fill_slice,
                start,
                np.ones((rows, 2)),
            )
        assert not region.array.any(), "a refused fill_slice wrote something"
        region.fence()


@conformance_check()
def check_shared_region_fence_waits_for_all(comm: Communicator) -> None:
    """Nobody passes a fence before everybody's writes are done, whoever is late."""
    with comm.split_local() as node, comm.create_shared_region(node.size, "i8") as region:
        for turn in range(1, 5 * node.size):
            if turn % node.size == node.rank:
                time.sleep(0.001)
            region.array[node.rank] = turn
            region.fence()
            seen = region.array.tolist()
            assert seen == [turn] * node.size, f"behind fence {turn}: {seen}"
            region.fence()


@conformance_check()
def check_shared_region_frozen_read_only(comm: Communicator) -> None:
    """After freeze the contents stay, and only the leader may write."""
    with comm.split_local() as node, comm.create_shared_region((node.size, 3)) as region:
        region.fill_slice(node.rank, np.full((1, 3), node.rank + 1.0))
        region.freeze()
        expected = [[rank + 1.0] * 3 for rank in range(node.size)]
        assert region.array.tolist() == expected, f"frozen region: {region.array.tolist()}"
        writable = region.array.flags.writeable
        assert writable == comm.is_leader, f"writable after freeze: {writable}"
        if not comm.is_leader:
            expect_error(
                ValueError, "fill_slice after freeze", region.fill_slice, 0, np.zeros((1, 3))
            )
        # Nobody overwrites what a slower rank has not compared yet.
        comm.barrier()
        if comm.is_leader:
            region.array[0, 0] = -1.0
        region.fence()
        assert region.array[0, 0] == -1.0, "written by the leader after freeze"


@conformance_check()
def check_shared_region_view_survives_close(comm: Communicator) -> None:
    """``close`` may come in any order and twice; a view that is still held stays readable."""
    for closes_first in range(comm.size):
        region = comm.create_shared_region(500)
        if comm.is_leader:
            region.array[:] = np.arange(500) + closes_first
        region.fence()
        view = region.array[100:]
        if comm.rank == closes_first:
            region.close()
        comm.barrier()
        region.close()
        region.close()
        assert region.array.size == 0, f"{region.array.size} elements in a region that was closed"
        expected = np.arange(100, 500) + closes_first
        assert (view == expected).all(), f"view after close, rank {closes_first} closed first"
        comm.barrier()
    assert_group_usable(comm, "closing regions")


@conformance_check()
def check_shared_region_dropped_without_close(comm: Communicator) -> None:
    """A region without any name is released; its view is not."""
    views = []
    for turn in range(8):
        region = comm.create_shared_region(300, "i4")
        if comm.is_leader:
            region.array[:] = turn
        region.fence()
        views.append(region.array)
        del region
    comm.barrier()
    for turn, view in enumerate(views):
        assert (view == turn).all(), f"view of region {turn} that was dropped"


@conformance_check()
def check_shared_regions_independent(comm: Communicator) -> None:
    """Several regions live beside each other and beside collectives."""
    regions = [comm.create_shared_region(50 + index, "i8") for index in range(5)]
    for index, region in enumerate(regions):
        if comm.is_leader:
            region.array[:] = index
        assert_group_usable(comm, "writing a region")
    regions[2].close()
    for region in regions[3:]:
        region.fence()
    comm.barrier()
    for index, region in enumerate(regions):
        if index != 2:
            assert (region.array == index).all(), f"region {index} holds other values"
    comm.barrier()
    for region in regions:
        region.close()


@conformance_check()
def check_shared_region_as_send_buffer(comm: Communicator) -> None:
    """Collectives read from shared memory as from private memory."""
    count = 2000
    blocks = [numbers("f8", count, rank) for rank in range(comm.size)]
    with comm.split_local() as node, comm.create_shared_region((node.size, count)) as region:
        region.fill_slice(node.rank, blocks[comm.rank].reshape(1, count))
        own = region.array[node.rank]
        total = comm.allreduce(own)
        assert_same_bytes(total, reduced(ReduceOp.SUM, blocks), "allreduce of a region's row")
        gathered = comm.allgatherv(own)
        assert_same_bytes(gathered, np.concatenate(blocks), "allgatherv of a region's row")
        comm.barrier()
