"""The symmetric heap: where blocks are, when they are used again, what stays at the end."""

import ctypes
import gc
import resource
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.errors import AllocationFailed, CollectiveMismatch, InvalidCommunicator, RankFailed
from cobre_shm.segment import shared_heap
from cobre_shm.segment.common import MemorySource
from tests.faults.programs import kill_self
from tests.support.memory import resident_bytes
from tests.support.ranks import results_of, run_ranks


def heap_of(comm, areas=None):
    return comm._new_heap(comm.size if areas is None else areas)


def offset_of(heap, array):
    """Where an array of this rank begins in its area."""
    offset = array.ctypes.data - heap.address(heap._own_area, 0)
    assert 0 <= offset <= heap.nbytes - array.nbytes
    return offset


def ints_at(address, count):
    return (ctypes.c_int64 * count).from_address(address)


def reserved_and_mapped(prefix):
    """Addresses without memory that this process has reserved, and mappings of the group."""
    reserved = mapped = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(text, 16) for text in line.split()[0].split("-"))
        if " ---p 00000000 00:00 0" in line and last - first > 1 << 30:
            reserved += 1
        mapped += prefix in line
    return reserved, mapped


def read_each_other(comm):
    heap = heap_of(comm)
    offsets = []
    for turn in range(20):
        # The first growth, and more; every rank asks for another size.
        array = heap.array((100_000 * (turn % 4) + 1 + comm.rank,), np.dtype("i8"))
        array[:] = 100 * turn + comm.rank
        offset = offset_of(heap, array)
        comm.barrier()
        for rank in range(comm.size):
            ends = ints_at(heap.address(rank, offset), array.size - comm.rank + rank)
            assert (ends[0], ends[-1]) == (100 * turn + rank,) * 2
        offsets.append(offset)
        comm.barrier()
    return offsets


@pytest.mark.parametrize("size", [1, 3])
def test_block_is_at_the_same_offset_of_every_ranks_area(size):
    first, *others = results_of(run_ranks(read_each_other, size))
    assert all(offset % 64 == 0 for offset in first)
    assert all(other == first for other in others)


def share_one(comm):
    heap = heap_of(comm, areas=1)
    block = heap.allocate(8 * comm.size)
    array = heap.view(block, 0, (comm.size,), np.dtype("i8"))
    array[comm.rank] = comm.rank
    comm.barrier()
    assert array.tolist() == list(range(comm.size))
    assert offset_of(heap, array) == block.offset
    comm.barrier()
    return block.offset


def test_with_one_area_all_ranks_have_the_same_memory():
    assert results_of(run_ranks(share_one, 3)) == [0] * 3


def drop_at_different_times(comm):
    """The block is free when the last rank drops it, not before."""
    heap = heap_of(comm)
    dtype = np.dtype("i8")
    kept = heap.array((1000,), dtype)
    first = offset_of(heap, kept)
    view = kept[10:20][::2]
    del kept
    places = []
    for rank in range(comm.size):
        if comm.rank == rank:
            del view  # so far a view has kept it
        other = heap.array((1000,), dtype)
        places.append(offset_of(heap, other))
        del other
    return [place == first for place in places]


def test_block_is_used_again_when_all_ranks_have_dropped_it():
    for found in results_of(run_ranks(drop_at_different_times, 3)):
        assert found == [False, False, True]


def drop_late(comm):
    """Blocks that were dropped long after they were made are found before the heap grows."""
    heap = heap_of(comm)
    dtype = np.dtype("u1")
    old = [heap.array((100_000,), dtype) for _ in range(15)]
    full = heap.nbytes
    recent = [heap.array((100,), dtype) for _ in range(50)]
    del old
    more = [heap.array((100_000,), dtype) for _ in range(15)]
    assert heap.nbytes == full
    return len(recent) + len(more)


def test_heap_does_not_grow_while_enough_is_dropped():
    assert results_of(run_ranks(drop_late, 2)) == [65, 65]


