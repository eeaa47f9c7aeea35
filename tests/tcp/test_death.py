"""A rank that dies, leaves or stands still over tcp: every survivor knows which, nobody hangs."""

import fcntl
import os
import re
import signal
import socket
import struct
import termios
import time
from functools import partial

import numpy as np
import pytest

from cobre_net.tcp import communicator, link, membership
from cobre_shm.errors import CollectiveTimeout, RankFailed
from tests.faults import programs
from tests.support.backends import BACKENDS
from tests.support.processes import appear
from tests.support.ranks import RankGroup, results_of, run_ranks

# Longer than a collective may stand still: who waits for the one that waits so long gives up.
GUARD_SECS = 60.0


def work(comm, folder, elements):
    """Tell the test that this rank is at work, and work."""
    comm.barrier()
    (folder / str(comm.rank)).touch()
    return programs.work_until_failure(comm, elements)


def wait_for_all(folder, size):
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < size:
        assert time.monotonic() < deadline, "the ranks did not come to work"
        time.sleep(0.01)
    time.sleep(0.1)


def start(function, size, *args, collective_timeout=30.0):
    return RankGroup(BACKENDS["tcp"].make_group(size, collective_timeout), function, args)


def assert_survivors_blame(outcomes, victim):
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert outcome.error is None, outcome.traceback
        error, later = outcome.result
        assert type(error) is RankFailed
        assert error.rank == victim, str(error)
        assert error.pid == outcomes[victim].pid
        assert error.context["host"]
        assert f"Rank {victim} (pid {error.pid} on {error.context['host']})" in str(error)
        assert type(later) is RankFailed
        assert later.rank == victim


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("elements", [1, 300_000])
def test_kill_of_each_rank_raises_rank_failed_on_every_survivor(size, elements, tmp_path):
    for victim in {0, size // 2, size - 1}:
        folder = tmp_path / str(victim)
        folder.mkdir()
        with start(work, size, folder, elements) as group:
            wait_for_all(folder, size)
            group.send_signal(victim, signal.SIGKILL)
            outcomes = group.outcomes(90)
        assert outcomes[victim].signal == signal.SIGKILL
        assert_survivors_blame(outcomes, victim)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exit_zero", "died"),
        ("exit_three", "died"),
        ("kill_self", "died"),
        ("segfault", "died"),
        ("close_early", "closed its communicator while others waited"),
        ("abort_seven", r"called abort\(7\)"),
        ("raise_error", "ArithmeticError: the rank's own mistake"),
    ],
)
def test_each_way_to_leave_fails_the_others(how, words, victim):
    outcomes = run_ranks(programs.depart, 3, "tcp", victim, how)
    assert_survivors_blame(outcomes, victim)
    for survivor in {0, 1, 2} - {victim}:
        error = outcomes[survivor].result[0]
        assert re.search(words, str(error))
        assert error.context["last_call"] is not None
    if how == "raise_error":
        assert type(outcomes[victim].error) is ArithmeticError
        assert "in raise_error" in outcomes[2].result[0].context["traceback"]
    if how == "abort_seven":
        assert outcomes[victim].exit_code == 7


def wait_while_rank_0_computes(comm, told):
    """Rank 2 dies while rank 0 is outside collectives, until rank 1, in one, has learnt of it."""
    comm.barrier()
    if comm.rank == 2:
        programs.kill_self(comm)
    if comm.rank == 0:
        assert appear([told]), "rank 1 waits for rank 0 to come"
    try:
        comm.barrier()
    except RankFailed as error:
        told.touch()
        return error
    return None


def test_waiting_rank_learns_of_a_death_while_rank_0_computes(tmp_path):
    outcomes = run_ranks(wait_while_rank_0_computes, 3, "tcp", tmp_path / "told")
    for outcome in outcomes[:2]:
        assert outcome.error is None, outcome.traceback
        assert outcome.result.rank == 2
        assert outcome.result.pid == outcomes[2].pid


def send_much_while_rank_0_computes(comm, begun, told):
    """Rank 2 dies in the middle of 64 MB; rank 0 comes when rank 1, in its own, has learned it."""
    comm.barrier()
    if comm.rank == 0:
        assert appear([told]), "rank 1 waits for rank 0 to come"
    if comm.rank == 2:
        sock = comm._star.links[0].sock

        def die(*_):
            if begun.exists() and unacknowledged(sock) > 0:
                programs.kill_self(comm)

        signal.signal(signal.SIGALRM, die)
        signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
    try:
        if comm.rank == 1:
            begun.touch()
        comm.allreduce(np.ones(8_000_000))
    except RankFailed as error:
        told.touch()
        return error
    return None


