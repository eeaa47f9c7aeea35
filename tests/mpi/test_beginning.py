"""Communicators that do not come into being, or are lost by a rank's own exception."""

import pytest


@pytest.mark.parametrize("name", ["hierarchical", "check", "deterministic"])
def test_settings_that_differ_are_refused_on_all_ranks(mpi, name):
    """The ranks would call different functions of MPI, and hang or take other data for theirs."""
    done = mpi.program(3, "beginning", name)
    said = f"MpiConfig.{name} must be the same on all ranks: it is true on rank 0, and false on "
    assert done.code == 0, done.stderr
    assert done.stdout.count(said + "rank 1") == 3


def test_rank_that_fails_alone_in_the_constructor_ends_the_job(mpi):
    done = mpi.program(2, "beginning", "alone")
    assert done.code == 1
    assert "MemoryError: of rank 1" in done.stderr


def test_exception_out_of_a_collective_loses_the_group(mpi):
    """Of several functions of MPI some may have been called: the next would meet the wrong one."""
    done = mpi.program(2, "beginning", "interrupted")
    assert done.code == 0, done.stderr
    for rank in range(2):
        text = f"A collective was interrupted on rank {rank} by an exception"
        assert f"rank {rank}: KeyboardInterrupt, CollectiveFailed, {text}" in done.stdout


def test_forked_child_does_not_end_the_job(mpi):
    done = mpi.program(2, "beginning", "fork")
    assert done.code == 0, done.stderr
    assert [f"rank {rank}: 45" in done.stdout for rank in range(2)] == [True, True]
