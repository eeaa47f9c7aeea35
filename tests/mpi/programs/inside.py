"""Who may be inside a communicator: one thread at a time, and no signal handler below it."""

import contextlib
import signal
import threading
import time

import numpy as np
from mpi4py import MPI

from cobre_net.mpi import communicator, membership
from cobre_shm.errors import CollectiveFailed, InvalidCommunicator
from cobre_shm.kernels import context
from cobre_shm.testing.conformance.expect import expect_error
from tests.mpi.programs.checks import RANK, make, run_checks


def check_two_threads_in_one_communicator():
    """One is inside; the other is refused, on either road, and nothing is mixed up."""
    for settings in {}, {"check": True}:
        comm = make(hierarchical=False, **settings)
        comm.allreduce(np.ones(3))
        enter_by_two_threads(comm)
        comm.close()
        expect_error(InvalidCommunicator, "closed", comm.barrier)


def enter_by_two_threads(comm):
    if comm.rank:
        MPI.COMM_WORLD.Barrier()
        comm.barrier()
    else:
        thread = threading.Thread(target=comm.barrier)
        thread.start()
        while not (comm._words[context.BUSY] or comm._lock.locked()):
            time.sleep(0.001)
        calls = (
            comm.barrier,
            lambda: comm.allreduce(np.ones(3)),
            lambda: comm.allreduce(np.ones(3, "i2")),
            lambda: comm.broadcast(np.ones(3)),
            lambda: comm.allgatherv(np.ones(1), np.empty(comm.size), [1] * comm.size),
            lambda: comm.create_shared_region(1),
            comm.split_local,
            comm.close,
        )
        for call in calls:
            expect_error(InvalidCommunicator, "Another thread is inside", call)
        MPI.COMM_WORLD.Barrier()
        thread.join()
    assert (comm.allreduce(np.ones(3)) == comm.size).all()


class Alarm(Exception):
    pass


# How many signals are still to come.
alarms = [0]


def ring(number, frame):
    if not alarms[0]:
        # It was on its way when the last one stopped the timer.
        return
    alarms[0] -= 1
    if not alarms[0]:
        signal.setitimer(signal.ITIMER_REAL, 0)
    while frame is not None:
        # Only there, or this program would have to expect it anywhere.
        if frame.f_code.co_filename in (communicator.__file__, membership.__file__):
            raise Alarm
        frame = frame.f_back


def check_handlers_that_raise_leave_nothing_taken():
    """Wherever they come, the communicator is usable or lost, and can be closed."""
    before = signal.signal(signal.SIGALRM, ring)
    lost = 0
    for turn in range(200):
        # Of three turns two have several signals in a row.
        comm = make(comm=MPI.COMM_SELF, hierarchical=False, check=True)
        begun, done = [], []
        reduce = comm._engine.allreduce

        def count(*args, begun=begun, done=done, reduce=reduce):
            begun.append(None)
            reduce(*args)
            done.append(None)

        comm._engine.allreduce = count
        with contextlib.suppress(Alarm):
            alarms[0] = 1 + turn % 3
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + 2e-6 * turn, 2e-5)
            while alarms[0]:
                comm.allreduce(np.ones(3))
        while alarms[0]:
            time.sleep(0.001)
        try:
            comm.barrier()
            assert len(begun) == len(done), turn
        except CollectiveFailed:
            lost += 1
        comm.close()
        expect_error(InvalidCommunicator, "closed", comm.barrier)
    signal.signal(signal.SIGALRM, before)
    assert lost > 0


def check_block_is_left_while_a_thread_is_inside():
    """What ends the block stays what it is, and the communicator is of no use."""
    comm = make(hierarchical=False)
    if RANK == 0:
        thread = threading.Thread(target=comm.barrier)
        with contextlib.suppress(ZeroDivisionError), comm:
            thread.start()
            while not comm._words[context.BUSY]:
                time.sleep(0.001)
            raise ZeroDivisionError
        expect_error(CollectiveFailed, "the block was left", comm.barrier)
        expect_error(InvalidCommunicator, "must wait", comm.close)
        MPI.COMM_WORLD.Barrier()
        thread.join()
    else:
        MPI.COMM_WORLD.Barrier()
        comm.barrier()
    with contextlib.suppress(ZeroDivisionError), comm:
        # On all ranks, or it would be a failure of one.
        raise ZeroDivisionError


run_checks(globals())
