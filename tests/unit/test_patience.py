"""What a waiting rank does as time goes by: it warns, gives up, begins anew when things move."""

import os

import numpy as np
import pytest

pytest.importorskip("posix_ipc")

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.segment import patience
from cobre_shm.segment.patience import Patience, look_secs
from cobre_shm.segment.poison import Poison, read_poison
from cobre_shm.segment.process import start_time
from cobre_shm.segment.segment import Segment
from cobre_shm.shm.state import let_sleep

LIMIT, WARN = 60.0, 10.0
EPOCH = 5


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        raise AssertionError("only where futex is refused")


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(patience, "time", made)
    monkeypatch.setattr(patience, "ask_for_stacks", lambda segment, ranks: None)
    return made


@pytest.fixture
def segment():
    """Of three ranks, all of them this process, of which rank 0 is one epoch late."""
    made = Segment.create(Segment.random_name(), 3, slot_bytes=4096)
    made.unlink()
    for rank in range(3):
        made.words.store(made.control(rank) + layout.PID, os.getpid())
        made.words.store(made.control(rank) + layout.START, start_time(os.getpid()))
        arrive(made, rank, EPOCH - (rank == 0))
    yield made
    made.close()


def arrive(segment, rank, epoch):
    line = layout.ARRIVAL + (epoch & 1) * layout.ARRIVAL_BYTES
    segment.words.store(segment.control(rank) + line, epoch)


def finish_steps(segment, rank, steps):
    segment.words.store(segment.control(rank) + layout.STEPS, steps)


def patient(segment, rank, limit, warn):
    return Patience(segment, rank, limit, warn, look_secs(segment, limit, warn))


def pass_time(clock, seconds, look, every=0.5):
    """Look until so much time has passed; return what was said first, and when."""
    begun = clock.now
    while clock.now < begun + seconds:
        clock.now += every
        first = look()
        if first is not None:
            return first, clock.now - begun
    return None


def test_wait_in_which_nothing_moves_ends_at_the_limit(segment, clock):
    waiting = patient(segment, 1, LIMIT, WARN)
    found = pass_time(clock, 2 * LIMIT, lambda: waiting.look(EPOCH))
    assert found is not None
    first, seconds = found
    assert first == Poison(layout.TIMED_OUT, 1, 0) == read_poison(segment)
    assert LIMIT < seconds <= LIMIT + 1


def test_any_progress_of_any_rank_begins_the_time_anew(segment, clock, capfd):
    waiting = patient(segment, 2, LIMIT, LIMIT)
    moves = [
        *(lambda done=done: finish_steps(segment, 1, done) for done in (1, 2, 3)),
        lambda: arrive(segment, 0, EPOCH),
    ]
    # Nearly five times the limit in all.
    for move in moves:
        assert pass_time(clock, LIMIT - 1, lambda: waiting.look(EPOCH)) is None
        move()
    assert pass_time(clock, LIMIT - 1, lambda: waiting.look(EPOCH)) is None
    assert pass_time(clock, 2, lambda: waiting.look(EPOCH)) is not None
    assert capfd.readouterr().err == ""


def test_infinite_limit_is_never_over(segment, clock):
    waiting = patient(segment, 1, float("inf"), WARN)
    assert pass_time(clock, 10**6, lambda: waiting.look(EPOCH), every=1000) is None


def test_warning_comes_after_its_time_and_then_every_six_times_as_long(segment, clock, capfd):
    waiting = patient(segment, 1, float("inf"), WARN)
    waiting.look(EPOCH)
    said = []
    for _ in range(2 * 200):
        clock.now += 0.5
        waiting.look(EPOCH)
        if line := capfd.readouterr().err:
            said.append((clock.now - 1000.0, line))
    assert [seconds for seconds, _ in said] == [10.5, 70.5, 130.5, 190.5]
    for _, line in said:
        assert f"for rank 0 (pid {os.getpid()}, running; has called nothing yet)" in line


def test_warning_is_given_by_the_lowest_rank_that_waits(segment, clock, capfd):
    waits = [patient(segment, rank, LIMIT, WARN) for rank in (1, 2)]
    for each in waits:
        each.look(EPOCH)
    clock.now += WARN + 1
    waits[1].look(EPOCH)
    assert capfd.readouterr().err == ""
    waits[0].look(EPOCH)
    assert capfd.readouterr().err.count("\n") == 1


def test_rank_that_moved_is_late_only_after_the_whole_time_again(segment, clock, capfd):
    waiting = patient(segment, 1, LIMIT, WARN)
    assert pass_time(clock, WARN - 1, lambda: waiting.look(EPOCH)) is None
    finish_steps(segment, 0, 1)
    assert pass_time(clock, WARN - 1, lambda: waiting.look(EPOCH)) is None
    assert capfd.readouterr().err == ""
    assert pass_time(clock, 3, lambda: waiting.look(EPOCH)) is None
    assert "have waited 1" in capfd.readouterr().err


@pytest.mark.parametrize(("is_marked", "least", "most"), [(0, 0.2, 0.5), (1, 0.9, 1.3)])
def test_process_table_is_asked_more_seldom_for_ranks_whose_death_is_marked(
    segment, clock, is_marked, least, most
):
    for rank in range(3):
        segment.words.store(segment.control(rank) + layout.GUARDED, is_marked)
    # It is another process.
    segment.words.store(segment.control(0) + layout.START, start_time(os.getpid()) + 1)
    waiting = patient(segment, 1, LIMIT, WARN)
    first, seconds = pass_time(clock, 5, lambda: waiting.look(EPOCH), every=0.05)
    assert first == Poison(layout.DIED, 0, 0)
    assert least < seconds < most


@pytest.mark.parametrize("has_arrived", [False, True])
def test_rank_that_has_left_is_missed_unless_it_did_its_part(segment, clock, has_arrived):
    waiting = patient(segment, 1, LIMIT, WARN)
    if has_arrived:
        arrive(segment, 0, EPOCH)
    segment.words.store(segment.control(0) + layout.STATE, layout.CLOSED)
    assert waiting.look(EPOCH) == (None if has_arrived else Poison(layout.LEFT, 0, 0))


@pytest.mark.parametrize(
    ("marked", "ranks", "watches"), [(3, 3, True), (2, 3, False), (3, 126, True), (3, 127, False)]
)
def test_sleeper_watches_all_if_the_kernel_marks_all_and_they_are_not_too_many(
    segment, marked, ranks, watches
):
    for rank in range(marked):
        segment.words.store(segment.control(rank) + layout.GUARDED, 1)
    state = np.zeros(context.WORDS, dtype=np.int64)
    room = np.zeros((ranks + 2, context.WATCH_BYTES // 8), dtype=np.int64)
    let_sleep(state, segment, 1.0, room)
    assert state[context.WATCH_LIST] == (room.ctypes.data if watches else 0)
    assert state[context.SLICE_NS] == 10**9


def test_slice_is_not_as_short_as_a_limit_may_be(segment):
    state = np.zeros(context.WORDS, dtype=np.int64)
    let_sleep(state, segment, 1e-9, np.zeros((5, 3), dtype=np.int64))
    assert state[context.SLICE_NS] == 20_000_000
