"""The algorithm: convergence to the exact optimum, cuts, stopping, digests."""

from __future__ import annotations

from dataclasses import replace

import highspy._core as highs
import numpy as np
import pytest

from cobre_shm.sddp import load_case, series_digest, simulate, train
from cobre_shm.sddp.config import StoppingRule
from cobre_shm.sddp.cuts import average_cut, opening_weights
from cobre_shm.sddp.noise_bounds import noise_bounds
from cobre_shm.sddp.scenarios import draw_opening, inflow_model, opening_tree
from cobre_shm.sddp.stage_lp import build_stage
from cobre_shm.sddp.stages import RiskMeasure
from cobre_shm.sddp.stopping import stop_reason
from cobre_shm.sddp.training_result import mean_and_std
from tests.sddp.editing import (
    constant_load,
    edit,
    hydro_plant,
    small_case,
    write_json,
    write_table,
)


def extensive_form(case):
    """Solve the whole scenario tree as one problem and return its expected cost.

    Independent of cuts, duals and solver state: the stage problems are laid side by side, and
    what begins a stage is tied to what ends the one before by equations.
    """
    tree = opening_tree(case.statistics, case.horizon, case.config.tree_seed, len(case.hydros))
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


def test_truncation_leaves_no_negative_inflow(random_path, comm):
    def change(content):
        content["modeling"]["inflow_non_negativity"]["method"] = "truncation"

    edit(random_path, "config.json", change)
    write_table(
        random_path,
        "scenarios/inflow_seasonal_stats.parquet",
        ["hydro_id", "stage_id", "mean_m3s", "std_m3s"],
        [(h, t, 5.0, 20.0) for h in range(3) for t in range(-2, 3)],
    )
    result = train(random_path, comm, iterations=3)
    simulation = simulate(result.case, result.cuts, comm, 20)
    inflow = np.concatenate([stage.inflow for stage in simulation.stages])
    assert inflow.min() >= -1e-9
    assert (inflow < 1e-9).any()


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


def test_stages_of_one_season_and_year_share_their_noise(random_path):
    (random_path / "scenarios" / "inflow_ar_coefficients.parquet").unlink()

    def change(content):
        content["stages"][1]["season_id"] = content["stages"][0]["season_id"]
        content["stages"][1]["num_scenarios"] = 6

    edit(random_path, "stages.json", change)
    case = load_case(random_path)
    tree = opening_tree(case.statistics, case.horizon, 42, len(case.hydros))
    assert tree[1][:4].tolist() == tree[0].tolist()
    assert not tree[1][4:].any()
    assert tree[2].tolist() != tree[0].tolist()


def test_given_tree_is_taken_as_it_is(random_path, comm):
    first = train(random_path, comm, iterations=3)
    rows = [
        (stage, opening, entity, float(value))
        for stage, noise in enumerate(first.tree)
        for (opening, entity), value in np.ndenumerate(noise)
    ]
    write_table(
        random_path,
        "scenarios/noise_openings.parquet",
        ["stage_id", "opening_index", "entity_index", "value"],
        rows,
    )
    assert series_digest(train(random_path, comm, iterations=3)) == series_digest(first)


def test_correlated_noise_has_the_given_correlation(random_path):
    def change(content):
        content["stages"][0]["num_scenarios"] = 3000

    edit(random_path, "stages.json", change)
    case = load_case(random_path)
    tree = opening_tree(case.statistics, case.horizon, 42, len(case.hydros))
    correlation = np.corrcoef(tree[0].T)
    np.testing.assert_allclose(correlation[:3, :3], 0.6 + 0.4 * np.eye(3), atol=0.05)
    assert abs(correlation[:3, 3:]).max() < 0.07


def test_inflow_model_reproduces_the_seasonal_mean(random_path):
    case = load_case(random_path)
    model = inflow_model(case.statistics, case.horizon, 1, 3)
    lag_means = np.array([[25.0] * 3, [24.0] * 3])
    np.testing.assert_allclose(model.base + (model.psi * lag_means).sum(axis=0), 26.0)
    np.testing.assert_allclose(model.sigma, [7.2, 7.2, 9.0])


def test_forward_draws_stay_inside_the_tree():
    draws = [draw_opening(42, it, m, t, 5) for it in range(9) for m in range(9) for t in range(9)]
    assert set(draws) == set(range(5))


def test_absent_past_inflow_counts_as_zero(random_path):
    write_json(
        random_path,
        "initial_conditions.json",
        {"storage": [], "past_inflows": [{"hydro_id": 1, "values_m3s": [7.0]}]},
    )
    case = load_case(random_path)
    assert case.initial_state.tolist() == [0.0] * 3 + [0.0, 7.0, 0.0] + [0.0] * 3


