"""A segment that somebody has written into: refused, or an error, and never a crash or a hang."""

import mmap
import os
import random
import struct
import time
import uuid
from dataclasses import replace

import numpy as np
import pytest

from cobre_shm import layout
from cobre_shm.errors import CobreError, CollectiveFailed, InitializationFailed
from cobre_shm.segment import attach
from cobre_shm.segment import observe as observing
from cobre_shm.segment.attach import segments_open_in
from cobre_shm.segment.failure import failure, mismatch
from cobre_shm.segment.join import leave
from cobre_shm.segment.lateness import lateness
from cobre_shm.segment.libc import RobustMutex
from cobre_shm.segment.patience import Patience
from cobre_shm.segment.poison import Poison, read_poison
from cobre_shm.segment.posix import DIRECTORY
from cobre_shm.segment.recorder import entries, last_entry
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.support.backends import BACKENDS
from tests.support.ranks import RankDied, RankGroup, RanksTimedOut, results_of, run_ranks

SLOT = 4096
MUTEX_BYTES = 40
# Where a mutex keeps its links of the list of held ones.
LINKS = range(24, MUTEX_BYTES, 8)
DESCRIPTOR = (
    0,
    layout.HEADER_VERSION,
    layout.HEADER_LAYOUT_HASH,
    layout.HEADER_SIZE,
    layout.HEADER_SLOT_BYTES,
    layout.HEADER_SEGMENT_BYTES,
    layout.HEADER_PID_NAMESPACE,
)


@pytest.fixture
def name():
    # Not a random one: any launcher of this user removes those whose maker is dead, and that may be
    # what a damaged header says.
    text = f"/cobre-test-{uuid.uuid4().hex}"
    yield text
    (DIRECTORY / text[1:]).unlink(missing_ok=True)


@pytest.fixture
def segment(name):
    made = Segment.create(name, 2, slot_bytes=SLOT)
    yield made
    made.unlink()
    made.close()


def read_everything(segment):
    """All that ranks, the launcher and the monitor make of the shared words."""
    first = read_poison(segment)
    found = [first] if first is not None else []
    for poison in [*found, *(Poison(kind, 1, -9) for kind in range(1, layout.DAMAGED + 1))]:
        error = failure(segment, poison, 1.0)
        assert isinstance(error, CollectiveFailed)
        assert str(error)
    str(mismatch(segment))
    for steps in (0, 1):
        lateness(segment, 0, 1, steps, 1.0)
    for rank in range(segment.size):
        last_entry(segment, rank)
        assert len(entries(segment, rank)) <= layout.RECORDER_ENTRIES
    assert observing.observe(segment).size == segment.size
    assert segment.living_process() >= 0
    assert segment.region_prefix.startswith("/cobre-")


def test_every_flip_of_one_byte_of_the_header_is_refused_or_harmless(segment, name, monkeypatch):
    monkeypatch.setattr(observing, "_LATE_SECS", 0)
    refusing = {start + i for start in DESCRIPTOR for i in range(8)}
    for offset in range(layout.CONTROL):
        original = segment.words.load_bytes(offset, 1)
        flips = range(1, 256) if offset in refusing else (0x01, 0x80, 0xFF)
        for flip in flips:
            segment.words.store_bytes(offset, bytes([original[0] ^ flip]))
            if offset in refusing:
                with pytest.raises(InitializationFailed) as caught:
                    Segment.open(name)
                assert caught.value.context["code"] == "IncompatibleSegment"
            else:
                other = Segment.open(name)
                assert (other.size, other.slot_bytes) == (2, SLOT)
                if offset < layout.HEADER_JOINED + 8:
                    read_everything(other)
                other.close()
        segment.words.store_bytes(offset, original)
    read_everything(segment)


VALUES = (0, 1, -1, 2**63 - 1, -(2**63), 0x4000_0000, 0x7F7F_7F7F_7F7F_7F7F, 2**62 + 255)


