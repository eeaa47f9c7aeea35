"""Any difference between the calls of two ranks is an error on all of them, with all the calls."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import CollectiveMismatch
from tests.support.ranks import results_of, run_ranks

# One group for so many cases: each takes a group of its own, made from the first one.
CASES_PER_GROUP = 25


@dataclass(frozen=True)
class Call:
    operation: str
    dtype: str
    reduction: ReduceOp
    root: int
    length: int
    counts: tuple[int, ...]

    def fields(self):
        """The fields that matter to this operation."""
        return {
            "barrier": (),
            "broadcast": ("dtype", "root", "length"),
            "allreduce": ("dtype", "reduction", "length"),
            "allgatherv": ("dtype", "counts"),
            "create_shared_region": ("dtype", "length"),
        }[self.operation]

    def shown(self):
        return (self.operation, *(getattr(self, field) for field in self.fields()))

    def make(self, comm):
        if self.operation == "barrier":
            comm.barrier()
        elif self.operation == "broadcast":
            comm.broadcast(np.zeros(self.length, self.dtype), self.root)
        elif self.operation == "allreduce":
            comm.allreduce(np.zeros(self.length, self.dtype), op=self.reduction)
        elif self.operation == "allgatherv":
            comm.allgatherv(np.zeros(self.counts[comm.rank], self.dtype), None, self.counts)
        else:
            comm.create_shared_region(self.length, self.dtype).close()


def each_field(size):
    return {
        "operation": st.sampled_from(
            ["barrier", "broadcast", "allreduce", "allgatherv", "create_shared_region"]
        ),
        "dtype": st.sampled_from(["<f8", ">f8", "<i8", "<u8", "<f4", "<i4", "|i1"]),
        "reduction": st.sampled_from(list(ReduceOp)),
        "root": st.integers(0, size - 1),
        # One slot of 128 KiB, the border of the direct algorithm, many slots.
        "length": st.integers(1, 5) | st.integers(500, 520) | st.integers(16_000, 50_000),
        "counts": st.tuples(*[st.integers(0, 5) | st.integers(16_000, 20_000)] * size),
    }


@st.composite
def cases(draw, size):
    """What all ranks call, what one of them calls instead, and which one."""
    strategies = each_field(size)
    usual = draw(st.builds(Call, **strategies))
    fields = ["operation", "order", *usual.fields()]
    field = draw(st.sampled_from(fields))
    odd = draw(st.integers(0, size - 1))
    if field == "order":
        other = draw(
            st.builds(Call, **strategies).filter(lambda other: other.shown() != usual.shown())
        )
        return (usual, other), (other, usual), odd
    value = draw(strategies[field].filter(lambda value: value != getattr(usual, field)))
    return (usual,), (replace(usual, **{field: value}),), odd


def make_odd_calls(comm, cases_of_group):
    """Run each case in a group of its own; return what this rank was told in each."""
    told = []
    for usual, different, odd in cases_of_group:
        with comm.split_local() as group:
            try:
                for call in different if comm.rank == odd else usual:
                    call.make(group)
            except CollectiveMismatch as error:
                with pytest.raises(CollectiveMismatch):
                    group.barrier()
                told.append(error.calls)
            else:
                told.append(None)
    return told


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "groups", [9, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_any_single_difference_is_a_mismatch_on_every_rank(size, groups):
    @settings(max_examples=groups)
    @given(st.lists(cases(size), min_size=CASES_PER_GROUP, max_size=CASES_PER_GROUP))
    def check(cases_of_group):
        told = results_of(run_ranks(make_odd_calls, size, "shm", cases_of_group))
        for case, per_rank in zip(cases_of_group, zip(*told, strict=True), strict=True):
            usual, different, odd = case
            calls = per_rank[0]
            assert calls is not None, f"not noticed: {case}"
            assert all(other == calls for other in per_rank), case
            assert len(calls) == size
            assert calls[odd].startswith(different[0].operation)
            others = {text for rank, text in enumerate(calls) if rank != odd}
            assert len(others) == 1
            assert others.pop().startswith(usual[0].operation)
            assert calls.count(calls[odd]) == 1, f"the table does not show it: {calls}"

    check()