def unacknowledged(sock):
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]


def test_waiting_rank_learns_of_a_death_behind_what_rank_0_has_not_read(tmp_path):
    paths = tmp_path / "begun", tmp_path / "told"
    outcomes = run_ranks(send_much_while_rank_0_computes, 3, "tcp", *paths)
    for outcome in outcomes[:2]:
        assert outcome.error is None, outcome.traceback
        assert outcome.result.rank == 2
        assert outcome.result.pid == outcomes[2].pid


def test_two_ranks_killed_at_once_fail_the_rest(tmp_path):
    with start(work, 4, tmp_path, 100) as group:
        wait_for_all(tmp_path, 4)
        group.send_signal(1, signal.SIGKILL)
        group.send_signal(2, signal.SIGKILL)
        outcomes = group.outcomes(90)
    blamed = {outcomes[rank].result[0].rank for rank in (0, 3)}
    assert len(blamed) == 1
    assert blamed <= {1, 2}


@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_rank_is_not_dead_and_the_group_goes_on(stopped, tmp_path):
    with start(programs.stopped_between_barriers, 3, stopped, tmp_path) as group:
        group.wait_until_stopped(stopped)
        time.sleep(1.0)
        group.send_signal(stopped, signal.SIGCONT)
        outcomes = group.outcomes(90)
    assert results_of(outcomes) == [None, None, None]


def come_late(comm, late, folder):
    """One rank comes to the second barrier when the others have given up."""
    comm.barrier()
    while comm.rank == late and len(list(folder.iterdir())) < comm.size - 1:
        time.sleep(0.01)
    # Rank 0 has what the others sent before they gave up, and would be content with it. Its thread
    # learns that they gave up.
    while comm.rank == late == 0 and comm._unusable is None:
        time.sleep(0.01)
    try:
        comm.barrier()
    except CollectiveTimeout as error:
        (folder / str(comm.rank)).touch()
        return error
    return None


@pytest.mark.parametrize("late", [0, 1])
def test_late_rank_beyond_the_limit_is_a_timeout_that_names_it_on_every_rank(late, tmp_path):
    with start(come_late, 3, late, tmp_path, collective_timeout=3.0) as group:
        outcomes = group.outcomes(90)
    for outcome in outcomes:
        error = outcome.result
        assert type(error) is CollectiveTimeout, outcome.traceback
        assert error.missing_ranks == [late]
        assert error.seconds == 3.0
        assert str(outcomes[late].pid) in str(error)


def test_late_rank_is_waited_for_without_burning_the_processor():
    results = results_of(run_ranks(programs.wait_for_late_rank, 4, "tcp", 2, 1.0))
    for rank, (seconds, cpu) in enumerate(results):
        if rank != 2:
            assert seconds > 0.8
            assert cpu < 0.1 * seconds


@pytest.mark.parametrize("interrupted", [1, 2])
def test_interrupt_inside_a_collective_is_raised_there_and_fails_the_others(interrupted):
    outcomes = run_ranks(programs.interrupted_while_waiting, 3, "tcp", interrupted)
    what, later = outcomes[interrupted].result
    assert what == "KeyboardInterrupt"
    assert type(later) is RankFailed
    for survivor in {0, 1, 2} - {interrupted}:
        error = outcomes[survivor].result[0]
        assert type(error) is RankFailed
        assert error.rank == interrupted
        assert "interrupted" in str(error)


def interrupted_in_its_last_frame(comm, folder):
    """Rank 1 is interrupted with its part begun, and ends its stream when rank 2 has its result.

    The others come when it has been interrupted, so that no more than the beginning has found room.
    """
    comm.barrier()
    begun, done = folder / "begun", folder / "done"
    # Large, and yet one frame.
    send = np.arange(131_072) * (comm.rank + 1.0)
    if comm.rank == 1:
        (to_centre,) = comm._star.links
        to_centre.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        end_stream = link._end_stream

        def interrupt(*_):
            if to_centre.unsent:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                begun.touch()
                raise KeyboardInterrupt

        def end_late(each):
            assert appear([done])
            end_stream(each)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(link, "_end_stream", end_late)
            patch.setattr(link, "_LAST_WORDS_SECS", GUARD_SECS)
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            with pytest.raises(KeyboardInterrupt):
                comm.allreduce(send)
        return None
    assert appear([begun])
    found = []
    for call in (partial(comm.allreduce, send), comm.barrier):
        try:
            found.append(call())
        except RankFailed as error:
            found.append(error)
        if comm.rank == 2:
            done.touch()
    return found


