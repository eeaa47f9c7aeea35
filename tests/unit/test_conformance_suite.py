"""The conformance suite itself: that its data can tell right from wrong, and that it does."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import CollectiveTimeout, RankFailed
from cobre_shm.local import LocalCommunicator
from cobre_shm.testing.conformance import CHECKS
from cobre_shm.testing.conformance.expect import (
    assert_same_bytes,
    assert_same_numbers,
    memory_of,
)
from cobre_shm.testing.conformance.payloads import (
    MOVABLE,
    filled,
    numbers,
    records,
    reduced,
    reductions,
    special_numbers,
)
from tests.support.ranks import run_ranks

CONFORMANCE = Path(__file__).parents[1] / "conformance"


def test_every_topic_is_run_on_the_backends():
    files = [path.read_text() for path in CONFORMANCE.glob("test_*.py")]
    run = [topic for text in files for topic in re.findall(r'@every_check\("(\w+)"\)', text)]
    assert sorted(run) == sorted({check.topic for check in CHECKS.values()})


@pytest.mark.parametrize("dtype", ["e", "f", "d", "g", "F", "D", "G", ">f8"])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PROD])
@pytest.mark.parametrize("size", [3, 8])
def test_numbers_other_rank_order_gives_other_bits(dtype, op, size):
    blocks = [numbers(dtype, 33, rank) for rank in range(size)]
    in_order = reduced(op, blocks)
    reverse = reduced(op, blocks[::-1])
    rotated = reduced(op, blocks[1:] + blocks[:1])
    for other in (reverse, rotated):
        with pytest.raises(AssertionError):
            assert_same_numbers(other, in_order, "another order")


# numpy may multiply complex scalars in its own order.
SCALAR = [case for case in reductions() if case[0].kind != "c" or case[1] is not ReduceOp.PROD]


@pytest.mark.parametrize(("dtype", "op"), SCALAR, ids=str)
def test_reduced_few_numbers_equal_to_scalar_arithmetic(dtype, op):
    blocks = [special_numbers(dtype, rank)[:40] for rank in range(3)]
    result = reduced(op, blocks)
    scalar = {
        ReduceOp.SUM: lambda a, b: a + b,
        ReduceOp.PROD: lambda a, b: a * b,
        ReduceOp.MIN: np.minimum,
        ReduceOp.MAX: np.maximum,
    }[op]
    with np.errstate(all="ignore"):
        singles = [
            scalar(scalar(blocks[0][index], blocks[1][index]), blocks[2][index])
            for index in range(result.size)
        ]
    expected = np.array(singles, dtype)
    assert_same_numbers(result, expected, "scalars", sign_of_zero=op < ReduceOp.MIN)


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
def test_records_depend_on_key_and_position(dtype):
    first, second = records(dtype, 9, 0), records(dtype, 9, 1)
    assert first.dtype == dtype
    assert first.size == 9
    assert_same_bytes(first, records(dtype, 9, 0), "the same key")
    with pytest.raises(AssertionError):
        assert_same_bytes(first, second, "another key")
    if dtype.kind != "b":
        assert first.tobytes() != filled(dtype, 9).tobytes()
        assert len({first[index : index + 1].tobytes() for index in range(9)}) > 5


def test_assert_same_numbers_nan_is_any_nan_and_zero_has_a_sign():
    quiet = np.array([0x7FF8000000000000, 0xFFF8000000000001], np.uint64).view("f8")
    assert_same_numbers(quiet, np.array([np.nan, np.nan]), "NaN")
    with pytest.raises(AssertionError):
        assert_same_numbers(np.array([0.0]), np.array([-0.0]), "zeros")
    assert_same_numbers(np.array([0.0]), np.array([-0.0]), "zeros", sign_of_zero=False)
    with pytest.raises(AssertionError):
        assert_same_numbers(np.array([np.nan]), np.array([1.0]), "NaN for a number")


class IgnoresDispls(LocalCommunicator):
    def allgatherv(self, send, recv=None, counts=None, displs=None):
        result = super().allgatherv(send, recv, counts, displs)
        if displs is not None and counts is not None:
            super().allgatherv(send, result, counts)
        return result


class AcceptsAnyRoot(LocalCommunicator):
    def broadcast(self, buf, root=0):
        return super().broadcast(buf, 0)


class ReturnsCopies(LocalCommunicator):
    def allreduce(self, send, recv=None, op=ReduceOp.SUM):
        return super().allreduce(send, recv, op).copy()


class StaysOpen(LocalCommunicator):
    def close(self):
        pass


class WritesBehind(LocalCommunicator):
    def allreduce(self, send, recv=None, op=ReduceOp.SUM):
        result = super().allreduce(send, recv, op)
        base = getattr(recv, "base", None)
        if isinstance(base, np.ndarray) and base.dtype == np.uint8 and base.size > result.nbytes:
            base[-1] = 0
        return result


class PlanIgnoresDispls(LocalCommunicator):
    def allgatherv_init(self, send, recv, counts, displs=None):
        return super().allgatherv_init(send, recv, counts)


class PlanStaysOpen(LocalCommunicator):
    def allgatherv_init(self, send, recv, counts, displs=None):
        return partial(LocalCommunicator().allgatherv, send, recv, counts, displs)


class SharedResultStaysOpen(LocalCommunicator):
    def allreduce_shared(self, send, op=ReduceOp.SUM):
        return LocalCommunicator().allreduce_shared(send, op)


class ZerosStayOpen(LocalCommunicator):
    def zeros(self, shape, dtype=np.float64):
        return np.zeros(shape, dtype)


class FullStaysOpen(LocalCommunicator):
    def full(self, shape, fill_value, dtype=None):
        return np.full(shape, fill_value, dtype)


class RegionStaysOpen(LocalCommunicator):
    def create_shared_region(self, shape, dtype=np.float64):
        region = super().create_shared_region(shape, dtype)
        region.close = lambda: None
        return region


class BroadcastCopies(LocalCommunicator):
    def broadcast(self, buf, root=0):
        buf[...] = super().broadcast(buf.copy(), root)
        return buf


class AbortReturns(LocalCommunicator):
    def abort(self, code=1):
        return code


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (IgnoresDispls, "check_allgatherv_gaps_left_alone"),
        (AcceptsAnyRoot, "check_broadcast_invalid_root_refused"),
        (ReturnsCopies, "check_allreduce_in_place"),
        (StaysOpen, "check_close_every_collective_refused"),
        (WritesBehind, "check_allreduce_neighbours_of_recv_left_alone"),
        (PlanIgnoresDispls, "check_plan_of_any_layout"),
        (PlanStaysOpen, "check_plan_of_a_closed_communicator_is_refused"),
        (PlanStaysOpen, "check_close_every_collective_refused"),
        (SharedResultStaysOpen, "check_close_every_collective_refused"),
        (ZerosStayOpen, "check_close_every_collective_refused"),
        (FullStaysOpen, "check_close_every_collective_refused"),
        (RegionStaysOpen, "check_shared_region_view_survives_close"),
        (BroadcastCopies, "check_broadcast_allocates_nothing"),
        (AbortReturns, "check_abort_fails_all_ranks"),
    ],
)
def test_check_broken_communicator_fails(broken, name):
    CHECKS[name].function(LocalCommunicator())
    with pytest.raises(AssertionError):
        CHECKS[name].function(broken())


def meet_nobody_by_plan(kind):
    kind.barrier_init = lambda self: lambda: None


def ignore_op_of_shared_results(kind):
    shared = kind.allreduce_shared
    kind.allreduce_shared = lambda self, send, op=ReduceOp.SUM: shared(self, send)


def know_no_pid(kind):
    barrier = kind.barrier

    def blame_nobody(self):
        try:
            barrier(self)
        except RankFailed as error:
            raise RankFailed(str(error), rank=error.rank, pid=0) from error

    kind.barrier = blame_nobody


def leave_unseen(kind):
    barrier = kind.barrier

    def wait_in_vain(self):
        try:
            barrier(self)
        except RankFailed as error:
            missing = [error.rank]
            raise CollectiveTimeout(str(error), missing_ranks=missing, seconds=1) from error

    kind.barrier = wait_in_vain


def fence_by_a_barrier(kind):
    make = kind.create_shared_region

    def made(self, shape, dtype=np.float64):
        region = make(self, shape, dtype)
        region.fence = region.freeze = self.barrier
        return region

    kind.create_shared_region = made


def check_broken_kind(comm, name, break_kind):
    # The process is this rank's alone.
    break_kind(type(comm))
    CHECKS[name].function(comm)


@pytest.mark.parametrize(
    ("break_kind", "name"),
    [
        (meet_nobody_by_plan, "check_barrier_returns_after_all_entered"),
        (ignore_op_of_shared_results, "check_shared_result_of_every_operation"),
        (know_no_pid, "check_abort_fails_all_ranks"),
        (know_no_pid, "check_close_before_last_collective_fails_peers"),
        (leave_unseen, "check_close_before_last_collective_fails_peers"),
    ],
)
def test_check_broken_group_fails(backend, break_kind, name):
    outcomes = run_ranks(check_broken_kind, 2, backend, name, break_kind)
    assert any(isinstance(outcome.error, AssertionError) for outcome in outcomes)


@pytest.mark.parametrize("what", ["fence", "freeze"])
def test_check_fence_that_meets_a_barrier_fails(what):
    """Where memory is shared; elsewhere nobody is waited for."""
    name = f"check_mismatch_of_{what}_and_barrier"
    outcomes = run_ranks(check_broken_kind, 2, "shm", name, fence_by_a_barrier)
    assert any(isinstance(outcome.error, AssertionError) for outcome in outcomes)


def test_checks_each_has_a_sentence_and_a_topic():
    for check in CHECKS.values():
        assert check.name.startswith("check_")
        assert check.function.__doc__
        assert check.topic in check.function.__module__


def test_memory_of_a_call_is_what_every_call_takes():
    tables = []
    assert memory_of(lambda: tables.append(None if tables else bytearray(1_000_000))) < 100_000
    assert memory_of(lambda: bytearray(1_000_000)) >= 1_000_000
