"""The rings of a group: their pages come with the first collective that has data, all at once."""

import platform
import resource
from pathlib import Path

import numpy as np
import pytest

from cobre_shm import layout
from tests.support.ranks import results_of, run_ranks


def count_faults(comm, turns):
    send, recv = np.ones(1024), np.ones(1024)
    comm.allreduce(send, recv)
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
    # Where pages come one by one, each turn takes two for each rank.
    assert max(faults) < turns / 4, faults


def resident_kib(comm, wants_data):
    comm.barrier()
    if wants_data:
        comm.allreduce(np.ones(1024))
    comm.barrier()
    rss = Path("/proc/self/status").read_text().split("RssShmem:")[1].split()[0]
    comm.barrier()
    return int(rss)


def test_group_that_only_meets_maps_no_memory_for_data():
    without, with_data = (
        max(results_of(run_ranks(resident_kib, 8, "shm", wants))) for wants in (False, True)
    )
    rings = 8 * layout.ring_bytes(8, layout.DEFAULT_SLOT_BYTES) // 1024
    assert without < rings / 8
    assert with_data > rings
