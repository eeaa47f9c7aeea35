"""Shared regions when something goes wrong, and what of them is where in memory."""

import gc
import itertools
import logging
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.errors import AllocationFailed, RankFailed
from cobre_shm.segment import pages, unnamed
from cobre_shm.segment.pages import HUGE_PAGE_BYTES, share_of
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.support.memory import resident_bytes
from tests.support.ranks import results_of, run_ranks

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def names_left(prefix):
    return [path.name for path in Path("/dev/shm").glob(f"{prefix.lstrip('/')}*")]


def split_while_rank_0_dies(comm, place):
    if comm.rank == 0:
        maker = Segment if place == "_make_ready" else comm
        setattr(maker, place, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RankFailed):
        comm.split_local()
    return names_left(comm._segment.region_prefix)


# It has a name and is not ready; it is, and nobody knows its name.
@pytest.mark.parametrize("place", ["_make_ready", "broadcast"])
def test_segment_of_a_group_whose_maker_died_is_removed_by_the_others(place):
    _, *others = run_ranks(split_while_rank_0_dies, 3, "shm", place)
    assert [outcome.result for outcome in others] == [[], []], others


def mappings_of(prefix):
    """The entries of smaps that map memory of the group: a dictionary of kB, and VmFlags."""
    found, entry = [], None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            entry = {} if prefix in line else None
            found += [] if entry is None else [entry]
        elif entry is not None:
            entry[name] = value.split() if name == "VmFlags" else int(value.split()[0])
    return found


# Death


def die_before_the_fence(comm, victim, rows):
    prefix = comm._segment.region_prefix
    region = comm.create_shared_region((comm.size, rows), "i8")
    mine = region.array[comm.rank]
    mine[: rows // 2] = comm.rank
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    mine[rows // 2 :] = comm.rank
    with pytest.raises(RankFailed) as caught:
        region.fence()
    for call in (region.fence, region.freeze):
        with pytest.raises(RankFailed):
            call()
    # What is mapped stays readable, and closing it is no collective.
    assert (mine == comm.rank).all()
    region.close()
    assert len(mappings_of(prefix)) == 1
    del mine
    gc.collect()
    return caught.value.rank, names_left(prefix), mappings_of(prefix)


@pytest.mark.parametrize("victim", [0, 2], ids=["leader", "follower"])
def test_death_during_population_is_told_at_the_fence(victim):
    for outcome in run_ranks(die_before_the_fence, 3, "shm", victim, 100_000):
        if outcome.rank != victim:
            assert outcome.error is None, outcome.traceback
            assert outcome.result == (victim, [], [])


def die_between_fence_and_freeze(comm, victim):
    region = comm.create_shared_region(1000)
    region.array[comm.rank] = 1
    region.fence()
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankFailed) as caught:
        region.freeze()
    return caught.value.rank, region.array[: comm.size].tolist()


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "follower"])
def test_death_before_freeze_is_told_and_the_data_stay(victim):
    for outcome in run_ranks(die_between_fence_and_freeze, 2, "shm", victim):
        if outcome.rank != victim:
            assert outcome.error is None, outcome.traceback
            assert outcome.result == (victim, [1.0, 1.0])


# Frozen


def write_through_an_old_view(comm, culprit):
    region = comm.create_shared_region(1000, "i8")
    old = region.array[:]
    region.array[comm.rank] = 7
    region.freeze()
    comm.barrier()
    if comm.rank == culprit:
        for call in (region.array.__setitem__, region.fill_slice):
            with pytest.raises(ValueError, match="read-only"):
                call(0, np.ones(1, "i8"))
        with pytest.raises(ValueError, match="WRITEABLE"):
            region.array.flags.writeable = True
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        old[0] = -1
    with pytest.raises(RankFailed) as caught:
        region.fence()
    return caught.value.rank, region.array[:2].tolist()


def test_write_to_a_frozen_region_never_reaches_the_data():
    leader, follower = run_ranks(write_through_an_old_view, 2, "shm", 1)
    assert follower.signal == signal.SIGSEGV
    assert leader.error is None, leader.traceback
    assert leader.result == (1, [7, 7])


# Endings