def test_rank_interrupted_in_the_last_frame_of_its_part_gives_nobody_a_wrong_result(tmp_path):
    outcomes = run_ranks(interrupted_in_its_last_frame, 3, "tcp", tmp_path)
    results = results_of(outcomes)
    for rank in (0, 2):
        total, later = results[rank]
        # Rank 0 may still be at work for the rank that is interrupted, and hear of it then.
        if rank == 2 or isinstance(total, np.ndarray):
            assert (total == np.arange(131_072) * 6.0).all()
        else:
            assert total.rank == 1
        assert type(later) is RankFailed
        assert later.rank == 1
        assert later.pid == outcomes[1].pid
        assert "interrupted" in str(later)


def test_signals_during_collectives_do_not_change_results():
    for failed, hits in results_of(run_ranks(programs.work_under_signals, 3, "tcp", 0.5)):
        assert failed is None
        assert hits > 5


def test_forked_child_cannot_use_the_communicator_nor_disturb_it():
    for told, value in results_of(run_ranks(programs.use_after_fork, 3, "tcp")):
        assert told == "'ForkedCommunicator'"
        assert value == 3.0


def die_with_a_child_left(comm, folder):
    """A forked child outlives its rank, and must not keep the connection open for it."""
    comm.barrier()
    if comm.rank == 1:
        if os.fork() == 0:
            told = [folder / str(rank) for rank in range(comm.size) if rank != 1]
            (folder / ("outlived" if appear(told) else "nobody noticed")).touch()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        comm.barrier()
    except RankFailed as error:
        (folder / str(comm.rank)).touch()
        return error.rank
    return None


@pytest.mark.parametrize("size", [2, 3])
def test_child_of_a_dead_rank_does_not_hide_its_death(size, tmp_path):
    outcomes = run_ranks(die_with_a_child_left, size, "tcp", tmp_path)
    for rank in {*range(size)} - {1}:
        assert outcomes[rank].error is None, outcomes[rank].traceback
        assert outcomes[rank].result == 1
    # Its last word: the child is nobody's to reap.
    assert appear([tmp_path / "outlived"])


def send_where_nobody_reads(comm, sender, elements):
    # As a program does that wants to end with its pipe.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    comm.barrier()
    if comm.rank == sender:
        (link,) = comm._star.links
        link.sock.shutdown(socket.SHUT_WR)
        link.heartbeat()
    with pytest.raises(RankFailed):
        comm.allreduce(np.ones(elements))


def close_and_be_interrupted(comm, place, folder):
    """Rank 0 is interrupted in close(), and calls it again."""
    comm.barrier()
    if comm.rank > 0:
        with pytest.raises(RankFailed) as caught:
            comm.barrier()
        (folder / str(comm.rank)).touch()
        return caught.value.rank
    with pytest.MonkeyPatch.context() as patch:
        if place == "say last":
            patch.setattr(membership, "say_last", _raise_late)
        else:
            patch.setattr(comm, "_retire", _Once(comm._retire))
        with pytest.raises(Late):
            comm.close()
    comm.close()
    # They know while it lives, and keeps the communicator.
    assert appear([folder / str(rank) for rank in range(1, comm.size)])
    return 0


class Late(Exception):
    pass


def _raise_late(*_):
    raise Late


class _Once:
    """A function before whose first call a signal comes."""

    def __init__(self, function):
        self._function, self._has_raised = function, False

    def __call__(self):
        if not self._has_raised:
            self._has_raised = True
            raise Late
        self._function()


# Of three, rank 0 has a sentinel.
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("place", ["say last", "retire"])
def test_interrupted_close_ends_the_connections(size, place, tmp_path):
    outcomes = run_ranks(close_and_be_interrupted, size, "tcp", place, tmp_path)
    assert results_of(outcomes) == [0] * size


def lack_memory_behind_the_counts(comm, kind):
    """Rank 1 cannot go on when the counts have been exchanged: no mistake, and no memory."""
    if comm.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(communicator, "check_gathered", partial(_raise, kind))
            with pytest.raises(kind):
                comm.allgatherv(np.ones(3))
    with pytest.raises(RankFailed, match="interrupted") as caught:
        comm.allgatherv(np.ones(3))
    return caught.value.rank


def _raise(kind, *_):
    raise kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_call_that_is_left_between_two_rounds_fails_the_group(kind):
    assert results_of(run_ranks(lack_memory_behind_the_counts, 2, "tcp", kind)) == [1, 1]


@pytest.mark.parametrize("sender", [0, 1])
@pytest.mark.parametrize("elements", [1, 300_000])
def test_death_of_a_peer_is_an_error_also_where_sigpipe_ends_programs(sender, elements):
    with start(send_where_nobody_reads, 2, sender, elements) as group:
        results_of(group.outcomes(60))
