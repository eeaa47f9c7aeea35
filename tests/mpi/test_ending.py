"""A rank that fails ends the job, with a code; one that ends in order disturbs nobody."""

import pytest


@pytest.mark.parametrize(
    ("levels", "way", "code", "said"),
    [
        ("flat", "raise", 1, "LookupError: of rank 1"),
        ("node", "raise", 1, "LookupError: of rank 1"),
        ("flat", "interrupt", 130, "KeyboardInterrupt"),
        ("flat", "abort", 7, ""),
        ("node", "abort", 7, ""),
        ("flat", "exit_in_block", 5, ""),
        ("flat", "caught", 1, "this rank failed and its peers did not"),
        ("flat", "caught_unheard", 1, ""),
    ],
)
def test_rank_that_fails_ends_the_job(mpi, levels, way, code, said):
    done = mpi.program(3, "ending", way, levels)
    assert done.stdout.count("started") >= 1
    assert done.code == code, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(("way", "code"), [("exit_in_block", 5), ("caught", 1)])
def test_rank_that_leaves_a_group_of_one_node_ends_the_job(mpi, way, code):
    """Its peers raise at once, and leave it to the rank that was the cause to end the job."""
    done = mpi.program(3, "ending", way, "node")
    assert done.code == code
    assert "RankFailed: Rank 1" in done.stderr


def test_rank_that_is_killed_ends_the_job(mpi):
    done = mpi.program(3, "ending", "kill", "flat")
    assert "started" in done.stdout, done.stderr
    assert done.code != 0


@pytest.mark.parametrize("levels", ["flat", "node"])
def test_all_ranks_that_refuse_keep_their_own_code(mpi, levels):
    done = mpi.program(3, "ending", "all_refuse", levels)
    assert done.code == 2, done.stderr
    assert "this rank failed" not in done.stderr


@pytest.mark.parametrize("levels", ["flat", "node"])
@pytest.mark.parametrize("way", ["untidy", "closed_inside"])
def test_end_in_order_is_silent(mpi, way, levels):
    done = mpi.program(3, "ending", way, levels)
    # Open MPI ends its output with a NUL.
    assert (done.code, done.stderr.strip("\0\n ")) == (0, "")


def test_failure_of_a_node_among_several_has_the_ranks_of_all_and_is_final(mpi):
    done = mpi.program(4, "node_fails")
    assert "rank 2: RankFailed of 3, raised the cause, again at once" in done.stdout, done.stderr
