"""Windows and communicators of MPI, of which there are few, are given back."""

import contextlib
import gc
import threading

import numpy as np

from cobre_net.mpi import MpiRegion, region
from tests.mpi.programs.checks import make, run_checks


def window_count():
    return sum(len(windows) for _, found in region._windows for windows in found)


def check_communicators_are_given_back():
    """MPICH has 2,048 of them; each of ours takes several."""
    for turn in range(150):
        with make(hierarchical=turn % 10 == 0) as comm:
            comm.split_local().close()


def check_windows_are_given_back():
    with make(hierarchical=False) as comm:
        for turn in range(30):
            shared = comm.create_shared_region(1000)
            assert isinstance(shared, MpiRegion)
            assert not shared.array.any()
            shared.fence()
            shared.array[comm.rank] = turn
            if turn % 2:
                shared.close()
            del shared
        held = comm.create_shared_region(5, "i4").array
        assert window_count() == 1
    with make(hierarchical=False):
        assert window_count() == 1
    held[0] = 1
    del held
    with make(hierarchical=False):
        assert window_count() == 0


def check_windows_of_dropped_communicators_are_given_back():
    with make(hierarchical=False) as comm:
        dropped = comm.split_local()
        dropped.create_shared_region(10).close()
        del dropped
        gc.collect()
        with comm.split_local():
            assert window_count() == 0


def check_windows_of_two_communicators_in_two_threads():
    """Neither sees those of the other, which its peers may have in another order."""
    first, second = make(hierarchical=False), make(hierarchical=False)
    order = [first, second] if first.rank % 2 else [second, first]
    threads = [threading.Thread(target=make_regions, args=(comm,)) for comm in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for comm in order:
        comm.close()
    with make(hierarchical=False):
        assert window_count() == 0


def make_regions(comm):
    for turn in range(40):
        with comm.create_shared_region(100) as shared:
            shared.fill_slice(comm.rank, np.array([turn]))
            shared.fence()
            assert (shared.array[: comm.size] == turn).all()
            shared.fence()


def check_blocks_left_by_exceptions_cost_no_communicators():
    """MPICH has two thousand."""
    for _ in range(2100):
        with contextlib.suppress(ZeroDivisionError), make(hierarchical=False):
            raise ZeroDivisionError


run_checks(globals())