def test_any_value_of_any_control_word_can_be_read(segment, monkeypatch):
    monkeypatch.setattr(observing, "_LATE_SECS", 0)
    blocks = [
        range(segment.control(rank), segment.control(rank) + layout.CONTROL_BYTES, 8)
        for rank in (0, 1)
    ]
    heads = [
        [layout.recorder_offset(2) + i * layout.RECORDER_BYTES + j for j in range(0, 128, 8)]
        for i in (0, 1)
    ]
    texts = [layout.last_words_offset(2) + i * layout.LAST_WORDS_BYTES for i in (0, 1)]
    everything = [*range(64, layout.HEADER_JOINED + 8, 8), *texts]
    everything += [offset for part in (*blocks, *heads) for offset in part]
    for offset in everything:
        for value in VALUES:
            original = segment.words.load(offset)
            segment.words.store(offset, value)
            read_everything(segment)
            segment.words.store(offset, original)


def test_recorder_that_jumps_while_it_is_read_is_read_in_bounded_time(segment, monkeypatch):
    real = segment.words.load
    jumps = iter([2**62, 5] * 100)

    def load(offset):
        return next(jumps) if offset == segment.control(0) + layout.RECORDED else real(offset)

    monkeypatch.setattr(segment.words, "load", load)
    assert len(entries(segment, 0)) <= layout.RECORDER_ENTRIES


@pytest.mark.parametrize("word", [0x0000_0005_00FF_FF01, 1 << 63 | 3 << 8 | 1, 200, 0, 2 << 8 | 1])
def test_poison_that_nobody_can_have_written_is_no_rank(segment, word):
    segment.words.store(layout.HEADER_POISON, word - (1 << 64) if word >> 63 else word)
    first = read_poison(segment)
    if word == 0:
        assert first is None
    else:
        assert first == Poison(layout.DAMAGED, 0, 0)
        assert "damaged" in str(failure(segment, first, 1.0))


def damage_own_mutexes(comm):
    """Damage each word of the held mutexes in turn, then close and make new groups."""
    garbage = (0, -1, 0x1234_5678_9ABC_DEF0, 16)
    survived = 0
    for offset in range(0, MUTEX_BYTES, 8):
        for value in garbage:
            config = ShmConfig(name=Segment.random_name(), rank=0, size=1)
            hurt = ShmCommunicator(config)
            segment = hurt._segment
            place = segment.control(0) + layout.DEATH_MUTEX + offset
            segment.words.store(place, value)
            if offset == 0:
                # Somebody says that it is not held: it is.
                segment.words.store(segment.control(0) + layout.GUARDED, 0)
            hurt.close()
            with segment_of_its_own() as other, other.control_lock() as locked:
                assert locked
                other.words.store(layout.HEADER_CONTROL_MUTEX + offset, value)
            with ShmCommunicator(config) as after:
                after.barrier()
            survived += 1
    return survived


class segment_of_its_own:
    def __enter__(self):
        self.segment = Segment.create(Segment.random_name(), 1, slot_bytes=SLOT)
        (DIRECTORY / self.segment.name[1:]).unlink()
        return self.segment

    def __exit__(self, *exception):
        self.segment.close()


def test_damaged_mutexes_are_left_alone():
    (survived,) = results_of(run_ranks(damage_own_mutexes, 1))
    assert survived == 20


def leave_with_a_lying_word(comm):
    """The word that says whether the mutex is held is not believed."""
    segment = comm._segment
    address = segment.words.address
    segment.words.store(segment.control(0) + layout.GUARDED, 0)
    mutex = segment.death_mutex(0)
    assert RobustMutex.is_any_held(address, segment.nbytes)
    leave(segment, 0)
    # It was given back, and is no longer in the list of this thread.
    assert not mutex.unlock()
    return RobustMutex.is_any_held(address, segment.nbytes)


def test_held_mutex_is_given_back_whatever_the_segment_says():
    outcomes = run_ranks(_leave_and_stop, 1)
    assert results_of(outcomes) == [False]


def _leave_and_stop(comm):
    with ShmCommunicator(ShmConfig(name=Segment.random_name(), rank=0, size=1)) as other:
        held = leave_with_a_lying_word(other)
        other._unusable = CollectiveFailed("closed by hand")
        other.close = lambda: None
    return held


