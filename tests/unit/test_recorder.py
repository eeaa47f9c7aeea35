"""The flight recorder: what it says of a rank, and of one that goes on while it is read."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("posix_ipc")

from cobre_shm import layout
from cobre_shm.datatypes import dtype_tag
from cobre_shm.kernels import context
from cobre_shm.segment import recorder
from cobre_shm.segment.recorder import entries, last_entry
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.words import Words
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator

RING = layout.RECORDER_ENTRIES
F64 = dtype_tag(np.dtype(np.float64))


@pytest.fixture
def comm():
    with ShmCommunicator(ShmConfig(name=Segment.random_name(), rank=0, size=1)) as made:
        yield made


@pytest.fixture(scope="module")
def shared():
    segment = Segment.create(Segment.random_name(), 2, slot_bytes=4096)
    segment.unlink()
    yield segment
    segment.close()


@pytest.fixture
def segment(shared):
    shared.words = Words(shared.words.address)
    clear(shared)
    return shared


def clear(segment):
    segment.words.store_bytes(recorder._ring(segment, 0), bytes(2 * layout.RECORDER_BYTES))
    for rank in range(2):
        segment.words.store(segment.control(rank) + layout.RECORDED, 0)


class Writer:
    """A rank's side of the recorder, one store at a time, in the order of the kernels."""

    def __init__(self, segment, rank=1):
        self._ring = recorder._ring(segment, rank)
        self._recorded = segment.control(rank) + layout.RECORDED
        self._words = Words(segment.words.address)
        self._stores = self._all_stores()
        self.begun = 0

    def store(self, count):
        for _ in range(count):
            next(self._stores)()

    def finish(self, sequence):
        while self.begun < sequence:
            self.store(1)
        self.store(3)

    def _all_stores(self):
        while True:
            sequence = self.begun + 1
            place = self._ring + (sequence - 1) % RING * layout.ENTRY_BYTES
            steps = [
                (place + layout.ENTRY_SEQUENCE, sequence),
                (place + layout.ENTRY_CALL, layout.ALLREDUCE),
                (place + layout.ENTRY_CALL + 8, F64),
                (place + layout.ENTRY_CALL + 16, 10 * sequence),
                (place + layout.ENTRY_START, 1000 * sequence),
                (place + layout.ENTRY_WAITED, 0),
                (place + layout.ENTRY_END, 0),
                (place + layout.ENTRY_STATUS, context.PENDING),
                (self._recorded, sequence),
                (place + layout.ENTRY_WAITED, sequence),
                (place + layout.ENTRY_END, 1000 * sequence + 500),
                (place + layout.ENTRY_STATUS, context.READY),
            ]
            for offset, value in steps:
                if offset == self._recorded:
                    self.begun = sequence
                yield lambda offset=offset, value=value: self._words.store(offset, value)


class RacedWords(Words):
    """The reader's words: before every one that it loads, the writer stores some."""

    def __init__(self, address, race):
        super().__init__(address)
        self._race = race

    def load(self, offset):
        self._race()
        return super().load(offset)

    def load_bytes(self, offset, count):
        return b"".join(
            self.load(offset + i).to_bytes(8, "little", signed=True) for i in range(0, count, 8)
        )


def assert_sound(entry):
    sequence = entry.sequence
    assert entry.call == f"allreduce({10 * sequence} x float64, SUM)"
    assert entry.nbytes == 80 * sequence
    assert entry.start_ns == 1000 * sequence
    if entry.status == "done":
        assert (entry.waited_ns, entry.end_ns - entry.start_ns) == (sequence, 500)
    else:
        assert entry.status == "inside"
        assert entry.is_inside
        assert entry.waited_ns in (0, sequence)


def test_entries_of_every_operation(comm):
    record = np.dtype([("a", "i4"), ("b", "f8")])
    comm.barrier()
    comm.broadcast(np.zeros((2, 3), np.int32))
    comm.allreduce(np.zeros(5), op="max")
    comm.allgatherv(np.zeros(4, np.uint8))
    comm.broadcast(np.zeros(3, record))
    found = entries(comm._segment, 0)
    calls = [re.sub("(counts|record) [0-9a-f]+", r"\1", entry.call) for entry in found]
    assert calls == [
        "barrier",
        "broadcast(6 x int32, root 0)",
        "allreduce(5 x float64, MAX)",
        "allgatherv (counts)(1 x uint8)",
        "allgatherv(4 x uint8, counts)",
        "broadcast(3 x record, root 0)",
    ]
    assert [entry.sequence for entry in found] == [1, 2, 3, 4, 5, 6]
    assert [entry.nbytes for entry in found] == [0, 24, 40, 8, 4, 0]
    times = [time for entry in found for time in (entry.start_ns, entry.end_ns)]
    assert times == sorted(times)
    assert all(entry.status == "done" and entry.waited_ns == 0 for entry in found)
    assert last_entry(comm._segment, 0) == found[-1]