def allocate_in_a_loop(comm, rounds):
    """Return the bytes of the heap and of this process half way, and at the end."""
    kept = comm.zeros(1000)
    seen = []
    for turn in range(rounds):
        array = comm.empty(1 + turn % 3000)
        array[0] = turn
        if turn % 7 == 0:
            kept = array
        del array
        if turn in (rounds // 2, rounds - 1):
            gc.collect()
            seen.append((comm._heap.nbytes, len(comm._heap._live), resident_bytes()))
    assert kept.size
    return seen


@pytest.mark.parametrize(
    ("rounds", "size"), [(4_000, 2), pytest.param(100_000, 2, marks=pytest.mark.slow)]
)
def test_allocating_and_dropping_in_a_loop_stays_flat(rounds, size):
    for before, after in results_of(run_ranks(allocate_in_a_loop, size, "shm", rounds)):
        assert before[0] == after[0] <= 4 << 20
        assert after[1] <= 4
        assert after[2] - before[2] < 256 << 10


def close_and_drop(comm):
    prefix = comm._segment.region_prefix
    others = reserved_and_mapped(prefix)
    array = comm.full(1000, comm.rank, "i8")
    inside = reserved_and_mapped(prefix)
    comm.close()
    view = array[500:]
    del array
    gc.collect()
    assert (view == comm.rank).all()
    closed = reserved_and_mapped(prefix)
    del view
    return others, inside, closed, reserved_and_mapped(prefix)


def test_mapping_stays_with_the_last_view_and_goes_with_it():
    for others, inside, closed, dropped in results_of(run_ranks(close_and_drop, 2)):
        assert others == dropped == (0, 0)
        assert inside == closed
        assert min(inside) >= 2


def exhaust(comm, refuse):
    """Growth fails on one rank alone; all are told, and the heap serves on."""
    prefix = comm._segment.region_prefix
    heap = heap_of(comm)
    kept = heap.array((1000,), np.dtype("i8"))
    kept[:] = comm.rank
    before = heap.nbytes, reserved_and_mapped(prefix)
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == refuse:
            patch.setattr(shared_heap, "map_shared", _refuse)
        with pytest.raises(AllocationFailed) as caught:
            heap.allocate(50 << 20)
    assert caught.value.requested_bytes == 50 << 20
    assert (heap.nbytes, reserved_and_mapped(prefix)) == before
    assert comm.allreduce(np.ones(1))[0] == comm.size
    again = heap.array((5 << 20,), np.dtype("u1"))
    again[:] = 1
    assert (kept == comm.rank).all()
    return offset_of(heap, again), str(caught.value)


def _refuse(*args, **kwargs):
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("refuse", [0, 1])
def test_growth_that_one_rank_cannot_map_is_an_error_on_all(refuse):
    results = results_of(run_ranks(exhaust, 2, "shm", refuse))
    assert results[0][0] == results[1][0] >= 0
    assert "Cannot allocate memory" in results[refuse][1]
    assert "refused on another rank" in results[1 - refuse][1]


def few_addresses(comm, poor):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if comm.rank == poor:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), limits[1]))
    heap = heap_of(comm)
    array = heap.array((1000,), np.dtype("i8"))
    array[:] = 1
    with pytest.raises(AllocationFailed) as caught:
        heap.allocate(1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    return heap.stride, caught.value.suggestion


def test_stride_is_what_every_rank_can_reserve():
    (stride, told), (other, _) = results_of(run_ranks(few_addresses, 2, "shm", 1))
    assert stride == other
    assert 2 << 20 <= stride <= 300 << 20
    assert "ulimit -v" in told


def no_addresses(comm, poor):
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == poor:
            patch.setattr(shared_heap, "Mapping", _refuse)
        with pytest.raises(AllocationFailed) as caught:
            comm.empty(10)
    assert reserved_and_mapped(comm._segment.region_prefix) == (0, 0)
    return comm.zeros(10).sum(), str(caught.value)


def test_rank_without_addresses_is_an_error_on_all_and_passes():
    for total, told in results_of(run_ranks(no_addresses, 2, "shm", 1)):
        assert total == 0
        assert "ulimit -v" in told


def interrupt_an_allocation(comm, victim, place):
    heap = heap_of(comm)
    kept = heap.array((10,), np.dtype("f8"))
    kept[:] = comm.rank
    nbytes = 10 if place == "take" else 8 << 20  # the latter does not fit: the heap grows
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == victim:
            owner = shared_heap.FreeSpace if place == "take" else MemorySource
            patch.setattr(owner, place, _interrupt)
            with pytest.raises(KeyboardInterrupt):
                heap.allocate(nbytes)
        else:
            others = heap.view(heap.allocate(nbytes), victim, (nbytes,), np.dtype("u1"))
            others[:] = 7
    for _ in range(2):
        with pytest.raises(InvalidCommunicator):
            heap.allocate(10)
    if comm.rank == victim and place == "remove_names":
        # Peers have arrays behind what this rank believes to be the end: no hole may be there.
        ctypes.c_uint8.from_address(heap.address(1 - victim, heap.nbytes)).value  # noqa: B018
    return kept.sum(), comm.allreduce(np.ones(1))[0]


def _interrupt(*args):
    raise KeyboardInterrupt


def test_interrupted_allocation_is_told_on_all_ranks_at_the_next_one():
    results = results_of(run_ranks(interrupt_an_allocation, 2, "shm", 1, "take"))
    assert results == [(0, 2), (10, 2)]


def test_interrupted_growth_leaves_no_hole_where_peers_have_memory():
    results = results_of(run_ranks(interrupt_an_allocation, 2, "shm", 1, "remove_names"))
    assert results == [(0, 2), (10, 2)]


def interrupt_empty(comm, victim):
    kept = comm.empty(10)
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == victim:
            patch.setattr(shared_heap.FreeSpace, "take", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                comm.empty(10)
        else:
            comm.empty(10)
    with pytest.raises(RankFailed, match="interrupted") as caught:
        comm.empty(10)
    assert kept.size == 10
    return caught.value.rank


def test_interrupted_empty_fails_the_group():
    assert results_of(run_ranks(interrupt_empty, 2, "shm", 1)) == [1, 1]


def take_few_addresses(comm):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limits[1]))
    heap = heap_of(comm)
    kept = heap.array((10,), np.dtype("f8"))
    more = np.empty(2 << 30, np.uint8)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    return heap.stride * comm.size, kept.size + more.size


