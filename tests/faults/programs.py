"""What ranks run in the fault tests: named ways to work, to die, and to misbehave."""

import atexit
import ctypes
import mmap
import os
import select
import signal
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from cobre_shm.errors import CollectiveFailed, InvalidCommunicator
from cobre_shm.kernels import context
from cobre_shm.segment import patience
from cobre_shm.segment.poison import read_poison
from cobre_shm.segment.recorder import last_entry
from cobre_shm.segment.stacks import SIGNAL


def work_until_failure(comm, elements, turns=10**9):
    """Mixed collectives until the group fails; return the error and what a later call raised."""
    send, recv = np.ones(elements), np.empty(elements)
    gathered = np.empty(3 * comm.size)
    counts = np.full(comm.size, 3)
    for turn in range(turns):
        try:
            comm.barrier()
            comm.allreduce(send, recv)
            assert recv[0] == recv[-1] == comm.size
            comm.broadcast(recv, turn % comm.size)
            comm.allgatherv(np.full(3, comm.rank * 1.0), gathered, counts)
            assert gathered[-1] == comm.size - 1
        except CollectiveFailed as error:
            return error, later_error(comm)
    return None


def later_error(comm):
    try:
        comm.barrier()
    except CollectiveFailed as error:
        return error
    return None


def depart(comm, victim, how, turns=20):
    """After some work the victim leaves in the given way; the others go on until they notice."""
    assert work_until_failure(comm, 1, turns) is None
    if comm.rank == victim:
        time.sleep(0.05)
        WAYS[how](comm)
    return work_until_failure(comm, 1)


def depart_while_others_sleep(comm, victim, how, first=False):
    """The victim leaves in the given way when the others sleep, who wake by themselves too late.

    Nor does the process table tell them. ``first``: it leaves before they begin to wait.
    """
    slept = comm._context[context.SLICE_NS]
    comm._context[context.SLICE_NS] = 10**12
    comm.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "is_alive", lambda pid, start: True)
        if comm.rank == victim:
            comm._context[context.SLICE_NS] = slept
            # Beyond the first slice, which is short.
            time.sleep(0.0 if first else 0.5)
            WAYS[how](comm)
        time.sleep(0.5 if first else 0.0)
        found = work_until_failure(comm, 1)
    # Otherwise the slices were short.
    assert comm._context[context.WATCH_LIST] != 0
    return found


def signalled_between_sleeps(comm, folder):
    """Rank 0 gets a signal while it sleeps for rank 1; rank 2 comes when its handler has run.

    The handler restarts system calls, so it does not end the sleep; and rank 0's next would last
    until long after the test.
    """
    comm.barrier()
    if comm.rank == 0:
        comm._context[context.SLICE_NS] = 10**12
        signal.signal(signal.SIGALRM, lambda *_: (folder / "heard").touch())
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    elif comm.rank == 1:
        time.sleep(0.6)
    else:
        while not (folder / "heard").exists():
            time.sleep(0.01)
    comm.barrier()


def exit_zero(comm):
    os._exit(0)


def exit_three(comm):
    os._exit(3)


def kill_self(comm):
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(comm):
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def bus_error(comm):
    """Touch mapped memory whose file has been cut off."""
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
        memory[0] = 1


def abort_process(comm):
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.abort()


def close_early(comm):
    comm.close()
    time.sleep(1.0)
    os._exit(0)


def abort_seven(comm):
    comm.abort(7)


def raise_error(comm):
    raise ArithmeticError("the rank's own mistake")


WAYS = {
    way.__name__: way
    for way in (
        exit_zero,
        exit_three,
        kill_self,
        segfault,
        bus_error,
        abort_process,
        close_early,
        abort_seven,
        raise_error,
    )
}


def wait_for_late_rank(comm, late, seconds):
    """The others wait in a barrier for a rank that comes late; return the seconds waited."""
    # A rank may leave the first barrier when the late one has slept for a while.
    begun = time.monotonic()
    comm.barrier()
    if comm.rank == late:
        time.sleep(seconds)
    cpu = time.process_time()
    comm.barrier()
    return time.monotonic() - begun, time.process_time() - cpu


def stopped_between_barriers(comm, stopped, folder):
    """One rank stops itself before the second barrier; who fails there leaves a file."""
    comm.barrier()
    if comm.rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        comm.barrier()
    except CollectiveFailed as error:
        (folder / f"{comm.rank}").touch()
        return error
    return None


def interrupted_while_waiting(comm, interrupted):
    """One rank gets SIGINT inside a barrier that rank 0 enters when that rank has left it."""
    if comm.rank == interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    pids = comm.allgatherv(np.array([os.getpid()]))
    if comm.rank == 0:
        interrupt = signal_inside_over_tcp if comm.backend == "tcp" else signal_inside
        interrupt(comm, pids[interrupted], signal.SIGINT, interrupted)
    try:
        comm.barrier()
    except KeyboardInterrupt:
        return "KeyboardInterrupt", later_error(comm)
    except CollectiveFailed as error:
        return error, later_error(comm)
    return None


