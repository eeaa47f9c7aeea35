"""What ranks do while they are watched; a file tells them when to go on."""

import os
import time
from pathlib import Path

import numpy as np


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.005)


def one_comes_late(comm, late, go):
    """All but one wait in a barrier until ``go`` exists; then some work with a known result."""
    comm.allreduce(np.ones(1000))
    if comm.rank == late:
        wait_for(go)
    comm.barrier()
    return sum_of_ranks(comm)


def sum_of_ranks(comm):
    return float(comm.allreduce(np.full(3, float(comm.rank)))[0])


def work_until(comm, end):
    """Collectives without a pause until ``end`` exists; return the wrong results among them."""
    wrong = 0
    expected = comm.size * (comm.size - 1) / 2
    while True:
        wrong += sum_of_ranks(comm) != expected
        flag = np.array([Path(end).exists() if comm.rank == 0 else False], dtype=np.int64)
        if comm.broadcast(flag)[0]:
            return wrong


def inherited_segments(comm):
    """Descriptors on shared memory that a child program would get."""
    comm.barrier()
    return [
        os.get_inheritable(int(entry.name))
        for entry in Path("/proc/self/fd").iterdir()
        if os.path.lexists(entry) and str(entry.readlink()).startswith("/dev/shm/")
    ]
