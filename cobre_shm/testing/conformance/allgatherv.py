"""``allgatherv``: every rank's block, in rank order, on every rank."""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator, Counts
from cobre_shm.testing.conformance.expect import (
    assert_same_bytes,
    assert_same_everywhere,
    memory_of,
)
from cobre_shm.testing.conformance.foreign import InterfaceOnly, guarded, unaligned
from cobre_shm.testing.conformance.payloads import (
    MOVABLE,
    SIZES,
    filled,
    packed,
    records,
    slot_bytes,
)
from cobre_shm.testing.conformance.registry import conformance_check


def _gathered(dtype: np.dtype[Any], room: int, blocks: Sequence[Array], displs: Counts) -> Array:
    """Return the receive buffer of ``room`` elements after the blocks have come in."""
    expected = filled(dtype, room)
    memory = expected.view(np.uint8)
    for block, displ in zip(blocks, displs, strict=True):
        start = int(displ) * dtype.itemsize
        memory[start : start + block.nbytes] = block.view(np.uint8)
    return expected


def _gather_and_compare(
    comm: Communicator,
    dtype: Any,
    counts: Sequence[int],
    displs: Sequence[int] | None = None,
    *,
    room: int | None = None,
    salt: int = 0,
) -> None:
    """Run the full form and compare the whole receive buffer, gaps included."""
    dtype = np.dtype(dtype)
    starts = packed(counts) if displs is None else displs
    room = max(map(sum, zip(starts, counts, strict=True))) if room is None else room
    what = f"allgatherv of {dtype}, counts {list(counts)}, displs {displs}, rank {comm.rank}"
    blocks = [records(dtype, count, rank, salt) for rank, count in enumerate(counts)]
    # Made anew: numpy copies records field by field, without the padding.
    send = records(dtype, counts[comm.rank], comm.rank, salt)
    recv = filled(dtype, room)
    result = comm.allgatherv(send, recv, counts, displs)
    assert result is recv, f"{what}: the result is not recv"
    assert_same_bytes(recv, _gathered(dtype, room, blocks, starts), what)
    assert_same_bytes(send, blocks[comm.rank], f"{what}: send after the call")


@conformance_check()
def check_allgatherv_equal_counts(comm: Communicator) -> None:
    """Blocks stand in rank order, for small sizes."""
    for salt, count in enumerate(SIZES):
        _gather_and_compare(comm, "f8", [count] * comm.size, salt=salt)


