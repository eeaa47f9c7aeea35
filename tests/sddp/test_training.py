"""The algorithm: convergence to the exact optimum, cuts, stopping, digests."""

from __future__ import annotations

from dataclasses import replace

import highspy._core as highs
import numpy as np
import pytest

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import load_case, series_digest, simulate, train
from cobre_shm.sddp.config import StoppingRule
from cobre_shm.sddp.cuts import average_cut, opening_weights
from cobre_shm.sddp.node_arrays import NodeArrays
from cobre_shm.sddp.noise_bounds import noise_bounds
from cobre_shm.sddp.stage_lp import build_stage
from cobre_shm.sddp.stages import RiskMeasure
from cobre_shm.sddp.stopping import stop_reason
from cobre_shm.sddp.training_result import mean_and_std
from tests.sddp.editing import (
    edit,
)


def extensive_form(case):
    """Solve the whole scenario tree as one problem and return its expected cost.

    Independent of cuts, duals and solver state: the stage problems are laid side by side, and
    what begins a stage is tied to what ends the one before by equations.
    """
    tree = NodeArrays(LocalCommunicator()).opening_tree(case)
    lps = [build_stage(case, t, 1.0) for t in range(case.stages)]
    cost, lower, upper, rows = [], [], [], []

    def add_node(t, parent, weight):
        lp = lps[t]
        bounds = noise_bounds(case, lp, tree[t], mean_load=t == 0)
        for opening in range(len(tree[t])):
            share = weight / len(tree[t])
            start = len(cost)
            low, high, price = lp.lower.copy(), lp.upper.copy(), share * lp.cost
            price[lp.theta_column], high[lp.theta_column] = 0.0, 0.0
            low[lp.noise_columns], high[lp.noise_columns] = (
                bounds.lower[opening],
                bounds.upper[opening],
            )
            if parent is None:
                low[lp.state_columns] = high[lp.state_columns] = case.initial_state
            else:
                low[lp.state_columns], high[lp.state_columns] = -np.inf, np.inf
            cost.extend(price), lower.extend(low), upper.extend(high)
            for i in range(len(lp.row_lower)):
                span = slice(lp.starts[i], lp.starts[i + 1])
                rows.append(
                    (start + lp.indices[span], lp.values[span], lp.row_lower[i], lp.row_upper[i])
                )
            if parent is not None:
                before, begin = parent
                for i, j in zip(before.next_state_columns, lp.state_columns, strict=True):
                    rows.append(([begin + i, start + j], [1.0, -1.0], 0.0, 0.0))
            if t + 1 < case.stages:
                add_node(t + 1, (lp, start), share * lp.discount)

    add_node(0, None, 1.0)
    model = highs.HighsLp()
    model.num_col_, model.num_row_ = len(cost), len(rows)
    model.col_cost_, model.col_lower_, model.col_upper_ = map(np.array, (cost, lower, upper))
    model.row_lower_ = np.array([row[2] for row in rows])
    model.row_upper_ = np.array([row[3] for row in rows])
    model.a_matrix_.format_ = highs.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *(len(row[0]) for row in rows)])
    model.a_matrix_.index_ = np.concatenate([row[0] for row in rows])
    model.a_matrix_.value_ = np.concatenate([row[1] for row in rows])
    solver = highs._Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(model)
    solver.run()
    assert solver.getModelStatus() == highs.HighsModelStatus.kOptimal
    return solver.getObjectiveValue()


def expectation(content):
    for stage in content["stages"]:
        del stage["risk_measure"]


@pytest.mark.parametrize("method", ["none", "penalty"])
def test_bound_converges_to_the_optimum_of_the_whole_tree(random_path, comm, method):
    edit(random_path, "stages.json", expectation)
    edit(
        random_path,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method=method),
    )
    case = load_case(random_path)
    optimum = extensive_form(case)
    result = train(case, comm, iterations=60)
    assert result.lower_bound[-1] == pytest.approx(optimum, rel=1e-6)
    assert (result.lower_bound <= optimum * (1 + 1e-9)).all()


def test_lower_bound_never_falls(random_path, comm):
    bounds = train(random_path, comm, iterations=20).lower_bound
    assert (np.diff(bounds) >= -1e-9 * np.abs(bounds[1:])).all()


def test_risk_aversion_raises_the_bound(random_path, comm):
    averse = train(random_path, comm, iterations=20).lower_bound[-1]
    edit(random_path, "stages.json", expectation)
    neutral = train(random_path, comm, iterations=20).lower_bound[-1]
    assert averse > neutral * (1 + 1e-6)


def test_simulation_is_consistent_in_itself(random_path, comm):
    result = train(random_path, comm, iterations=10)
    simulation = simulate(result.case, result.cuts, comm, 30)
    costs = np.stack([stage.immediate_cost for stage in simulation.stages], axis=1)
    np.testing.assert_allclose(simulation.total_cost, costs @ simulation.discounts)
    for before, after in zip(simulation.stages, simulation.stages[1:], strict=False):
        np.testing.assert_allclose(before.storage_final, after.storage_initial, atol=1e-7)
    for stage in simulation.stages:
        supply = (
            stage.thermal.sum(axis=1)
            + stage.source.sum(axis=1)
            + (stage.deficit - stage.excess).sum(axis=1)
        )
        hours = np.array([40.0, 60.0])
        missing = (stage.load.sum(axis=1) - supply) @ hours / hours.sum()
        np.testing.assert_allclose(stage.hydro_generation.sum(axis=1), missing, atol=1e-6)
        assert (stage.spot_price >= -1.0 - 1e-9).all()
        assert (stage.water_value >= -1e-6).all()