def test_limited_addresses_are_left_to_the_program():
    for taken, _ in results_of(run_ranks(take_few_addresses, 2)):
        assert taken <= 1 << 30


def call_something_else(comm):
    comm.zeros(4)
    with pytest.raises(CollectiveMismatch) as caught:
        comm.barrier() if comm.rank == 1 else comm.empty(4)
    return caught.value.calls


def test_allocation_against_another_collective_is_a_mismatch_that_names_it():
    assert (
        results_of(run_ranks(call_something_else, 2)) == [["empty (shared array)", "barrier"]] * 2
    )


def die_while_growing(comm, victim):
    kept = comm.full(100, comm.rank, "i8")
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == victim:
            patch.setattr(shared_heap, "map_shared", lambda *args, **kwargs: kill_self(comm))
        with pytest.raises(RankFailed) as caught:
            comm.empty(100 << 20, "u1")
    assert (kept == comm.rank).all()
    return caught.value.rank, comm._segment.region_prefix


@pytest.mark.parametrize("victim", [0, 1])
def test_death_while_the_heap_grows_is_told_and_leaves_no_name(victim):
    outcomes = run_ranks(die_while_growing, 3, "shm", victim)
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.error is None, outcome.traceback
            rank, prefix = outcome.result
            assert rank == victim
            assert not list(Path("/dev/shm").glob(f"{prefix.lstrip('/')}*"))


def fail_to_undo(comm, victim, nbytes):
    """The growth that one rank can neither do nor undo; it could do a second one."""
    refusals = iter([_refuse])
    kept = comm.full(10, comm.rank, "i8")
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == victim:
            make = shared_heap.map_shared
            patch.setattr(
                shared_heap,
                "map_shared",
                lambda *args, **kwargs: next(refusals, make)(*args, **kwargs),
            )
            reserve = shared_heap.reserve
            patch.setattr(
                shared_heap,
                "reserve",
                lambda nbytes, at=None: reserve(nbytes) if at is None else _refuse(),
            )
        with pytest.raises(AllocationFailed):
            comm.empty(nbytes, "u1")
    for _ in range(2):
        with pytest.raises(InvalidCommunicator, match="broken off"):
            comm.empty(10)
    assert comm._heap._mapping.release.alive == (comm.rank != victim)
    assert (kept == comm.rank).all()
    return comm.allreduce(np.ones(1))[0]


# Of the smaller one less would do than is asked for first.
@pytest.mark.parametrize("nbytes", [50 << 20, 9 << 19])
def test_growth_that_one_rank_cannot_undo_is_the_same_error_on_all(nbytes):
    assert results_of(run_ranks(fail_to_undo, 2, "shm", 1, nbytes)) == [2, 2]