@conformance_check()
def check_allgatherv_unequal_counts(comm: Communicator) -> None:
    """Counts differ, down to zero."""
    size = comm.size
    patterns = [
        list(range(size)),
        [size - rank for rank in range(size)],
        [rank % 2 * 5 for rank in range(size)],
        [37 if rank == size // 2 else 1 for rank in range(size)],
        [1000 if rank == 0 else 0 for rank in range(size)],
    ]
    for salt, counts in enumerate(patterns):
        _gather_and_compare(comm, "i4", counts, salt=salt)
        _gather_and_compare(comm, MOVABLE[-1], counts, salt=salt)


@conformance_check()
def check_allgatherv_everything_on_one_rank(comm: Communicator) -> None:
    """Only one rank contributes; every rank is that one once."""
    for giver in range(comm.size):
        for count in (1, 9, 2 * slot_bytes(comm) // 8 + 3):
            counts = [count if rank == giver else 0 for rank in range(comm.size)]
            _gather_and_compare(comm, "f8", counts, salt=giver)


@conformance_check()
def check_allgatherv_nothing(comm: Communicator) -> None:
    """All counts are zero: nothing is written, nothing breaks."""
    for room in (0, 5):
        _gather_and_compare(comm, "f8", [0] * comm.size, room=room)
    result = comm.allgatherv(np.empty(0, np.int32))
    assert result.shape == (0,), f"shape {result.shape} from no elements"
    assert result.dtype == np.int32, f"dtype {result.dtype} from int32"


@conformance_check()
def check_allgatherv_gaps_left_alone(comm: Communicator) -> None:
    """Elements between, before and behind the blocks keep their bytes."""
    size = comm.size
    counts = [rank % 3 + 1 for rank in range(size)]
    displs = [4 + 7 * rank for rank in range(size)]
    for dtype in ("f8", "u1", MOVABLE[-2]):
        _gather_and_compare(comm, dtype, counts, displs, room=displs[-1] + 11)
    slot = slot_bytes(comm)
    counts = [slot + rank for rank in range(size)]
    displs = [3 + rank * (2 * slot + 5) for rank in range(size)]
    _gather_and_compare(comm, "u1", counts, displs, room=displs[-1] + 2 * slot)


@conformance_check()
def check_allgatherv_permuted_displs(comm: Communicator) -> None:
    """Blocks may stand in any order in the receive buffer."""
    size = comm.size
    counts = [rank + 1 for rank in range(size)]
    for turn in range(size):
        displs = [0] * size
        start = 0
        for rank in ((turn - place) % size for place in range(size)):
            displs[rank] = start
            start += counts[rank] + turn % 2
        _gather_and_compare(comm, "i8", counts, displs, salt=turn)


@conformance_check()
def check_allgatherv_displs_differ_between_ranks(comm: Communicator) -> None:
    """Each rank may lay out its own receive buffer in its own way."""
    counts = [3] * comm.size
    displs = [3 * ((rank + comm.rank) % comm.size) + comm.rank for rank in range(comm.size)]
    _gather_and_compare(comm, "f4", counts, displs, room=3 * comm.size + comm.rank + 2)


@conformance_check()
def check_allgatherv_every_dtype(comm: Communicator) -> None:
    """Every element type travels bit by bit, signalling NaN and padding included."""
    for salt, dtype in enumerate(MOVABLE):
        for count in (1, 7):
            _gather_and_compare(comm, dtype, [count] * comm.size, salt=salt)


@conformance_check()
def check_allgatherv_around_one_slot(comm: Communicator) -> None:
    """Sizes at which one round becomes two."""
    for dtype in (np.dtype("u1"), np.dtype("f8"), np.dtype("V24")):
        edge = slot_bytes(comm) // dtype.itemsize
        for count in (edge - 1, edge, edge + 1):
            _gather_and_compare(comm, dtype, [count] * comm.size)


@conformance_check()
def check_allgatherv_many_chunks(comm: Communicator) -> None:
    """Blocks of many slots, equal and very unequal."""
    slot = slot_bytes(comm)
    _gather_and_compare(comm, "f8", [5 * slot // 8 + 3] * comm.size)
    for long in range(comm.size):
        counts = [3 * slot + 1 if rank == long else rank for rank in range(comm.size)]
        _gather_and_compare(comm, "u1", counts, salt=long)
    long_record = np.dtype((np.void, slot + 8))
    _gather_and_compare(comm, long_record, [2] * comm.size)


@conformance_check()
def check_allgatherv_short_forms(comm: Communicator) -> None:
    """``recv``, ``counts`` and ``displs`` may each be left out."""
    counts = [rank % 3 for rank in range(comm.size)]
    blocks = [records("f8", count, rank) for rank, count in enumerate(counts)]
    send = blocks[comm.rank]
    together = _gathered(np.dtype("f8"), sum(counts), blocks, packed(counts))
    spread = [5 * rank + 1 for rank in range(comm.size)]
    room = max(map(sum, zip(spread, counts, strict=True)))
    apart = _gathered(np.dtype("f8"), room, blocks, spread)

    assert_same_bytes(comm.allgatherv(send), together, "send alone")
    assert_same_bytes(comm.allgatherv(send, counts=counts), together, "send and counts")
    recv = filled("f8", sum(counts))
    assert comm.allgatherv(send, recv) is recv, "send and recv: the result is not recv"
    assert_same_bytes(recv, together, "send and recv")
    recv = filled("f8", room)
    comm.allgatherv(send, recv, displs=spread)
    assert_same_bytes(recv, apart, "all but counts")

    result = comm.allgatherv(send, None, counts, spread)
    assert result.shape == (room,), f"all but recv: shape {result.shape}, expected {(room,)}"
    for rank, block in enumerate(blocks):
        part = result[spread[rank] : spread[rank] + counts[rank]]
        assert_same_bytes(part, block, f"all but recv: block of rank {rank}")


@conformance_check()
def check_allgatherv_new_results_independent(comm: Communicator) -> None:
    """Arrays that were returned are not written again."""
    first = comm.allgatherv(records("i8", 4, comm.rank, 1))
    kept = first.copy()
    second = comm.allgatherv(records("i8", 4, comm.rank, 2))
    assert not np.shares_memory(first, second), "two results share memory"
    comm.barrier()
    assert_same_bytes(first, kept, "the first result after a second call")
    assert_same_everywhere(comm, "two results", first, second)


@conformance_check()
def check_allgatherv_in_place(comm: Communicator) -> None:
    """``send`` may be the rank's own block of ``recv``."""
    slot = slot_bytes(comm)
    for salt, count in enumerate((0, 1, 7, slot // 8, slot // 4 + 1)):
        counts = [count + rank for rank in range(comm.size)]
        displs = packed(counts)
        blocks = [records("f8", each, rank, salt) for rank, each in enumerate(counts)]
        recv = filled("f8", sum(counts))
        own = recv[displs[comm.rank] :][: counts[comm.rank]]
        own[:] = blocks[comm.rank]
        assert comm.allgatherv(own, recv, counts) is recv, "in place: the result is not recv"
        expected = _gathered(recv.dtype, recv.size, blocks, displs)
        assert_same_bytes(recv, expected, f"in place, counts {counts}, rank {comm.rank}")


@conformance_check()
def check_allgatherv_two_dimensional(comm: Communicator) -> None:
    """Counts are elements in memory order, whatever the shape."""
    blocks = [records("f4", 12, rank).reshape(3, 4) for rank in range(comm.size)]
    recv = filled("f4", 12 * comm.size).reshape(comm.size, 3, 4)
    result = comm.allgatherv(blocks[comm.rank], recv, [12] * comm.size)
    assert result is recv, "the result is not recv"
    assert_same_bytes(recv, np.stack(blocks), "three-dimensional recv")
    assert comm.allgatherv(blocks[comm.rank]).shape == (12 * comm.size,), "recv=None is 1-D"


@conformance_check()
def check_allgatherv_counts_of_any_integer_kind(comm: Communicator) -> None:
    """Counts and displacements are lists, tuples or integer arrays."""
    counts = [rank + 1 for rank in range(comm.size)]
    blocks = [records("i2", count, rank) for rank, count in enumerate(counts)]
    displs = packed(counts)
    expected = _gathered(np.dtype("i2"), sum(counts), blocks, displs)
    forms: list[tuple[Any, Any]] = [
        (counts, displs),
        (tuple(counts), tuple(displs)),
        *((np.array(counts, code), np.array(displs, code)) for code in "bHiIqQ"),
    ]
    for given_counts, given_displs in forms:
        recv = filled("i2", sum(counts))
        comm.allgatherv(blocks[comm.rank], recv, given_counts, given_displs)
        assert_same_bytes(recv, expected, f"counts {given_counts!r}")


@conformance_check()
def check_allgatherv_unaligned_buffers(comm: Communicator) -> None:
    """Buffers may start at any address."""
    for count in (1, 7, slot_bytes(comm) // 8 + 1):
        blocks = [records("f8", count, rank) for rank in range(comm.size)]
        recv = unaligned(filled("f8", count * comm.size))
        comm.allgatherv(unaligned(blocks[comm.rank]), recv, [count] * comm.size)
        assert_same_bytes(recv, np.concatenate(blocks), f"unaligned, {count} elements")


@conformance_check()
def check_allgatherv_read_only_send(comm: Communicator) -> None:
    """``send`` is only read."""
    blocks = [records("f8", 5, rank) for rank in range(comm.size)]
    send = blocks[comm.rank].copy()
    send.flags.writeable = False
    assert_same_bytes(comm.allgatherv(send), np.concatenate(blocks), "read-only send")


@conformance_check()
def check_allgatherv_neighbours_of_recv_left_alone(comm: Communicator) -> None:
    """Nothing is written before or behind ``recv``."""
    for count in (1, 7, slot_bytes(comm) + 1):
        recv, assert_neighbours_untouched = guarded("u1", count * comm.size)
        comm.allgatherv(records("u1", count, comm.rank), recv, [count] * comm.size)
        assert_neighbours_untouched(f"allgatherv of {count} bytes")


@conformance_check()
def check_allgatherv_foreign_buffers(comm: Communicator) -> None:
    """Anything that exports its memory is used without copying."""
    size = comm.size
    blocks = [records("u1", 6, rank) for rank in range(size)]
    expected = np.concatenate(blocks)
    mine: Any = blocks[comm.rank]
    target: Any
    for send in (bytes(mine), bytearray(mine), memoryview(mine), InterfaceOnly(mine)):
        kind = type(send).__name__
        for target in (bytearray(6 * size), memoryview(bytearray(6 * size))):
            comm.allgatherv(send, target, [6] * size)  # type: ignore[arg-type]
            assert_same_bytes(np.frombuffer(target, np.uint8), expected, f"{kind} to a buffer")
        memory = np.zeros(6 * size, np.uint8)
        comm.allgatherv(send, InterfaceOnly(memory), [6] * size)  # type: ignore[arg-type]
        assert_same_bytes(memory, expected, f"{kind} to an array interface")
    numbers = array.array("d", [comm.rank, 0.5])
    everyone = array.array("d", bytes(16 * size))
    comm.allgatherv(numbers, everyone, [2] * size)  # type: ignore[arg-type]
    assert everyone.tolist() == [value for rank in range(size) for value in (rank, 0.5)]


@conformance_check()
def check_allgatherv_full_form_allocates_nothing(comm: Communicator) -> None:
    """With all arguments given, no array of the payload's size is made."""
    count = max(2 * slot_bytes(comm), 1 << 18)
    counts = np.full(comm.size, count, np.int64)
    displs = np.arange(comm.size, dtype=np.int64) * count
    send, recv = records("u1", count, comm.rank), filled("u1", count * comm.size)
    comm.allgatherv(send, recv, counts, displs)
    grown = memory_of(lambda: comm.allgatherv(send, recv, counts, displs))
    assert grown < count // 2, f"allgatherv of {count} bytes allocated {grown} bytes"


@conformance_check()
def check_allgatherv_displs_beyond_32_bits(comm: Communicator) -> None:
    """Displacements are 64-bit."""
    far = 2**31 - 1
    # Untouched pages of an empty array cost no memory.
    recv = np.empty(far + 2 * comm.size, np.int8)
    displs = [far + 2 * rank for rank in range(comm.size)]
    comm.allgatherv(np.array([comm.rank + 1], np.int8), recv, [1] * comm.size, displs)
    found = recv[far::2].tolist()
    assert found == [rank + 1 for rank in range(comm.size)], f"blocks beyond 2**31: {found}"


@conformance_check(huge=True)
def check_allgatherv_more_than_32_bits_of_elements(comm: Communicator) -> None:
    """Counts are 64-bit."""
    count = 2**31 + 5
    counts = [count if rank == comm.size - 1 else 1 for rank in range(comm.size)]
    send = np.zeros(counts[comm.rank], np.int8)
    send[-1] = comm.rank + 1
    recv = np.empty(sum(counts), np.int8)
    comm.allgatherv(send, recv, counts)
    ends = np.cumsum(counts) - 1
    assert recv[ends].tolist() == [rank + 1 for rank in range(comm.size)], "ends of the blocks"
    assert np.count_nonzero(recv) == comm.size, "bytes between the ends of the blocks"
