"""Shared arrays: ordinary arrays of each rank, whatever memory they come from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import (
    AllocationFailed,
    InvalidBufferSize,
    InvalidCommunicator,
    InvalidDatatype,
)
from cobre_shm.testing.conformance.expect import (
    assert_group_usable,
    assert_refused,
    assert_same_bytes,
    expect_error,
)
from cobre_shm.testing.conformance.payloads import MOVABLE, numbers, records, reduced
from cobre_shm.testing.conformance.registry import conformance_check


@conformance_check()
def check_shared_array_is_an_ordinary_array(comm: Communicator) -> None:
    """It is a numpy array of the shape and dtype asked for, contiguous, aligned and writable."""
    shapes: tuple[Any, ...] = (5, (5,), (2, 3, 4), (), np.int64(6), 0, (3, 0))
    for shape in shapes:
        expected = shape if isinstance(shape, tuple) else (shape,)
        for dtype in ("f8", "i2", "?", "D", "V5"):
            array = comm.empty(shape, dtype)
            what = f"array of {shape} {dtype}"
            assert type(array) is np.ndarray, f"{what}: {type(array)}"
            assert array.shape == expected, f"{what}: shape {array.shape}"
            assert array.dtype == np.dtype(dtype), f"{what}: {array.dtype}"
            flags = array.flags
            assert flags.c_contiguous, f"{what}: not contiguous"
            assert flags.aligned, f"{what}: not aligned"
            assert flags.writeable, f"{what}: read-only"
    assert comm.empty(4).dtype == np.float64, "default dtype"


@conformance_check()
def check_shared_array_filled(comm: Communicator) -> None:
    """``zeros`` and ``full`` fill all of it, also where other arrays have been before."""
    for turn in range(6):
        dirty = comm.full((50, 7), turn + 1, "i4")
        assert (dirty == turn + 1).all(), f"full in turn {turn}"
        del dirty
        assert not comm.zeros((10, 70), "i2").any(), f"zeros in turn {turn}"
    assert comm.full(3, 2.5).tolist() == [2.5] * 3, "full without a dtype"
    assert comm.full((2, 2), [1, 2]).tolist() == [[1, 2]] * 2, "full of a row"
    assert comm.full((), 7).dtype == np.asarray(7).dtype, "dtype of full"
    for salt, dtype in enumerate(MOVABLE):
        assert_same_bytes(comm.zeros(5, dtype), np.zeros(5, dtype), f"zeros of {dtype}")
        if dtype.names is None and dtype.char not in "gG":  # padding is not copied
            value = records(dtype, 1, salt)
            filled = comm.full(5, value[0], dtype)
            assert_same_bytes(filled, np.repeat(value, 5), f"full of {dtype}")


@conformance_check()
def check_shared_array_is_the_ranks_own(comm: Communicator) -> None:
    """What a rank writes changes no array of any other rank, nor any other of its own."""
    arrays = [comm.empty(100 + 37 * index, "i8") for index in range(12)]
    for turn in range(3):
        for index, array in enumerate(arrays):
            array[:] = 1000 * turn + 100 * index + comm.rank
        comm.barrier()
        for index, array in enumerate(arrays):
            expected = 1000 * turn + 100 * index + comm.rank
            assert (array == expected).all(), f"array {index} of rank {comm.rank} in turn {turn}"
        comm.barrier()


@conformance_check()
def check_shared_array_as_buffer(comm: Communicator) -> None:
    """Collectives on shared arrays, and on parts of them, give the bits that they always give."""
    count = 20_000
    for dtype in ("f8", "f4", "i2"):
        blocks = [numbers(dtype, count, rank) for rank in range(comm.size)]
        send, recv = comm.empty(count, dtype), comm.empty(count, dtype)
        send[:] = blocks[comm.rank]
        total = reduced(ReduceOp.SUM, blocks)
        assert_same_bytes(comm.allreduce(send, recv), total, f"allreduce of {dtype}")
        assert_same_bytes(send, blocks[comm.rank], f"send of {dtype} after allreduce")
        part = slice(1001, 15_003)
        assert_same_bytes(comm.allreduce(send[part]), total[part], f"allreduce of a part, {dtype}")
        private = comm.allreduce(send.copy(), np.empty(count, dtype))
        assert_same_bytes(private, total, f"allreduce from private {dtype}")
        everyone = comm.empty(count * comm.size, dtype)
        comm.allgatherv(send, everyone)
        assert_same_bytes(everyone, np.concatenate(blocks), f"allgatherv of {dtype}")
        for root in range(comm.size):
            recv[:] = blocks[comm.rank]
            comm.broadcast(recv, root)
            assert_same_bytes(recv, blocks[root], f"broadcast of {dtype} from {root}")
        comm.allreduce(send, send)
        assert_same_bytes(send, total, f"allreduce in place of {dtype}")


@conformance_check(min_size=2)
def check_shared_array_beside_private_buffers(comm: Communicator) -> None:
    """Some ranks may pass shared arrays and others private ones to the same collective."""
    count = 9_000
    blocks = [numbers("f8", count, rank) for rank in range(comm.size)]
    shared = comm.empty(count)
    for turn in range(comm.size):
        buffer = np.empty(count) if comm.rank == turn else shared
        buffer[:] = blocks[comm.rank]
        total = comm.allreduce(buffer, buffer)
        assert_same_bytes(total, reduced(ReduceOp.SUM, blocks), f"rank {turn} private: allreduce")
        buffer[:] = blocks[comm.rank]
        comm.broadcast(buffer, turn)
        assert_same_bytes(buffer, blocks[turn], f"rank {turn} private: broadcast")


@conformance_check()
def check_shared_array_shapes_may_differ(comm: Communicator) -> None:
    """Each rank has the shape and dtype that it asked for; the blocks can be gathered."""
    counts = [300 * rank * (rank % 3) for rank in range(comm.size)]
    blocks = [numbers("i4", count, rank) for rank, count in enumerate(counts)]
    mine = comm.empty(counts[comm.rank], "i4")
    mine[:] = blocks[comm.rank]
    other = comm.zeros((comm.rank + 1, 5), "f4" if comm.rank % 2 else "c16")
    gathered = comm.allgatherv(mine, counts=counts)
    assert_same_bytes(gathered, np.concatenate(blocks), "blocks of different sizes")
    assert not other.any(), "zeros beside them"


@conformance_check()
def check_shared_array_memory_used_again_when_all_dropped_it(comm: Communicator) -> None:
    """Arrays live as long as their views, however differently the ranks drop them."""
    chosen, own = random.Random(5), random.Random(1000 + comm.rank)
    kept: dict[int, Any] = {}
    for turn in range(400):
        size = chosen.choice((1, 3, 50, 700, 5000))
        array = comm.empty(size, "i8")
        array[:] = turn
        # A view keeps it as the array does.
        kept[turn] = array[size // 2 :] if turn % 3 else array
        del array
        for old in own.sample(sorted(kept), k=min(len(kept), own.randrange(3))):
            assert (kept.pop(old) == old).all(), f"rank {comm.rank}: array {old} in turn {turn}"
    for old, array in kept.items():
        assert (array == old).all(), f"rank {comm.rank}: array {old} at the end"


@conformance_check()
def check_shared_array_too_large_refused(comm: Communicator) -> None:
    """Memory that is not there is an error on every rank, and the group goes on."""
    kept = comm.full(10, 3)
    for extent in (2**50, 2**60, 2**62):
        error = expect_error(AllocationFailed, f"empty({extent})", comm.empty, (extent, 1))
        assert error.requested_bytes == 8 * extent, f"requested_bytes {error.requested_bytes}"
        assert_group_usable(comm, "a failed allocation")
    again = comm.full(10, 4)
    assert (kept == 3).all(), "an array from before a failed allocation"
    assert (again == 4).all(), "an array from behind a failed allocation"


@conformance_check()
def check_shared_array_mistakes_refused(comm: Communicator) -> None:
    """A wrong shape, dtype or value is found before any peer is involved."""
    for call in (comm.empty, comm.zeros):
        for shape in (-1, (2, -1), 2.5, (True,), "3", (0, 2**63), (1,) * 99):
            assert_refused(comm, InvalidBufferSize, f"shape {shape!r}", call, shape)
        for dtype in (object, "nonsense", np.dtype(("f8", 3))):
            assert_refused(comm, InvalidDatatype, f"dtype {dtype!r}", call, 3, dtype)
    for dtype in (object, "nonsense", np.dtype(("f8", 3))):
        assert_refused(comm, InvalidDatatype, f"full of {dtype!r}", comm.full, 3, 1, dtype)
    assert_refused(comm, ValueError, "full of a word", comm.full, 3, "word", "f8")
    assert_refused(comm, ValueError, "full of two values", comm.full, 3, [1.0, 2.0])


@conformance_check(fatal=True)
def check_shared_array_outlives_close(comm: Communicator) -> None:
    """Arrays stay readable and writable after ``close``; new ones are refused."""
    array = comm.full(1000, comm.rank, "i8")
    total = comm.allreduce(array)
    comm.close()
    assert (array == comm.rank).all(), "array after close"
    array += 1
    assert (array == comm.rank + 1).all(), "array written after close"
    assert (total == sum(range(comm.size))).all(), "result after close"
    for call in (comm.empty, comm.zeros):
        expect_error(InvalidCommunicator, f"{call.__name__} after close", call, 3)
    expect_error(InvalidCommunicator, "full after close", comm.full, 3, 1)