@pytest.mark.parametrize("calls", [0, 1, RING - 1, RING, RING + 1, 3 * RING + 7])
def test_a_rank_at_rest_shows_its_last_256(comm, calls):
    for _ in range(calls):
        comm.barrier()
    sequences = [entry.sequence for entry in entries(comm._segment, 0)]
    assert sequences == list(range(max(1, calls - RING + 1), calls + 1))


def test_making_a_region_or_a_group_moves_no_elements(comm):
    comm.create_shared_region((2, 3)).close()
    region = entries(comm._segment, 0)[0]
    assert region.call.startswith("create_shared_region(6 x float64, shape ")
    assert region.nbytes == 0
    begun = len(entries(comm._segment, 0))
    comm.split_local().close()
    split = entries(comm._segment, 0)[begun]
    assert (split.call, split.nbytes) == ("split_local", 0)


def test_rings_of_ranks_are_apart(segment):
    Writer(segment, rank=1).finish(3)
    assert entries(segment, 0) == []
    assert last_entry(segment, 0) is None
    assert [entry.sequence for entry in entries(segment, 1)] == [1, 2, 3]


def test_statuses_are_those_of_the_kernels():
    assert recorder._STATUSES == {
        context.READY: "done",
        context.PENDING: "inside",
        context.POISONED: "failed",
        context.DEAD: "peer died",
        context.MISMATCH: "mismatch",
        context.LOST: "peer not readable",
        context.LEFT: "peer left",
    }


@given(before=st.integers(0, 12 * 600), per_load=st.integers(0, 3))
def test_what_is_read_beside_a_writer_is_never_torn(shared, before, per_load):
    clear(shared)
    writer = Writer(shared)
    writer.store(before)
    shared.words = RacedWords(shared.words.address, lambda: writer.store(per_load))
    try:
        found = entries(shared, 1)
    finally:
        shared.words = Words(shared.words.address)
    for entry in found:
        assert_sound(entry)
    sequences = [entry.sequence for entry in found]
    assert len(found) <= RING
    assert sequences == list(range(sequences[0], sequences[-1] + 1)) if found else True
    # 2048 loads of the copy and 3 stores for each are two rings: nothing may be left. At one
    # store for each, a third of the ring must be.
    if before >= 12 * RING and per_load <= 1:
        assert len(found) > RING // 4


@pytest.mark.parametrize("stores", range(13))
def test_oldest_place_is_dropped_as_soon_as_it_is_being_replaced(segment, stores):
    writer = Writer(segment)
    writer.finish(2 * RING)
    writer.store(stores)
    found = entries(segment, 1)
    for entry in found:
        assert_sound(entry)
    oldest = RING + 1 if stores == 0 else RING + 2
    assert found[0].sequence == oldest
    assert found[-1].sequence == 2 * RING + (stores >= 9)


@pytest.mark.parametrize("load", range(8, 20))
@pytest.mark.parametrize("stores", [*range(1, 13), 12 * RING])
def test_oldest_place_that_is_replaced_during_the_copy_is_dropped(segment, load, stores):
    writer = Writer(segment)
    writer.finish(2 * RING)
    # The oldest place is the first of the ring: it is copied by the loads 9 to 16.
    interruptions = iter([0] * load + [stores])
    segment.words = RacedWords(segment.words.address, lambda: writer.store(next(interruptions, 0)))
    found = entries(segment, 1)
    assert found
    for entry in found:
        assert_sound(entry)


def test_reader_that_lost_its_core_for_a_whole_ring_reads_again(segment):
    writer = Writer(segment)
    writer.finish(10)
    interruptions = iter([0] * 100 + [12 * 3 * RING])
    segment.words = RacedWords(segment.words.address, lambda: writer.store(next(interruptions, 0)))
    found = entries(segment, 1)
    assert len(found) >= RING - 1
    assert found[-1].sequence >= 3 * RING


@pytest.mark.parametrize("recorded", [-1, -(2**63), 2**62, 2**63 - 1, 5])
def test_count_that_the_ring_does_not_bear_out_yields_nothing(segment, recorded):
    segment.words.store(segment.control(0) + layout.RECORDED, recorded)
    assert entries(segment, 0) == []


@given(seed=st.integers(0, 2**32), recorded=st.integers(1, 3 * RING))
def test_random_bytes_are_read_without_an_error(shared, seed, recorded):
    clear(shared)
    ring = bytearray(random.Random(seed).randbytes(layout.RECORDER_BYTES))
    for sequence in range(max(1, recorded - RING + 1), recorded + 1, 2):
        place = (sequence - 1) % RING * layout.ENTRY_BYTES
        ring[place : place + 8] = sequence.to_bytes(8, "little")
    shared.words.store_bytes(recorder._ring(shared, 0), bytes(ring))
    shared.words.store(shared.control(0) + layout.RECORDED, recorded)
    for entry in entries(shared, 0):
        assert str(entry).isprintable()