def two_stages(case, rate, override=None):
    """Sixty MW of thermal power at 10 $/MWh in two stages of 100 hours, 31 and 28 days long."""
    small_case(case, stages=2)
    constant_load(case, 60.0, stages=2)
    transition = {"source_id": 0, "target_id": 1, "probability": 1.0}
    if override is not None:
        transition["annual_discount_rate_override"] = override
    graph = {"type": "finite_horizon", "annual_discount_rate": rate, "transitions": [transition]}
    edit(case, "stages.json", lambda content: content.update(policy_graph=graph))
    return case


@pytest.mark.parametrize(("rate", "override"), [(0.0, None), (0.1, None), (0.1, 0.3), (0.1, 0.0)])
def test_second_stage_is_discounted_over_the_days_of_the_first(tmp_path, comm, rate, override):
    result = train(two_stages(tmp_path / "two", rate, override), comm, iterations=2)
    annual = rate if override is None else override
    expected = 60_000.0 * (1.0 + (1.0 + annual) ** (-31 / 365.25))
    assert result.lower_bound[-1] == pytest.approx(expected)
    assert result.upper_bound_mean[-1] == pytest.approx(expected)


def given_openings(case, values):
    """Give every stage the openings ``values``, one list per noise component."""
    write_table(
        case,
        "scenarios/noise_openings.parquet",
        ["stage_id", "opening_index", "entity_index", "value"],
        [(t, i, 0, value) for t in range(2) for i, value in enumerate(values)],
    )


@pytest.mark.parametrize(
    ("risk", "weights"),
    [
        ("expectation", [0.25, 0.25, 0.25, 0.25]),
        ({"cvar": {"alpha": 0.5, "lambda": 1.0}}, [0.0, 0.0, 0.5, 0.5]),
        ({"cvar": {"alpha": 0.5, "lambda": 0.4}}, [0.0, 0.3, 0.35, 0.35]),
    ],
)
def test_random_load_under_a_risk_measure(tmp_path, comm, risk, weights):
    """The first stage is valued at the mean load; in the second 60 + 10 eta are never below 0."""
    case = two_stages(tmp_path / "two", 0.0)
    constant_load(case, 60.0, 10.0, stages=2)
    loads = [0.0, 40.0, 70.0, 80.0]
    given_openings(case, [-7.0, -2.0, 1.0, 2.0])

    def change(content):
        for stage in content["stages"]:
            stage.update(num_scenarios=4, risk_measure=risk)

    edit(case, "stages.json", change)
    later = sum(weight * load * 1000.0 for weight, load in zip(weights, loads, strict=True))
    result = train(case, comm, iterations=2)
    assert result.lower_bound[-1] == pytest.approx(60_000.0 + later)


@pytest.mark.parametrize("method", ["none", "penalty", "truncation", "truncation_with_penalty"])
def test_autoregressive_inflow_with_each_method_against_negative_inflow(tmp_path, comm, method):
    """Mean 10, deviation 4, phi 0.5, residual 0.8; the inflow before was 20, so 15 is expected.

    One opening with noise -6.25 takes 20 off: -5 m3/s, filled up at 4 $ or cut off. The water
    of the second stage follows: lag -5 or 0 gives 10 + 0.5 (lag - 10) - 20, again negative.
    """
    case = small_case(tmp_path / "one", stages=2)
    write_json(case, "system/hydros.json", {"hydros": [hydro_plant(0)]})
    initial = {"storage": [{"hydro_id": 0, "value_hm3": 50.0}]}
    initial["past_inflows"] = [{"hydro_id": 0, "values_m3s": [20.0, 99.0]}]
    write_json(case, "initial_conditions.json", initial)
    names = ["hydro_id", "stage_id", "mean_m3s", "std_m3s"]
    rows = [(0, t, 10.0, 4.0) for t in (-1, 0, 1)]
    write_table(case, "scenarios/inflow_seasonal_stats.parquet", names, rows)
    write_table(
        case,
        "scenarios/inflow_ar_coefficients.parquet",
        ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
        [(0, t, 1, 0.5, 0.8) for t in range(2)],
    )
    given_openings(case, [-6.25])
    edit(
        case,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method=method),
    )
    edit(case, "penalties.json", lambda content: content["hydro"].update(spillage_cost=5.0))
    result = train(case, comm, iterations=1)
    inflow = [stage.inflow[0, 0] for stage in simulate(result.case, result.cuts, comm, 1).stages]
    cut_off = method.startswith("truncation")
    assert inflow == pytest.approx([0.0, 0.0] if cut_off else [-5.0, -17.5], abs=1e-9)
