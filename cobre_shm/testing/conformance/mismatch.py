"""Ranks that disagree: an error on every rank that names who asked for what, and no hang.

Every check here loses its group: afterwards the communicator stays failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import CollectiveFailed, CollectiveMismatch
from cobre_shm.testing.conformance.expect import (
    assert_every_collective_raises,
    assert_group_usable,
    expect_error,
)
from cobre_shm.testing.conformance.payloads import slot_bytes
from cobre_shm.testing.conformance.registry import conformance_check


class Call(NamedTuple):
    """A collective to be called.

    Attributes:
        operation: What the error must name.
        run: Calls it.
        may_return: Whether it may return although the ranks disagree. The root of a broadcast
            need not wait for its peers, and may learn of it from the next collective only.
    """

    operation: str
    run: Callable[[], object]
    may_return: bool = False


def _allgatherv(comm: Communicator, dtype: Any, counts: list[int]) -> Call:
    send = np.zeros(counts[comm.rank], dtype)
    return Call("allgatherv", lambda: comm.allgatherv(send, None, counts))


def _gather_any(comm: Communicator, dtype: Any, count: int = 3) -> Call:
    return Call("allgatherv", lambda: comm.allgatherv(np.zeros(count, dtype)))


def _allreduce(
    comm: Communicator, dtype: Any = "f8", count: int = 3, op: ReduceOp = ReduceOp.SUM
) -> Call:
    return Call("allreduce", lambda: comm.allreduce(np.zeros(count, dtype), op=op))


def _broadcast(comm: Communicator, dtype: Any = "f8", count: int = 3, root: int = 0) -> Call:
    return Call(
        "broadcast", lambda: comm.broadcast(np.zeros(count, dtype), root), comm.rank == root
    )


def _barrier(comm: Communicator) -> Call:
    return Call("barrier", comm.barrier)


def _region(comm: Communicator, shape: Any = 3, dtype: Any = "f8") -> Call:
    return Call("region", lambda: comm.create_shared_region(shape, dtype))


def _expect_mismatch(comm: Communicator, odd: int, usual: Call, different: Call) -> None:
    """Assert that the whole group fails when rank ``odd`` makes the ``different`` call."""
    assert_group_usable(comm, "construction")
    mine = different if comm.rank == odd else usual
    what = f"rank {odd} calls {different.operation}, the others {usual.operation}; rank {comm.rank}"

    def call_and_meet() -> None:
        mine.run()
        assert mine.may_return, f"{what}: the call returned"
        comm.barrier()

    error = expect_error(CollectiveMismatch, what, call_and_meet)
    calls = error.calls
    assert len(calls) == comm.size, f"{what}: {len(calls)} calls for {comm.size} ranks: {calls}"
    for rank, text in enumerate(calls):
        operation = different.operation if rank == odd else usual.operation
        assert operation in text, f"{what}: rank {rank} called {operation}, reported as {text!r}"
    others = [text for rank, text in enumerate(calls) if rank != odd]
    assert calls[odd] not in others, f"{what}: the calls do not show the difference: {calls}"
    assert_every_collective_raises(comm, CollectiveFailed, "a mismatch")
    comm.close()


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_operation(comm: Communicator) -> None:
    """One rank reduces, the others gather."""
    usual = _allgatherv(comm, "f8", [3] * comm.size)
    _expect_mismatch(comm, comm.size - 1, usual, _allreduce(comm))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_barrier_and_allreduce(comm: Communicator) -> None:
    """One rank waits in a barrier, the others reduce."""
    _expect_mismatch(comm, 0, _allreduce(comm), _barrier(comm))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_broadcast_and_barrier(comm: Communicator) -> None:
    """The root broadcasts, the others wait in a barrier."""
    _expect_mismatch(comm, 0, _barrier(comm), _broadcast(comm))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_large_and_small_operation(comm: Communicator) -> None:
    """One rank gathers many slots, the others wait in a barrier."""
    counts = [slot_bytes(comm)] * comm.size
    _expect_mismatch(comm, comm.size // 2, _barrier(comm), _allgatherv(comm, "f8", counts))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allreduce_dtype(comm: Communicator) -> None:
    """Equal sizes in elements and bytes, other numbers."""
    _expect_mismatch(comm, comm.size // 2, _allreduce(comm, "f8"), _allreduce(comm, "i8"))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allreduce_byte_order(comm: Communicator) -> None:
    """Equal but for the byte order."""
    swapped = np.dtype("f8").newbyteorder("S")
    _expect_mismatch(comm, 0, _allreduce(comm, "f8"), _allreduce(comm, swapped))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allreduce_operation(comm: Communicator) -> None:
    """One rank asks for the maximum, the others for the sum."""
    _expect_mismatch(comm, comm.size - 1, _allreduce(comm), _allreduce(comm, op=ReduceOp.MAX))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allreduce_size(comm: Communicator) -> None:
    """One rank has an element more."""
    _expect_mismatch(comm, 0, _allreduce(comm, count=3), _allreduce(comm, count=4))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allreduce_size_across_slots(comm: Communicator) -> None:
    """One rank needs many rounds, the others one."""
    count = 3 * slot_bytes(comm) // 8
    _expect_mismatch(comm, comm.size // 2, _allreduce(comm), _allreduce(comm, count=count))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allreduce_size_of_many_slots(comm: Communicator) -> None:
    """All need many rounds, one rank has an element more."""
    count = 3 * slot_bytes(comm) // 8
    _expect_mismatch(
        comm, comm.size - 1, _allreduce(comm, count=count), _allreduce(comm, count=count + 1)
    )


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_broadcast_root(comm: Communicator) -> None:
    """One rank names another root: itself."""
    odd = comm.size - 1
    _expect_mismatch(comm, odd, _broadcast(comm, root=0), _broadcast(comm, root=odd))


@conformance_check(min_size=3, fatal=True)
def check_mismatch_of_broadcast_root_on_bystander(comm: Communicator) -> None:
    """A rank that is neither root names the wrong one."""
    _expect_mismatch(comm, 2, _broadcast(comm, root=0), _broadcast(comm, root=1))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_broadcast_size(comm: Communicator) -> None:
    """One receiver has less room than the root sends."""
    _expect_mismatch(comm, comm.size - 1, _broadcast(comm, count=4), _broadcast(comm, count=3))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_broadcast_size_across_slots(comm: Communicator) -> None:
    """The root sends many slots, the others expect little."""
    count = 3 * slot_bytes(comm) // 8
    _expect_mismatch(comm, 0, _broadcast(comm), _broadcast(comm, count=count))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_broadcast_dtype(comm: Communicator) -> None:
    """Records of one size with other fields."""
    usual, different = [("a", "i4"), ("b", "i4")], [("a", "i4"), ("c", "i4")]
    _expect_mismatch(comm, comm.size // 2, _broadcast(comm, usual), _broadcast(comm, different))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allgatherv_counts(comm: Communicator) -> None:
    """One rank expects another count from a peer."""
    counts, other = [4] * comm.size, [5, *[4] * (comm.size - 1)]
    usual = _allgatherv(comm, "f8", counts)
    different = usual if comm.rank == 0 else _allgatherv(comm, "f8", other)
    _expect_mismatch(comm, comm.size - 1, usual, different)


@conformance_check(min_size=3, fatal=True)
def check_mismatch_of_allgatherv_counts_of_equal_sum(comm: Communicator) -> None:
    """One rank has the counts of two peers exchanged."""
    counts = [3, 4, *[4] * (comm.size - 2)]
    other = [4, 3, *[4] * (comm.size - 2)]
    usual = _allgatherv(comm, "f8", counts)
    different = usual if comm.rank < 2 else _allgatherv(comm, "f8", other)
    _expect_mismatch(comm, 2, usual, different)


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allgatherv_dtype(comm: Communicator) -> None:
    """Equal counts of other elements."""
    counts = [3] * comm.size
    _expect_mismatch(
        comm, comm.size - 1, _allgatherv(comm, "f8", counts), _allgatherv(comm, "f4", counts)
    )


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_allgatherv_dtype_without_counts(comm: Communicator) -> None:
    """The exchange of sizes hides no difference of dtype."""
    _expect_mismatch(comm, 0, _gather_any(comm, "f8"), _gather_any(comm, "i8"))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_region_shape(comm: Communicator) -> None:
    """One rank asks for a larger region."""
    _expect_mismatch(comm, 0, _region(comm, (4, 3)), _region(comm, (5, 3)))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_region_dtype(comm: Communicator) -> None:
    """Regions of equal size in bytes and other dtypes."""
    _expect_mismatch(comm, comm.size - 1, _region(comm, 4, "f8"), _region(comm, 4, "i8"))


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_fence_and_barrier(comm: Communicator) -> None:
    """One rank fences a region, the others wait in a barrier."""
    _expect_mismatch_of_region(comm, "fence")


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_freeze_and_barrier(comm: Communicator) -> None:
    """One rank freezes a region, the others wait in a barrier."""
    _expect_mismatch_of_region(comm, "freeze")


def _expect_mismatch_of_region(comm: Communicator, method: str) -> None:
    region = comm.create_shared_region(3)
    with comm.split_local() as node:
        shares = np.array([node.size > 1])
    # Where nothing is shared nobody is waited for.
    if comm.allreduce(shares, op=ReduceOp.MIN)[0]:
        different = Call(method, getattr(region, method))
        _expect_mismatch(comm, comm.size // 2, _barrier(comm), different)


@conformance_check(min_size=2, fatal=True)
def check_mismatch_of_split_and_barrier(comm: Communicator) -> None:
    """One rank splits the group, the others wait in a barrier."""
    _expect_mismatch(comm, 0, _barrier(comm), Call("split_local", comm.split_local))


@conformance_check(min_size=3, fatal=True)
def check_mismatch_all_different(comm: Communicator) -> None:
    """Every rank calls something else; all are named."""
    assert_group_usable(comm, "construction")
    error = expect_error(
        CollectiveMismatch,
        f"all ranks reduce different sizes, rank {comm.rank}",
        _allreduce(comm, count=comm.rank + 1).run,
    )
    assert len(set(error.calls)) == comm.size, f"{comm.size} different calls: {error.calls}"
    assert_every_collective_raises(comm, CollectiveFailed, "a mismatch")
    comm.close()


@conformance_check(min_size=2, fatal=True)
def check_mismatch_after_many_collectives(comm: Communicator) -> None:
    """A group that has worked for long notices as well."""
    for _ in range(300):
        comm.barrier()
        assert_group_usable(comm, "a barrier")
    _expect_mismatch(comm, comm.size - 1, _allreduce(comm, "f4"), _allreduce(comm, "i4"))


@conformance_check(fatal=True, min_size=2)
def check_plans_that_differ_are_a_mismatch(comm: Communicator) -> None:
    """A plan is the collective that it was made for, also in its errors."""
    send, recv = np.zeros(100 + comm.rank), np.zeros(100 + comm.rank)
    plan = comm.allreduce_init(send, recv)
    error = expect_error(CollectiveMismatch, "lengths", plan)
    assert "allreduce" in str(error)