def close_in_any_order(comm, seed):
    prefix = comm._segment.region_prefix
    own = random.Random(seed * 100 + comm.rank)
    regions = [comm.create_shared_region(3000 + index, "i4") for index in range(8)]
    views = {}
    for index, region in enumerate(regions):
        region.fill_slice(1000 * comm.rank, np.full(900, index, "i4"))
        region.fence()
        if index == 5:
            region.freeze()
        if own.random() < 0.5:
            views[index] = region.array[::7]
    for index in own.sample(range(len(regions)), k=len(regions)):
        time.sleep(0.001 * own.randrange(3))
        regions[index].close()
        regions[index].close()
        assert regions[index].array.size == 0
    view = None
    for index, view in views.items():
        assert view[0] == view[100] == index
    kept = len(mappings_of(prefix)) - len(views)
    views.clear()
    del view
    return kept, len(mappings_of(prefix)), names_left(prefix)


@pytest.mark.parametrize("seed", range(3))
def test_regions_are_closed_in_any_order(seed):
    assert results_of(run_ranks(close_in_any_order, 3, "shm", seed)) == [(0, 0, [])] * 3


def drop_without_closing(comm):
    prefix = comm._segment.region_prefix
    gc.disable()
    region = comm.create_shared_region(10_000)
    view = region.array[5:]
    region.fence()
    del region
    held = len(mappings_of(prefix))
    del view
    dropped = len(mappings_of(prefix))
    gc.enable()
    return held, dropped, names_left(prefix)


def test_region_without_references_is_unmapped_at_once():
    assert results_of(run_ranks(drop_without_closing, 2)) == [(1, 0, [])] * 2


def close_communicator_first(comm):
    region = comm.create_shared_region(100)
    region.fill_slice(10 * comm.rank, np.full(10, comm.rank + 1.0))
    region.fence()
    comm.close()
    values = region.array[: 10 * comm.size : 10].tolist()
    region.close()
    return values


def test_region_outlives_its_communicator():
    assert results_of(run_ranks(close_communicator_first, 2)) == [[1.0, 2.0]] * 2


def make_in_a_loop(comm, rounds):
    """What this process holds in the middle and at the end of a loop that makes regions."""
    prefix, seen = comm._segment.region_prefix, []
    for turn in range(rounds):
        region = comm.create_shared_region(3000, "i4")
        region.array[comm.rank] = turn
        if turn % 2:
            region.close()
        # The other half is closed by the end of its last reference.
        del region
        if turn in (rounds // 2, rounds - 1):
            comm.barrier()
            maps = Path("/proc/self/maps").read_bytes().count(b"\n")
            seen.append((resident_bytes(), maps, len(list(Path("/proc/self/fd").iterdir()))))
    return seen, mappings_of(prefix), names_left(prefix)


@pytest.mark.parametrize("rounds", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_making_and_closing_in_a_loop_stays_flat(rounds):
    for seen, mapped, named in results_of(run_ranks(make_in_a_loop, 2, "shm", rounds)):
        (resident, maps, files), (resident_later, maps_later, files_later) = seen
        # Python's own tables grow in steps, once in a while.
        assert resident_later - resident < 4 << 20
        assert maps_later - maps < 10
        assert files_later == files
        assert (mapped, named) == ([], [])


# Memory


def ask_for_too_much(comm):
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == 0:
            # The mount may be larger than the memory behind it.
            patch.setattr(unnamed, "available_bytes", lambda: 1 << 20)
        with pytest.raises(AllocationFailed) as caught:
            comm.create_shared_region(1 << 18)
        small = comm.create_shared_region(1 << 10)
        small.close()
    return str(caught.value)


def test_more_than_the_machine_has_left_is_refused_before_it_is_taken():
    poor, other = results_of(run_ranks(ask_for_too_much, 2))
    assert "1048576 bytes of memory are available" in poor
    assert "refused on another rank" in other


def fill_the_mount(comm, victim):
    """The file system says that there is room, and has none when it comes to it."""
    prefix = comm._segment.region_prefix

    def refuse(*args):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == victim:
            patch.setattr("cobre_shm.segment.region.populate", refuse)
        with pytest.raises(AllocationFailed) as caught:
            comm.create_shared_region(1 << 18)
    gc.collect()
    return str(caught.value), names_left(prefix), mappings_of(prefix)


@pytest.mark.parametrize("victim", [0, 1])
def test_share_that_is_refused_to_one_rank_is_an_error_on_all(victim):
    results = results_of(run_ranks(fill_the_mount, 2, "shm", victim))
    assert "/dev/shm has" in results[victim][0]
    assert "refused on another rank" in results[1 - victim][0]
    assert [rest for _, *rest in results] == [[[], []]] * 2


def resident_share(comm, nbytes):
    region = comm.create_shared_region(nbytes, "u1")
    (mapping,) = mappings_of(comm._segment.region_prefix)
    region.fence()
    first, last = share_of(nbytes, comm.rank, comm.size)
    return mapping["Rss"] * 1024 - (last - first)


@pytest.mark.parametrize("nbytes", [40 << 20, 999_424])
def test_each_rank_allocates_its_block(nbytes):
    kernel = tuple(int(text) for text in re.findall(r"\d+", os.uname().release)[:2])
    if kernel < (5, 14):
        pytest.skip("this kernel cannot populate mappings: pages are allocated without a trace")
    assert results_of(run_ranks(resident_share, 3, "shm", nbytes)) == [0] * 3


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 12345, (6 << 20) + 5, 40 << 20])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_consecutive_and_begin_on_pages(nbytes, size):
    shares = [share_of(nbytes, rank, size) for rank in range(size)]
    assert (shares[0][0], shares[-1][1]) == (0, nbytes)
    for (first, end), (begin, _) in itertools.pairwise(shares):
        assert first <= end == begin
        assert begin % 4096 == 0 or begin == nbytes
    if nbytes >= size * HUGE_PAGE_BYTES:
        assert all(first % HUGE_PAGE_BYTES == 0 for first, _ in shares)


