"""Results do not depend on how many ranks computed them."""

from __future__ import annotations

import numpy as np
import pytest

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import (
    MissingFile,
    OutputError,
    SolverError,
    load_case,
    series_digest,
    shipped_case_path,
    simulate,
    train,
)
from cobre_shm.sddp.passes import Passes
from tests.sddp.results import digest_alone
from tests.sddp.threads import run_ranks

SIZES = (1, 2, 3, 4, 8)


def digests(case, iterations, size):
    results = run_ranks(size, lambda comm: train(case, comm, iterations=iterations))
    return {series_digest(result) for result in results}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["1dtoy", "4ree"])
def test_reference_case_has_same_bits_on_any_number_of_ranks(reference_cases, name, size):
    path = reference_cases / name
    assert digests(path, 8, size) == {digest_alone(path, 8)}


@pytest.mark.parametrize("size", SIZES)
def test_shipped_case_has_same_bits_on_any_number_of_ranks(size):
    path = shipped_case_path()
    assert digests(path, 2, size) == {digest_alone(path, 2)}


@pytest.mark.parametrize("method", ["none", "penalty", "truncation", "truncation_with_penalty"])
def test_random_case_has_same_bits_on_any_number_of_ranks(random_path, method):
    from tests.sddp.editing import edit

    edit(
        random_path,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method=method),
    )
    alone = series_digest(train(random_path, LocalCommunicator(), iterations=6))
    for size in (2, 3):
        assert digests(random_path, 6, size) == {alone}


def test_simulation_has_same_bits_on_any_number_of_ranks(random_path):
    result = train(random_path, LocalCommunicator(), iterations=3)

    def run(comm):
        return simulate(result.case, result.cuts, comm, 7)

    alone = run(LocalCommunicator())
    for size in (2, 5):
        for other in run_ranks(size, run):
            assert other.total_cost.tobytes() == alone.total_cost.tobytes()
            for stage, reference in zip(other.stages, alone.stages, strict=True):
                for name, values in vars(reference).items():
                    assert np.array_equal(getattr(stage, name), values)


def test_unreadable_case_ends_every_rank_with_the_same_error(tmp_path):
    errors = run_ranks(3, lambda comm: train(tmp_path / "absent", comm))
    assert all(isinstance(error, MissingFile) for error in errors)
    assert len({str(error) for error in errors}) == 1


def test_unwritable_output_ends_every_rank_before_training(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")

    def run(comm):
        return train(shipped_case_path(), comm, output_dir=blocked)

    errors = run_ranks(3, run)
    assert all(isinstance(error, OutputError) for error in errors)
    assert all(str(blocked) in str(error) for error in errors)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("step", ["_run_trajectories", "_find_cuts", "lower_bound"])
def test_problem_without_solution_ends_every_rank_with_the_same_error(
    random_path, monkeypatch, size, step
):
    original = getattr(Passes, step)

    def fail(work, *arguments):
        iteration = arguments[-1]
        # The second trajectory fails: only one of several ranks knows.
        if iteration == 2 and (step == "lower_bound" or 1 in work.shares.mine):
            raise SolverError("no solution", context={"iteration": iteration, "scenario": 1})
        return original(work, *arguments)

    monkeypatch.setattr(Passes, step, fail)
    errors = run_ranks(size, lambda comm: train(random_path, comm, iterations=3))
    assert all(isinstance(error, SolverError) for error in errors)
    assert all(error.context == {"iteration": 2, "scenario": 1} for error in errors)


def test_one_ranks_wish_to_stop_ends_all(random_path):
    def run(comm):
        asked = iter([False, comm.rank == 1])
        return train(random_path, comm, should_stop=lambda: next(asked))

    results = run_ranks(3, run)
    assert [result.iterations for result in results] == [2, 2, 2]
    assert {result.stop_reason for result in results} == {"interrupted"}


def test_timing_has_a_row_per_rank_and_iteration(random_path):
    results = run_ranks(3, lambda comm: train(random_path, comm, iterations=2))
    for result in results:
        assert result.timing.shape[:2] == (3, 2)
        assert result.timing[:, :, -1].sum() == result.lp_solves


def test_ranks_with_trajectories_share_the_bound(random_path):
    case = load_case(random_path)
    trajectories, stages = case.config.forward_passes, case.stages
    results = run_ranks(2, lambda comm: train(case, comm, iterations=1))
    openings = [len(noise) for noise in results[0].tree]
    for rank, share in enumerate((-(-trajectories // 2), trajectories // 2)):
        passes = share * (stages + sum(openings[1:]))
        bound = results[0].timing[rank, 0, -1] - passes
        assert 0 < bound < openings[0]
