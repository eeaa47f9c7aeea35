"""Problems without solution, problems that need a second attempt, and who decides to stop."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import highspy._core as highs
import numpy as np
import pytest

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import SolverError, load_case, series_digest, simulate, train, training
from cobre_shm.sddp.__main__ import main
from cobre_shm.sddp.node_arrays import NodeArrays
from cobre_shm.sddp.noise_bounds import noise_bounds
from cobre_shm.sddp.solver import Place, StageSolver
from cobre_shm.sddp.stage_lp import build_stage
from tests.sddp.editing import edit, write_table
from tests.sddp.threads import run_ranks


def without_water(case):
    """Make the third stage, whose id is 2, insoluble: water is missing and nothing may lack it."""
    edit(
        case,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method="none"),
    )
    (case / "scenarios" / "inflow_ar_coefficients.parquet").unlink()
    write_table(
        case,
        "scenarios/inflow_seasonal_stats.parquet",
        ["hydro_id", "stage_id", "mean_m3s", "std_m3s"],
        [(h, t, -500.0 if t == 2 else 20.0, 1.0) for h in range(3) for t in range(3)],
    )


def solve_file(path):
    solver = highs._Highs()
    solver.setOptionValue("output_flag", False)
    assert solver.readModel(path) == highs.HighsStatus.kOk
    solver.run()
    return solver


@pytest.mark.parametrize("size", [1, 3])
def test_insoluble_problem_is_named_and_kept(random_path, tmp_path, size):
    without_water(random_path)
    out = tmp_path / "out"
    errors = run_ranks(size, lambda comm: train(random_path, comm, output_dir=out))
    assert all(isinstance(error, SolverError) for error in errors)
    error = errors[0]
    assert error.kind == "SolverFailure"
    place = {key: error.context[key] for key in ("stage", "iteration", "scenario")}
    assert place == {"stage": 2, "iteration": 1, "scenario": 0}
    assert error.context["solver_status"] == "Infeasible"
    assert "stage 2" in error.message
    assert "iteration 1, scenario 0, opening" in error.message
    path = error.context["lp_file"]
    assert path in error.suggestion
    solver = solve_file(path)
    assert solver.getModelStatus() == highs.HighsModelStatus.kInfeasible
    text = (tmp_path / "out" / "failed").joinpath(path).read_text()
    for name in ("water_h0", "load_b0_k1", "future_cost", "turbined_h2_k0", "deficit0_b0_k0"):
        assert name in text


def test_problem_is_written_over_no_other_file(random_path, tmp_path, comm):
    without_water(random_path)
    for _ in range(2):
        with pytest.raises(SolverError) as caught:
            train(load_case(random_path), comm, output_dir=tmp_path / "out")
        path = Path(caught.value.context["lp_file"])
        path.unlink()
        path.symlink_to(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_command_line_ends_with_code_three_and_names_the_file(random_path, tmp_path, capsys):
    without_water(random_path)
    assert main([str(random_path), "--quiet", "--output-dir", str(tmp_path / "out")]) == 3
    err = capsys.readouterr().err
    (path,) = (tmp_path / "out" / "failed").iterdir()
    assert str(path) in err
    assert "Traceback" not in err


def test_without_output_directory_the_error_tells_how_to_keep_the_problem(random_path, comm):
    without_water(random_path)
    with pytest.raises(SolverError) as caught:
        train(random_path, comm)
    assert caught.value.context["lp_file"] is None
    assert "output directory" in caught.value.suggestion


def test_insoluble_simulation_is_named_and_kept(random_path, tmp_path, comm):
    result = train(random_path, comm, iterations=1)
    without_water(random_path)
    case = load_case(random_path)
    cuts = [replace(item, coefficients=item.coefficients[:, :3]) for item in result.cuts]
    with pytest.raises(SolverError, match=r"in the simulation, scenario 0, opening") as caught:
        simulate(case, cuts, comm, 2, output_dir=tmp_path)
    assert solve_file(caught.value.context["lp_file"]).getNumRow() > 0


def stage_solver(path, t=0, change=lambda lp: lp):
    case = load_case(path)
    tree = NodeArrays(LocalCommunicator()).opening_tree(case)
    lp = change(build_stage(case, t, 1e3))
    return case, StageSolver(lp, noise_bounds(case, lp, tree[t]))


def test_unbounded_problem_is_named(random_path):
    def open_below(lp):
        lower = lp.lower.copy()
        lower[lp.theta_column] = -np.inf
        return replace(lp, lower=lower)

    case, solver = stage_solver(random_path, change=open_below)
    solver.begin(case.initial_state)
    with pytest.raises(SolverError, match=r"\(Unbounded\) in iteration 4, the lower bound"):
        solver.solve(1, Place(4, None))


def test_refused_noise_and_state_are_errors(random_path):
    """HiGHS would solve with what it was given before, so results would depend on the order."""
    case, solver = stage_solver(random_path)
    noise = solver._noise
    lower, upper = noise.lower.copy(), noise.upper.copy()
    lower[2, 0] = upper[2, 0] = 1e20
    solver._use(lower, upper)
    solver.begin(case.initial_state)
    solver.solve(1)
    with pytest.raises(SolverError, match="the noise of opening 2 of stage 0") as caught:
        solver.solve(2, Place(4, 1))
    where = {"stage": 0, "iteration": 4, "scenario": 1, "opening": 2}
    assert {key: caught.value.context[key] for key in where} == where
    assert caught.value.context["status"] == "changeColsBounds failed"
    with pytest.raises(SolverError, match="a state"):
        solver.begin(np.full_like(case.initial_state, 1e20))


def test_refused_basis_is_an_error(random_path):
    case, solver = stage_solver(random_path)
    solver.restore_basis("chain", np.ones(solver.basis_size - 1, dtype=np.int8))
    with pytest.raises(SolverError, match="a basis of stage 0"):
        solver.begin(case.initial_state, "chain")


def test_bound_without_solution_on_one_rank_is_an_error_on_all(random_path, monkeypatch):
    solve, here = StageSolver.solve, threading.local()

    def fail_beyond_rank_zero(solver, opening, place):
        if place.scenario is None and here.rank > 0:
            raise SolverError(f"no bound on rank {here.rank}")
        return solve(solver, opening, place)

    def run(comm):
        here.rank = comm.rank
        return train(random_path, comm)

    monkeypatch.setattr(StageSolver, "solve", fail_beyond_rank_zero)
    errors = run_ranks(3, run)
    assert [error.message for error in errors] == ["no bound on rank 1"] * 3


def test_second_attempt_gives_the_answer_and_changes_nothing_later(random_path):
    """The first attempt ends at once; its chain goes on as if it had not been."""
    case, plain = stage_solver(random_path)
    _, troubled = stage_solver(random_path)

    def chain(solver, trouble=()):
        solver.begin(case.initial_state)
        results = []
        for opening in range(4):
            if opening in trouble:
                solver._highs.setOptionValue("simplex_iteration_limit", 0)
                solver._highs.setOptionValue("presolve", "off")
                solver._highs.clearSolver()
            value = solver.solve(opening)
            solver._highs.setOptionValue("simplex_iteration_limit", 2**31 - 1)
            results.append((value, *solver.state_duals(), *solver.next_state()[0]))
        return results

    expected = chain(plain)
    assert troubled.retries == 0
    np.testing.assert_allclose(chain(troubled, trouble=(1, 3)), expected, rtol=1e-9, atol=1e-9)
    assert troubled.retries == 2
    assert chain(troubled) == expected


def test_rank_zero_alone_decides_when_to_stop(random_path, monkeypatch):
    """The clocks of two ranks need not agree: asking each of them could part the group."""
    decisions = []
    original = training.stop_reason

    def decide(config, bounds, seconds):
        decisions.append((threading.get_ident(), len(bounds)))
        return original(config, bounds, 1e9 if len(bounds) == 3 else 0.0)

    monkeypatch.setattr(training, "stop_reason", decide)
    rules = [{"type": "iteration_limit", "limit": 50}, {"type": "time_limit", "seconds": 60.0}]
    edit(
        random_path, "config.json", lambda content: content["training"].update(stopping_rules=rules)
    )
    results = run_ranks(4, lambda comm: train(random_path, comm))
    assert {(result.iterations, result.stop_reason) for result in results} == {(3, "time_limit")}
    assert len({thread for thread, _ in decisions}) == 1
    assert [count for _, count in decisions] == [1, 2, 3]


def test_stalling_ends_all_ranks_at_the_same_iteration(random_path):
    rules = [
        {"type": "iteration_limit", "limit": 200},
        {"type": "bound_stalling", "iterations": 4, "tolerance": 1e-3},
    ]
    edit(
        random_path, "config.json", lambda content: content["training"].update(stopping_rules=rules)
    )
    alone = train(random_path, LocalCommunicator())
    assert alone.stop_reason == "bound_stalling"
    for result in run_ranks(3, lambda comm: train(random_path, comm)):
        assert (result.iterations, result.stop_reason) == (alone.iterations, "bound_stalling")
        assert series_digest(result) == series_digest(alone)