def flags_of_mappings(hugepages):
    config = ShmConfig(Segment.random_name(), 0, 1, hugepages=hugepages)
    with ShmCommunicator(config) as comm, comm.create_shared_region(8 << 20, "u1") as region:
        array = comm.zeros(8 << 20, "u1")
        found = mappings_of(comm._segment.region_prefix)
        assert not region.array.any()
        assert not array.any()
    assert len(found) == 2
    return [(entry["VmFlags"], entry["ShmemPmdMapped"]) for entry in found]


@pytest.mark.skipif(not _HUGE_PAGES.exists(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize(("hugepages", "flag"), [("auto", "hg"), ("always", "hg"), ("never", "nh")])
def test_system_is_told_about_huge_pages(hugepages, flag):
    for flags, huge in flags_of_mappings(hugepages):
        assert flag in flags
        assert huge == 0 or hugepages != "never"


def test_refused_huge_pages_are_no_error(monkeypatch):
    def refuse(*args):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pages, "_advise", refuse)
    for hugepages in ("auto", "always", "never"):
        flags_of_mappings(hugepages)


def test_interleaving_on_one_node_is_a_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(pages, "_memory_nodes", lambda: [0])
    caplog.set_level(logging.INFO, "cobre_shm")
    config = ShmConfig(Segment.random_name(), 0, 1, numa_interleave=True)
    with ShmCommunicator(config) as comm:
        comm.create_shared_region(1000).close()
        assert caplog.text.count("one memory node") == 1


def test_refused_interleaving_is_a_warning(monkeypatch, caplog):
    # Nodes that this machine has not: EINVAL.
    monkeypatch.setattr(pages, "_memory_nodes", lambda: [998, 1000])
    config = ShmConfig(Segment.random_name(), 0, 1, numa_interleave=True)
    with ShmCommunicator(config) as comm, comm.create_shared_region(1000) as region:
        region.array[:] = 1
    assert "refused" in caplog.text


@pytest.mark.parametrize(
    ("text", "nodes"), [("0\n", [0]), ("0-1,4\n", [0, 1, 4]), ("", []), ("x", [])]
)
def test_memory_nodes_are_read_as_the_kernel_writes_them(monkeypatch, tmp_path, text, nodes):
    (tmp_path / "online").write_text(text)
    monkeypatch.setattr(pages, "_NODES", tmp_path / "online")
    assert pages._memory_nodes() == nodes
    monkeypatch.setattr(pages, "_NODES", tmp_path / "absent")
    assert pages._memory_nodes() == []


def test_pages_are_spread_over_the_nodes_that_there_are(monkeypatch):
    calls = []

    class Libc:
        @staticmethod
        def syscall(number, address, nbytes, mode, mask, bits, flags):
            calls.append((number.value, mode.value, list(mask), bits.value, flags.value))
            return 0

    monkeypatch.setattr(pages, "_LIBC", Libc)
    monkeypatch.setattr(pages, "_memory_nodes", lambda: [0, 1, 70])
    pages._interleave(4096, 4096)
    assert calls == [(237, 3, [3, 1 << 6], 129, 0)]