def test_seed_changes_the_result_and_nothing_else_does(random_path, comm):
    first = series_digest(train(random_path, comm, iterations=2))
    assert series_digest(train(random_path, comm, iterations=2)) == first
    edit(random_path, "config.json", lambda content: content["training"].update(tree_seed=43))
    assert series_digest(train(random_path, comm, iterations=2)) != first


def test_training_in_one_process_twice_gives_equal_bits(random_path, comm):
    case = load_case(random_path)
    assert len({series_digest(train(case, comm, iterations=3)) for _ in range(3)}) == 1


def test_result_has_one_entry_per_iteration(random_path, comm):
    seen = []
    result = train(random_path, comm, iterations=4, progress=seen.append)
    assert result.iterations == 4
    assert tuple(seen) == result.history
    for series in (result.lower_bound, result.upper_bound_mean, result.upper_bound_std):
        assert series.shape == (4,)
        assert series.dtype == np.float64
    assert [len(cuts) for cuts in result.cuts] == [8, 8, 0]
    assert result.cuts[0].iteration.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert result.cuts[0].scenario.tolist() == [0, 1] * 4
    assert result.lp_solves == 4 * (2 * 3 + 2 * 2 * 4 + 4)
    assert result.stop_reason == "iteration_limit"
    assert not result.converged


def test_results_and_cases_are_shown_in_a_line(random_path, comm):
    result = train(random_path, comm, iterations=2)
    shown = repr(result)
    assert shown.startswith("<TrainingDetails of case random: iterations 2 (iteration_limit), ")
    assert shown.endswith(f"lower bound {result.lower_bound[-1]:,.2f} $, cuts 8>")
    shown = repr(result.case)
    assert shown.startswith("<Case random: stages 3, buses 1, ")
    simulation = simulate(result.case, result.cuts, comm, 5)
    mean = simulation.total_cost.mean()
    shown = f"<SimulationResult of case random: scenarios 5, mean cost {mean:,.2f} $>"
    assert repr(simulation) == shown


def test_iterations_below_one_are_refused(random_path, comm):
    with pytest.raises(ValueError, match="at least 1"):
        train(random_path, comm, iterations=0)


def test_settled_bound_ends_the_training(random_path, comm):
    rules = [
        {"type": "iteration_limit", "limit": 200},
        {"type": "bound_stalling", "iterations": 5, "tolerance": 1e-4},
    ]
    edit(
        random_path, "config.json", lambda content: content["training"].update(stopping_rules=rules)
    )
    result = train(random_path, comm)
    assert result.converged
    assert result.stop_reason == "bound_stalling"
    assert 5 <= result.iterations < 200


@pytest.mark.parametrize(
    ("rules", "on_all", "bounds", "seconds", "reason"),
    [
        ([StoppingRule("iteration_limit", limit=3)], False, [1.0] * 2, 0.0, None),
        ([StoppingRule("iteration_limit", limit=3)], False, [1.0] * 3, 0.0, "iteration_limit"),
        ([StoppingRule("time_limit", seconds=2.0)], False, [1.0], 1.9, None),
        ([StoppingRule("time_limit", seconds=2.0)], False, [1.0], 2.0, "time_limit"),
        ([StoppingRule("bound_stalling", window=3, tolerance=0.1)], False, [9.0, 9.1], 0.0, None),
        (
            [StoppingRule("bound_stalling", window=3, tolerance=0.1)],
            False,
            [9.0, 9.1, 9.2],
            0.0,
            "bound_stalling",
        ),
        (
            [StoppingRule("bound_stalling", window=3, tolerance=0.1)],
            False,
            [5.0, 9.1, 9.2],
            0.0,
            None,
        ),
        (
            [StoppingRule("iteration_limit", limit=1), StoppingRule("time_limit", seconds=2.0)],
            True,
            [1.0],
            1.0,
            None,
        ),
        (
            [StoppingRule("iteration_limit", limit=1), StoppingRule("time_limit", seconds=2.0)],
            True,
            [1.0],
            3.0,
            "iteration_limit",
        ),
    ],
)
def test_stopping_rules(shipped_copy, rules, on_all, bounds, seconds, reason):
    config = load_case(shipped_copy).config
    config = replace(config, stopping_rules=tuple(rules), stop_on_all=on_all)
    assert stop_reason(config, bounds, seconds) == reason


def test_weights_of_the_expectation_are_equal():
    assert opening_weights(np.array([3.0, 1.0]), None).tolist() == [0.5, 0.5]


def test_weights_of_cvar_prefer_the_dearest_openings():
    weights = opening_weights(np.array([1.0, 4.0, 2.0, 3.0]), RiskMeasure(tail=0.5, weight=1.0))
    assert weights.tolist() == [0.0, 0.5, 0.0, 0.5]
    mixed = opening_weights(np.array([1.0, 4.0, 2.0, 3.0]), RiskMeasure(tail=0.25, weight=0.4))
    np.testing.assert_allclose(mixed.sum(), 1.0)
    assert mixed[1] == pytest.approx(0.6 / 4 + 0.4)


def test_average_cut_touches_the_mean_at_its_trial_point():
    values, state = np.array([10.0, 20.0]), np.array([2.0, 3.0])
    slopes = np.array([[1.0, 0.0], [0.0, -2.0]])
    intercept, coefficients = average_cut(values, slopes, state, None)
    assert coefficients.tolist() == [0.5, -1.0]
    assert intercept + coefficients @ state == pytest.approx(15.0)


def test_mean_and_deviation_are_those_of_a_sample():
    values = np.array([1.0, 4.0, 9.0, 16.0])
    mean, std = mean_and_std(values)
    assert mean == pytest.approx(values.mean())
    assert std == pytest.approx(values.std(ddof=1))
    assert mean_and_std(values[:1]) == (1.0, 0.0)
