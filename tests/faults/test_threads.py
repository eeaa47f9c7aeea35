"""Threads of a program at one communicator: one is inside, the others are told, none is hurt."""

import threading
import time

import numpy as np
import pytest

from cobre_shm.errors import InvalidCommunicator, RankFailed
from cobre_shm.kernels import context
from cobre_shm.native.entry import CLAIM
from cobre_shm.segment.poison import read_poison
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.support.ranks import results_of, run_ranks


def two_threads(comm, done):
    """A thread waits in a collective; what others in this process may do meanwhile."""
    total = []
    told = []
    if comm.rank == 0:
        thread = threading.Thread(target=lambda: total.append(comm.allreduce(np.ones(3))))
        thread.start()
        while not comm._context[context.BUSY]:
            time.sleep(0.001)
        for intrude in (comm.barrier, lambda: comm.broadcast(np.zeros(2)), comm.close):
            try:
                intrude()
            except InvalidCommunicator as error:
                told.append(str(error))
        ShmCommunicator(ShmConfig(name=Segment.random_name(), rank=0, size=1)).close()
        done.touch()
        thread.join()
    else:
        while not done.exists():
            time.sleep(0.001)
        total.append(comm.allreduce(np.ones(3)))
    comm.barrier()
    return [float(value) for value in total[0]], told


def test_second_thread_in_a_collective_is_refused_and_the_first_completes(tmp_path):
    outcomes = run_ranks(two_threads, 3, "shm", tmp_path / "done")
    for rank, (total, told) in enumerate(results_of(outcomes)):
        assert total == [3.0, 3.0, 3.0]
        assert len(told) == (3 if rank == 0 else 0)
        assert all("Another thread" in text for text in told)


def leave_while_a_thread_is_inside(comm):
    """Fail while a thread is in a collective; return what is told, there after the closing."""
    if comm.rank != 0:
        while read_poison(comm._segment) is None:
            time.sleep(0.001)
        with pytest.raises(RankFailed):
            comm.barrier()
        return "told"
    told = []

    def wait():
        try:
            comm.allreduce(np.ones(100_000))
        except (RankFailed, InvalidCommunicator):
            told.append("told")

    thread = threading.Thread(target=wait)
    thread.start()
    while not comm._context[context.BUSY]:
        time.sleep(0.001)
    time.sleep(0.1)  # so that it most likely sleeps in the kernel
    with pytest.raises(ValueError, match="of the program"), comm:
        raise ValueError("of the program")
    thread.join()
    return told[0]


def test_thread_in_a_collective_is_told_and_does_not_crash_when_the_program_fails():
    assert results_of(run_ranks(leave_while_a_thread_is_inside, 2)) == ["told", "told"]


def race_of_threads(comm, turns):
    """Many threads of each rank try the same communicator at any moment: all refused or whole."""
    refused, passed, inside, done = [], [], [], []
    stop = threading.Event()

    def intrude():
        while not stop.is_set():
            # What passes the door and publishes nothing.
            if CLAIM.call(comm._address, 0) == context.READY:
                # A collective has a stage while it is inside, another intruder is in the list.
                passed.append((comm._context[context.STAGE] == context.IDLE, list(inside)))
                inside.append(1)
                time.sleep(0)
                inside.clear()
                comm._context[context.BUSY] = 0
            else:
                refused.append(1)
            time.sleep(0.0001)

    threads = [threading.Thread(target=intrude) for _ in range(2)]
    for thread in threads:
        thread.start()
    met, deadline = 0.0, time.monotonic() + 180
    try:
        # So many, and until intruders of every rank have met both answers.
        while len(done) < turns or met < comm.size:
            assert time.monotonic() < deadline, (len(done), len(refused), len(passed))
            try:
                has_met = float(bool(refused and passed))
                value, met, _ = comm.allreduce(np.array([1.0, has_met, 1.0]))
            except InvalidCommunicator:
                continue
            done.append(float(value))
        assert all(thread.is_alive() for thread in threads)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return set(done), {(is_free, len(others)) for is_free, others in passed}


def test_threads_that_race_for_a_communicator_do_not_corrupt_it():
    for values, met in results_of(run_ranks(race_of_threads, 2, "shm", 300)):
        assert values == {2.0}
        assert met == {(True, 0)}, "somebody was inside already"