def work_for(comm, seconds, elements):
    """Collectives of all kinds for a time; how that ended, for the group was damaged."""
    # Not so soon in joining: on a busy machine the ranks may come one by one.
    comm._config = replace(comm._config, timeout_secs=1.0)
    deadline = time.monotonic() + seconds
    send, recv = np.ones(elements), np.empty(elements)
    counts = np.full(comm.size, 3)
    try:
        turn = 0
        while time.monotonic() < deadline:
            turn += 1
            comm.barrier()
            comm.allreduce(send, recv)
            comm.broadcast(recv, turn % comm.size)
            comm.allgatherv(np.full(3, 1.0), None, counts)
            if turn % 50 == 0:
                comm.create_shared_region(100).close()
            if turn % 120 == 0:
                comm.split_local().close()
    except CobreError as error:
        return type(error).__name__, str(error)
    return "completed", ""


def scribble_over(pid, name, size, generator, seconds):
    """Write random words into the segment of a running group, as another process of this user.

    The links of held mutexes are spared here: glibc follows them in the microsecond after they
    were checked. ``test_damaged_mutexes_are_left_alone`` damages them.
    """
    for _ in range(2000):
        # By its name: the ranks split the group from time to time.
        (watched,) = segments_open_in([pid], name) or [None]
        if watched is not None and watched.words.load(layout.HEADER_JOINED) == 1:
            break
        if watched is not None:
            watched.close()
        time.sleep(0.005)
    else:
        raise AssertionError("the group did not come together")
    # Between what a joined group still looks at and what it does not.
    control = range(layout.CONTROL, layout.recorder_offset(size), 8)
    links = {watched.control(r) + layout.DEATH_MUTEX + link for r in range(size) for link in LINKS}
    links |= {layout.HEADER_CONTROL_MUTEX + link for link in LINKS}
    control = [offset for offset in control if (offset - layout.CONTROL) % 512 < 264]
    control += range(layout.HEADER_CREATOR_PID, layout.HEADER_JOINED + 8, 8)
    control = sorted(set(control) - links)
    others = range(layout.recorder_offset(size), watched.nbytes, 8)
    written = 0
    path = next(path for path, named in attach._shared_descriptors(pid) if named == name)
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, watched.nbytes)
    os.close(fd)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for _ in range(generator.randint(1, 8)):
            offset = generator.choice(control if generator.random() < 0.7 else others)
            value = generator.choice(
                [
                    generator.getrandbits(64),
                    generator.getrandbits(64),
                    generator.randrange(300),
                    1 << generator.randrange(64),
                ]
            )
            struct.pack_into("<Q", memory, offset, value)
            written += 1
        observing.observe(watched)
    memory.close()
    watched.close()
    return written


@pytest.mark.parametrize("size", [2, 3])
def test_random_words_during_a_run_end_in_errors_and_not_in_crashes(size):
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    endings = []
    for _ in range(4):
        connects = BACKENDS["shm"].make_group(size, 10.0)
        elements = generator.choice([1, 600, 40_000])
        with RankGroup(connects, work_for, (5.0, elements)) as group:
            written = scribble_over(group.pids[0], connects[0].name, size, generator, 0.5)
            outcomes = group.outcomes(90)
        assert written
        for outcome in outcomes:
            assert not isinstance(outcome.error, RankDied | RanksTimedOut), outcome.output
            # A rank may still be joining when the first words change.
            assert isinstance(outcome.error, InitializationFailed | None), outcome.traceback
            endings.append(outcome.result or ("InitializationFailed", ""))
    # The noise was noticed: without that nothing was tested.
    assert any(how != "completed" for how, _ in endings), endings


@pytest.mark.parametrize(
    ("own", "peer", "is_possible"),
    [(5, 4, True), (5, 5, True), (5, 6, True), (5, 7, False), (5, -1, False), (4, 5, False)],
)
def test_epoch_that_nobody_can_have_reached_fails_the_group(segment, own, peer, is_possible):
    for rank, epoch in enumerate((own, peer)):
        segment.words.store(segment.control(rank) + layout.ARRIVAL, epoch)
    first = Patience(segment, 0, 60.0, 60.0, 1.0).look(5)
    assert first == (None if is_possible else Poison(layout.DAMAGED, 0, 0))
    assert read_poison(segment) == first
