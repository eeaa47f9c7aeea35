"""The rings of a group: their pages are there before the first collective."""

import platform
import resource

import numpy as np
import pytest

from tests.support.ranks import results_of, run_ranks


def count_faults(comm, turns):
    send, recv = np.ones(1024), np.ones(1024)
    comm.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(turns):
        comm.allreduce(send, recv)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (5, 14),
    reason="this kernel cannot populate a mapping",
)
@pytest.mark.parametrize("size", [2, 8])
def test_no_collective_waits_for_pages(size):
    turns = 256
    faults = results_of(run_ranks(count_faults, size, "shm", turns))
    # Loading the reduction takes some; without it each turn took two for each rank.
    assert max(faults) < turns, faults
