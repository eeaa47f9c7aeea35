"""A rank that dies, leaves or stands still: every survivor knows which, and nobody hangs."""

import os
import random
import re
import signal
import time
from functools import partial

import pytest

from cobre_shm import layout, machine
from cobre_shm.errors import CollectiveTimeout, InitializationFailed, RankFailed
from cobre_shm.segment import patience, stacks
from cobre_shm.segment.attach import segments_open_in
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.faults import programs
from tests.support.backends import BACKENDS
from tests.support.ranks import RankGroup, results_of, run_ranks


def start(function, size, *args, collective_timeout=30.0):
    return RankGroup(BACKENDS["shm"].make_group(size, collective_timeout), function, args)


def wait_until_joined(group):
    """Wait until all ranks of a group have come together."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = segments_open_in([group.pids[0]])
        joined = [segment.words.load(layout.HEADER_JOINED) for segment in found]
        for segment in found:
            segment.close()
        if joined == [1]:
            return
        time.sleep(0.005)
    raise AssertionError("the group did not come together")


def assert_survivors_blame(outcomes, victim, besides=()):
    for outcome in outcomes:
        if outcome.rank == victim or outcome in besides:
            continue
        assert outcome.error is None, outcome.traceback
        error, later = outcome.result
        assert type(error) is RankFailed
        assert error.rank == victim
        assert error.pid == outcomes[victim].pid
        assert f"Rank {victim} (pid {error.pid})" in str(error)
        assert type(later) is RankFailed
        assert later.rank == victim


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("elements", [1, 300_000])
def test_kill_of_each_rank_raises_rank_failed_on_every_survivor(size, elements):
    for victim in {0, size // 2, size - 1}:
        with start(programs.work_until_failure, size, elements) as group:
            wait_until_joined(group)
            time.sleep(0.1)
            group.send_signal(victim, signal.SIGKILL)
            outcomes = group.outcomes(90)
        assert outcomes[victim].signal == signal.SIGKILL
        assert_survivors_blame(outcomes, victim)


def test_kill_at_random_moments_never_hangs_or_lies():
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    for _ in range(25):
        size = generator.choice([2, 3, 4])
        victim = generator.randrange(size)
        elements = generator.choice([1, 600, 40_000])
        # Nobody has met a victim that was killed before it came: time alone tells then.
        with start(programs.work_until_failure, size, elements, collective_timeout=10.0) as group:
            time.sleep(generator.uniform(0.1, 0.25))
            group.send_signal(victim, signal.SIGKILL)
            outcomes = group.outcomes(90)
        # Killed while they joined, it may have let some of them in, and others not.
        refused = [o for o in outcomes if type(o.error) is InitializationFailed]
        for outcome in refused:
            assert outcome.error.context["code"] in ("RankFailed", "JoinTimeout")
        assert_survivors_blame(outcomes, victim, besides=refused)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exit_zero", "died"),
        ("exit_three", "died"),
        ("kill_self", "died"),
        ("segfault", "died"),
        ("bus_error", "died"),
        ("abort_process", "died"),
        ("close_early", "closed its communicator while others waited"),
        ("abort_seven", r"called abort\(7\)"),
        ("raise_error", "ArithmeticError: the rank's own mistake"),
    ],
)
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_each_way_to_leave_fails_the_others(how, words, times):
    for _ in range(times):
        leave(1, how, words)


def leave(victim, how, words):
    outcomes = run_ranks(programs.depart, 3, "shm", victim, how)
    assert_survivors_blame(outcomes, victim)
    for survivor in (0, 2):
        error = outcomes[survivor].result[0]
        assert re.search(words, str(error))
        assert error.context["last_call"] is not None
    if how == "raise_error":
        assert type(outcomes[victim].error) is ArithmeticError
        remote = outcomes[0].result[0].context["traceback"]
        assert "in raise_error" in remote
    expected = {"bus_error": signal.SIGBUS, "abort_process": signal.SIGABRT}
    if how in expected:
        assert outcomes[victim].signal == expected[how]
    if how == "abort_seven":
        assert outcomes[victim].exit_code == 7


def test_exception_before_the_first_collective_reaches_the_others():
    outcomes = run_ranks(programs.depart, 3, "shm", 2, "raise_error", 0)
    assert_survivors_blame(outcomes, 2)
    for survivor in (0, 1):
        error = outcomes[survivor].result[0]
        assert "raised an exception; it had called no collective" in str(error)
        assert "in raise_error" in error.context["traceback"]


def work_without_the_process_table(comm, victim):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "is_alive", lambda pid, start: True)
        return programs.depart(comm, victim, "kill_self")


@pytest.mark.parametrize("victim", [0, 2])
def test_marks_of_the_kernel_alone_tell_who_died(victim):
    """Otherwise the process table would hide that they do not."""
    outcomes = run_ranks(work_without_the_process_table, 3, "shm", victim)
    assert_survivors_blame(outcomes, victim)


def skip_unless_slices_are_long():
    if not machine.has_futex_waitv():
        pytest.skip("this system cannot sleep on several words at a time")


def test_signal_that_does_not_end_a_sleep_is_handled_before_the_next(tmp_path):
    skip_unless_slices_are_long()
    results_of(run_ranks(programs.signalled_between_sleeps, 3, "shm", tmp_path))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", ["kill_self", "exit_zero", "close_early", "abort_seven"])
def test_sleepers_are_woken_by_what_ends_a_rank(how, size):
    """Their slices last until long after the test: it would not end."""
    skip_unless_slices_are_long()
    outcomes = run_ranks(programs.depart_while_others_sleep, size, "shm", 1, how)
    assert_survivors_blame(outcomes, 1)


@pytest.mark.parametrize("how", ["kill_self", "close_early", "abort_seven"])
def test_who_comes_when_a_rank_has_gone_does_not_sleep(how):
    skip_unless_slices_are_long()
    outcomes = run_ranks(programs.depart_while_others_sleep, 3, "shm", 1, how, True)
    assert_survivors_blame(outcomes, 1)


def test_two_ranks_killed_at_once_fail_the_rest():
    with start(programs.work_until_failure, 4, 100) as group:
        wait_until_joined(group)
        time.sleep(0.1)
        group.send_signal(1, signal.SIGKILL)
        group.send_signal(2, signal.SIGKILL)
        outcomes = group.outcomes(90)
    blamed = {outcomes[rank].result[0].rank for rank in (0, 3)}
    assert len(blamed) == 1
    assert blamed <= {1, 2}


def test_stopped_rank_is_not_dead_and_the_group_goes_on(tmp_path):
    with start(programs.stopped_between_barriers, 3, 1, tmp_path) as group:
        group.wait_until_stopped(1)
        time.sleep(1.0)
        group.send_signal(1, signal.SIGCONT)
        outcomes = group.outcomes(90)
    assert results_of(outcomes) == [None, None, None]


def test_stopped_rank_beyond_the_limit_is_a_timeout_that_names_it(tmp_path):
    # The limit is that of joining too, and of ranks that a busy machine lets wait.
    with start(programs.stopped_between_barriers, 3, 1, tmp_path, collective_timeout=5.0) as group:
        group.wait_until(lambda: sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"])
        group.send_signal(1, signal.SIGCONT)
        outcomes = group.outcomes(90)
    for outcome in (outcomes[0], outcomes[2]):
        error = outcome.result
        assert type(error) is CollectiveTimeout
        assert error.missing_ranks == [1]
        assert error.seconds == 5.0
        assert f"for rank 1 (pid {group.pids[1]}, stopped" in str(error)
        assert "; finished collective 1, barrier)" in str(error)
    # The late one meets a failed group; it does not complete what the others gave up.
    assert type(outcomes[1].result) is CollectiveTimeout


def test_late_rank_is_waited_for_without_burning_the_processor():
    results = results_of(run_ranks(programs.wait_for_late_rank, 4, "shm", 2, 1.0))
    for rank, (seconds, cpu) in enumerate(results):
        if rank != 2:
            assert seconds > 0.8
            # A spinning wait would take all of it; the bound leaves a factor for a busy machine.
            assert cpu < 0.1 * seconds


def test_interrupt_inside_a_collective_is_raised_there_and_fails_the_others():
    outcomes = run_ranks(programs.interrupted_while_waiting, 3, "shm", 1)
    what, later = outcomes[1].result
    assert what == "KeyboardInterrupt"
    # It was raised inside the collective: after it, the group would be whole.
    assert type(later) is RankFailed
    for survivor in (0, 2):
        error = outcomes[survivor].result[0]
        assert type(error) is RankFailed
        assert error.rank == 1
        assert "interrupted" in str(error)


@pytest.mark.parametrize("road", programs.ROADS)
def test_interrupt_at_the_beginning_of_a_wait_fails_the_group_as_a_later_one(road):
    # Python's handler runs where the interpreter is to take the wait over, before it has.
    for error in results_of(run_ranks(programs.interrupted_at_once, 2, "shm", road)):
        assert type(error) is RankFailed
        assert error.rank == 0
        assert "interrupted" in str(error)


def test_handler_that_closes_inside_a_collective_fails_the_group():
    for error in results_of(run_ranks(programs.closed_by_a_handler, 2, "shm")):
        assert type(error) is RankFailed
        assert error.rank == 0


@pytest.mark.parametrize("seconds", [0.5, pytest.param(60.0, marks=pytest.mark.slow)])
def test_signals_during_collectives_do_not_change_results(seconds):
    outcomes = run_ranks(programs.work_under_signals, 3, "shm", seconds, timeout=seconds + 60)
    for failed, hits in results_of(outcomes):
        assert failed is None
        assert hits > 10 * seconds


def test_forked_child_cannot_use_the_communicator_nor_disturb_it():
    for told, value in results_of(run_ranks(programs.use_after_fork, 3)):
        assert told == "'ForkedCommunicator'"
        assert value == 3.0


def test_child_that_ends_as_a_program_does_disturbs_nobody():
    """A forked child that fails and leaves through the interpreter: no peer is told."""
    assert results_of(run_ranks(programs.fork_a_child_that_fails, 3)) == [(True, 3.0)] * 3


def warned(stick, folder, is_enough):
    """Outcomes of three ranks of which rank 0 is late until the output of the group is enough."""
    os.mkfifo(folder / "fifo")
    with start(programs.wait_with_a_warning, 3, 0, stick, folder) as group:
        group.wait_until(lambda: is_enough(group))
        # More of it would come now, if it came too often.
        time.sleep(0.5)
        if stick is programs.stick_stopped:
            group.send_signal(0, signal.SIGCONT)
        elif stick in (programs.stick_asleep, programs.stick_in_another_program):
            os.close(os.open(folder / "fifo", os.O_WRONLY | os.O_NONBLOCK))
        else:
            (folder / "go").touch()
        outcomes = group.outcomes(90)
    results_of(outcomes)
    return outcomes


def has_warned(group, times=1):
    return group.output(1).count("\n") >= times


def has_shown_its_stack(group):
    return "(most recent call first)" in group.output(0)


def test_late_rank_is_named_once_by_the_lowest_waiting_rank(tmp_path):
    outcomes = warned(programs.stick_asleep, tmp_path, has_warned)
    assert outcomes[2].output == ""
    (line,) = outcomes[1].output.splitlines()
    assert re.match(r"cobre_shm: 2 rank\(s\) have waited \d+ s in collective 2, barrier, ", line)
    told = f"for rank 0 (pid {outcomes[0].pid}, sleeping; finished collective 1, barrier)"
    assert line.endswith(told)


def test_stopped_rank_is_named_as_stopped_and_after_six_times_as_long_again(tmp_path):
    outcomes = warned(programs.stick_stopped, tmp_path, partial(has_warned, times=2))
    assert outcomes[0].output == outcomes[2].output == ""
    lines = outcomes[1].output.splitlines()
    told = f"for rank 0 (pid {outcomes[0].pid}, stopped; finished collective 1, barrier)"
    assert [line.partition(", barrier, ")[2] for line in lines] == [told] * 2
    # The first after 1 s.
    assert int(re.search(r"waited (\d+) s", lines[1])[1]) >= 7


@pytest.mark.parametrize(
    "stick",
    [
        programs.stick_asleep,
        programs.stick_in_a_loop,
        programs.stick_with_the_lock_of_the_interpreter,
    ],
)
def test_late_rank_prints_its_stack_once(stick, tmp_path):
    outcomes = warned(stick, tmp_path, has_shown_its_stack)
    text = outcomes[0].output
    assert text.count("(most recent call first)") == 1
    assert re.search(rf'File ".*programs.py", line \d+ in {stick.__name__}\n', text)
    assert "in wait_with_a_warning" in text


def test_rank_that_no_longer_catches_the_signal_is_not_sent_it(tmp_path):
    outcomes = warned(programs.stick_in_another_program, tmp_path, has_warned)
    assert outcomes[0].output == ""


def test_rank_whose_program_uses_the_signal_offers_no_stack(monkeypatch):
    monkeypatch.setattr(stacks, "_is_ours", False)
    heard = []
    before = signal.signal(stacks.SIGNAL, lambda number, frame: heard.append(number))
    config = ShmConfig(name=Segment.random_name(), rank=0, size=1)
    try:
        with ShmCommunicator(config) as comm:
            stacks.ask_for_stacks(comm._segment, [0])
            signal.raise_signal(stacks.SIGNAL)
        assert heard == [stacks.SIGNAL]
    finally:
        signal.signal(stacks.SIGNAL, before)
