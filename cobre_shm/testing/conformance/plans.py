"""Plans: collectives that are checked once and run many times."""

from __future__ import annotations

import array
from typing import Any

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.errors import InvalidBufferSize, InvalidCommunicator, InvalidRoot
from cobre_shm.testing.conformance.expect import (
    assert_group_usable,
    assert_same_bytes,
    expect_error,
)
from cobre_shm.testing.conformance.foreign import InterfaceOnly
from cobre_shm.testing.conformance.payloads import numbers, reduced, reductions
from cobre_shm.testing.conformance.registry import conformance_check

# A size around which a backend may go over from private results to shared ones.
_SHARED_BYTES = 1 << 17


@conformance_check()
def check_plan_repeats_the_collective(comm: Communicator) -> None:
    """Each call takes the buffers as they are then, and returns what the method returns."""
    rank, size = comm.rank, comm.size
    for length in (1, 6, 100, 30_000):
        send, recv, buf = np.empty(length), np.empty(length), np.empty(length)
        everything = np.empty(length * size)
        counts = [length] * size
        allreduce = comm.allreduce_init(send, recv)
        gather = comm.allgatherv_init(send, everything, counts)
        broadcast = comm.broadcast_init(buf, size - 1)
        barrier = comm.barrier_init()
        for turn in range(5):
            send[:], buf[:] = turn * (rank + 1), turn * 10 + rank
            assert allreduce() is recv
            expected = np.full(length, float(turn * size * (size + 1) // 2))
            assert_same_bytes(recv, expected, f"allreduce of {length}, turn {turn}")
            assert gather() is everything
            blocks = np.repeat(turn * np.arange(1.0, size + 1), length)
            assert_same_bytes(everything, blocks, f"allgatherv of {length}, turn {turn}")
            assert broadcast() is buf
            root = np.full(length, turn * 10.0 + size - 1)
            assert_same_bytes(buf, root, f"broadcast of {length}, turn {turn}")
            barrier()


@conformance_check()
def check_plan_of_any_layout(comm: Communicator) -> None:
    """A plan keeps ``displs``: blocks in any order, and what stands between them left alone."""
    size = comm.size
    counts = [rank + 1 for rank in range(size)]
    # The last rank's block stands first, two elements before each.
    displs = [2 + sum(count + 2 for count in counts[rank + 1 :]) for rank in range(size)]
    send, recv = np.empty(comm.rank + 1), np.full(sum(counts) + 2 * size + 1, -1.0)
    plan = comm.allgatherv_init(send, recv, counts, displs)
    for turn in range(3):
        send[:] = 10 * turn + comm.rank
        expected = np.full(recv.size, -1.0)
        for rank, (displ, count) in enumerate(zip(displs, counts, strict=True)):
            expected[displ : displ + count] = 10 * turn + rank
        assert plan() is recv
        assert_same_bytes(recv, expected, f"allgatherv with displs {displs}, turn {turn}")


@conformance_check(min_size=2)
def check_plan_meets_the_method(comm: Communicator) -> None:
    """One rank may use a plan and another the method."""
    send, recv = np.array([1.0, comm.rank]), np.empty(2)
    plan = comm.allreduce_init(send, recv, "max")
    for turn in range(6):
        if (turn + comm.rank) % 2:
            plan()
        else:
            comm.allreduce(send, recv, "max")
        assert recv.tolist() == [1.0, comm.size - 1.0]


@conformance_check()
def check_plan_foreign_buffers(comm: Communicator) -> None:
    """A plan takes every buffer that its method takes."""
    rank, size = comm.rank, comm.size
    send: Any = array.array("d", [0])
    recv: Any = array.array("d", bytes(8 * size))
    total: Any = array.array("d", [0])
    own, memory = bytearray(1), np.zeros(size, np.uint8)
    target: Any = InterfaceOnly(memory)
    plans: list[Any] = [
        comm.allgatherv_init(send, recv, [1] * size),
        comm.allgatherv_init(memoryview(own), target, [1] * size),  # type: ignore[arg-type]
        comm.allreduce_init(send, total),
        comm.broadcast_init(send, size - 1),
    ]
    for turn in range(3):
        send[0], own[0] = 10 * turn + rank, turn + rank
        for plan in plans:
            plan()
        ranks = range(size)
        assert recv.tolist() == [10 * turn + each for each in ranks], "allgatherv of numbers"
        assert memory.tolist() == [turn + each for each in ranks], "allgatherv of bytes"
        assert total[0] == sum(10 * turn + each for each in ranks), "allreduce of numbers"
        assert send[0] == 10 * turn + size - 1, "broadcast of numbers"


@conformance_check()
def check_plan_is_checked_when_it_is_made(comm: Communicator) -> None:
    """A mistake is found by making the plan, alone, and leaves the group usable."""
    two, three = np.zeros(2), np.zeros(3)
    expect_error(InvalidBufferSize, "sizes", comm.allreduce_init, two, three)
    expect_error(InvalidRoot, "root", comm.broadcast_init, two, comm.size)
    wrong = [3] * comm.size
    expect_error(InvalidBufferSize, "counts", comm.allgatherv_init, two, three, wrong)
    assert_group_usable(comm, "plans that were refused")


@conformance_check(fatal=True)
def check_plan_of_a_closed_communicator_is_refused(comm: Communicator) -> None:
    """A plan keeps its communicator alive, not open."""
    send, recv = np.ones(3), np.zeros(3)
    gathered = np.zeros(3 * comm.size)
    plans = [
        comm.allgatherv_init(send, gathered, [3] * comm.size),
        comm.allreduce_init(send, recv),
        comm.barrier_init(),
        comm.broadcast_init(recv),
    ]
    for plan in plans:
        plan()
    comm.close()
    for plan in plans:
        expect_error(InvalidCommunicator, "plan after close()", plan)


@conformance_check()
def check_shared_result_is_that_of_allreduce(comm: Communicator) -> None:
    """``allreduce_shared`` gives the bits of ``allreduce``, and nobody can write them."""
    for length in (1, 7, 5000, 100_000):
        send = np.sqrt(np.arange(1.0, length + 1) * (comm.rank + 2))
        expected = comm.allreduce(send)
        for _ in range(3):
            result = comm.allreduce_shared(send)
            assert_same_bytes(result, expected, f"shared result of {length}")
        expect_error(ValueError, "writing to a shared result", result.fill, 0.0)
        # On some ranks of the last result, whose memory may be that of the next.
        turned = result if comm.rank % 2 else send
        expected = comm.allreduce(turned.copy())
        again = comm.allreduce_shared(turned)
        assert_same_bytes(again, expected, f"result of a result of {length}")
    for shape in (2, 3), (300, 200):
        assert comm.allreduce_shared(np.ones(shape, np.int32), "max").shape == shape
    mine: Any = array.array("d", [comm.rank]) if comm.rank else np.zeros(1)
    total = comm.allreduce_shared(mine)
    assert total.tolist() == [comm.size * (comm.size - 1) / 2], "a shared result of other buffers"
    expect_error(InvalidBufferSize, "empty", comm.allreduce_shared, np.zeros(0))
    assert_group_usable(comm, "a shared result that was refused")


@conformance_check()
def check_shared_result_of_every_operation(comm: Communicator) -> None:
    """``allreduce_shared`` reduces by the operation asked for, whatever the size and dtype."""
    for dtype, op in reductions([np.dtype(code) for code in ("f8", "f4", "i2")]):
        edge = _SHARED_BYTES // dtype.itemsize
        for count in (9, edge - 1, edge + 1):
            blocks = [numbers(dtype, count, rank) for rank in range(comm.size)]
            result = comm.allreduce_shared(blocks[comm.rank], op)
            what = f"shared result of {op.name} of {count} x {dtype}"
            assert_same_bytes(result, reduced(op, blocks), what)