# By every road from Python into a kernel and back.
ROADS = {
    "barrier": lambda comm, x, y: comm.barrier,
    "broadcast": lambda comm, x, y: partial(comm.broadcast, x, 0),
    "allreduce": lambda comm, x, y: partial(comm.allreduce, x, y),
    "allreduce, new": lambda comm, x, y: partial(comm.allreduce, x),
    "allreduce, keywords": lambda comm, x, y: partial(comm.allreduce, send=x, recv=y),
    "allgatherv": lambda comm, x, y: partial(comm.allgatherv, x[:1], y[:2], np.ones(2, np.int64)),
    "allgatherv, list": lambda comm, x, y: partial(comm.allgatherv, x[:1], y[:2], [1, 1]),
    "plan": lambda comm, x, y: comm.allreduce_init(x, y),
}


def interrupted_at_once(comm, road):
    """Rank 0 gets SIGINT as soon as it waits, so before its interpreter has taken the wait over."""
    if comm.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    call = ROADS[road](comm, np.ones(3), np.ones(3))
    call()
    pids = comm.allgatherv(np.array([os.getpid()]))
    if comm.rank == 1:
        signal_inside(comm, pids[0], signal.SIGINT)
        return later_error(comm)
    try:
        call()
    except KeyboardInterrupt:
        later = later_error(comm)
        comm.close()
        return later
    return None


def closed_by_a_handler(comm):
    """Rank 0's signal handler tries to close the communicator inside a collective."""
    if comm.rank == 0:
        signal.signal(signal.SIGALRM, lambda number, frame: comm.close())
    comm.allreduce(np.ones(3))
    pids = comm.allgatherv(np.array([os.getpid()]))
    if comm.rank == 1:
        signal_inside(comm, pids[0], signal.SIGALRM)
        return later_error(comm)
    try:
        # With keywords, so that it is Python that calls the kernel.
        comm.allreduce(send=np.ones(3))
    except InvalidCommunicator:
        later = later_error(comm)
        comm.close()
        return later
    return None


def signal_inside(comm, pid, number, rank=0):
    """Send a rank a signal when it waits in its next collective; return when it has left."""
    before = last_entry(comm._segment, comm.rank).sequence
    while last_entry(comm._segment, rank).sequence == before:
        time.sleep(0.001)
    os.kill(pid, number)
    deadline = time.monotonic() + 10
    # Coming now would end its wait.
    while not read_poison(comm._segment) and time.monotonic() < deadline:
        time.sleep(0.01)


def signal_inside_over_tcp(comm, pid, number, rank):
    """The same on rank 0, to which a rank sends first and then waits."""
    (link,) = [link for link in comm._star.links if link.rank == rank]
    select.select([link.sock], [], [], 10)
    os.kill(pid, number)
    deadline = time.monotonic() + 10
    while comm._unusable is None and time.monotonic() < deadline:
        time.sleep(0.01)


def work_under_signals(comm, seconds):
    """Collectives while a timer signal arrives every millisecond."""
    hits = 0

    def count(number, frame):
        nonlocal hits
        hits += 1

    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    failed, deadline, is_time = None, time.monotonic() + seconds, np.zeros(1)
    try:
        while failed is None and not is_time[0]:
            failed = work_until_failure(comm, 50_000, turns=10)
            is_time[0] = time.monotonic() > deadline
            comm.broadcast(is_time)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return failed, hits


def use_after_fork(comm):
    """A forked child may not use the communicator, and its end disturbs nobody."""
    comm.barrier()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            comm.barrier()
        except Exception as error:
            os.write(writer, repr(error.context.get("code")).encode())
        comm.close()
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    told = os.read(reader, 100).decode()
    os.close(reader)
    value = float(comm.allreduce(np.ones(1))[0])
    return told, value


def fork_a_child_that_fails(comm):
    """Whether the child ended as expected, and what the group reduces afterwards."""
    comm.barrier()
    pid = os.fork()
    if pid == 0:
        # As the interpreter does for an exception that nobody caught, and for open "with" blocks.
        sys.last_value = ValueError("the child's own")
        comm.__exit__(ValueError, sys.last_value, None)
        atexit._run_exitfuncs()
        os._exit(5)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 5, float(comm.allreduce(np.ones(1))[0])


def wait_with_a_warning(comm, late, stick, folder):
    """Wait in a barrier that is soon warned of for a rank that is late until the test goes on."""
    comm.barrier()
    # Only from here on: how long the ranks take to come together is nobody's concern.
    comm._config = replace(comm._config, stall_warn_secs=1.0)
    comm._look_secs = 0.1
    comm._context[context.SLICE_NS] = 100_000_000
    if comm.rank == late:
        (folder / "late").touch()
        stick(folder)
    else:
        while not (folder / "late").exists():
            time.sleep(0.001)
    comm.barrier()


def stick_asleep(folder):
    # Without a moment of being awake, at which others could look.
    (folder / "fifo").read_bytes()


def stick_stopped(folder):
    os.kill(os.getpid(), signal.SIGSTOP)


def stick_in_a_loop(folder):
    while not (folder / "go").exists():
        pass


def stick_with_the_lock_of_the_interpreter(folder):
    """C code that computes for a second and lets no other Python code run."""
    library = ctypes.PyDLL(None)
    library.usleep.argtypes = [ctypes.c_uint]
    while not (folder / "go").exists():
        library.usleep(900_000)


def stick_in_another_program(folder):
    """As if a process of the rank's pid did not know the signal."""
    signal.signal(SIGNAL, signal.SIG_DFL)
    stick_asleep(folder)
