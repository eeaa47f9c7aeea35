"""The random quantities: common noise, given trees, correlation, inflow, with answers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cobre_shm.sddp import load_case, series_digest, simulate, train
from cobre_shm.sddp.case import check_case
from cobre_shm.sddp.errors import InvalidEnum, OutOfRange, SchemaViolation, Unsupported
from cobre_shm.sddp.node_arrays import NodeArrays
from cobre_shm.sddp.scenarios import draw_opening, inflow_model
from tests.sddp.editing import (
    constant_load,
    edit,
    hydro_plant,
    set_path,
    small_case,
    write_json,
    write_table,
)


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


def test_stages_of_one_season_and_year_share_their_noise(random_path, comm):
    (random_path / "scenarios" / "inflow_ar_coefficients.parquet").unlink()

    def change(content):
        content["stages"][1]["season_id"] = content["stages"][0]["season_id"]
        content["stages"][1]["num_scenarios"] = 6

    edit(random_path, "stages.json", change)
    case = load_case(random_path)
    tree = NodeArrays(comm).opening_tree(case)
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


def test_tree_without_all_rows_is_refused_before_it_takes_memory(random_path):
    edit(random_path, "stages.json", set_path("stages", 1, "num_scenarios", value=2**31 - 1))
    columns = ["stage_id", "opening_index", "entity_index", "value"]
    write_table(random_path, "scenarios/noise_openings.parquet", columns, [(0, 0, 0, 1.0)])
    with pytest.raises(SchemaViolation, match=r"10737418275 in all, not 1$"):
        load_case(random_path)


def test_correlated_noise_has_the_given_correlation(random_path, comm):
    def change(content):
        content["stages"][0]["num_scenarios"] = 3000

    edit(random_path, "stages.json", change)
    case = load_case(random_path)
    tree = NodeArrays(comm).opening_tree(case)
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


@pytest.mark.parametrize("mean", [-0.1, 35.0])
def test_availability_is_a_fraction_of_the_capacity(random_path, mean):
    """A mean in MW would be cut off at the capacity."""
    file = "scenarios/non_controllable_stats.parquet"
    write_table(random_path, file, ["ncs_id", "stage_id", "mean", "std"], [(0, 0, mean, 0.2)])
    with pytest.raises(OutOfRange, match=r"non_controllable_stats\.parquet.*mean"):
        load_case(random_path)


def test_lags_need_stage_ids_without_gaps(random_path):
    """Lag states go by the place of a stage, their statistics by its id."""

    def spread(content):
        for stage in content["stages"]:
            stage["id"] *= 10

    edit(random_path, "stages.json", spread)
    for file in sorted((random_path / "constraints").iterdir()):
        file.unlink()
    (random_path / "scenarios/noise_openings.parquet").unlink(missing_ok=True)
    with pytest.raises(Unsupported, match=r"without gaps.* but 10 follows 0"):
        load_case(random_path)
    (random_path / "scenarios/inflow_ar_coefficients.parquet").unlink()
    load_case(random_path)


def test_profile_of_a_scheduled_stage_must_be_one(random_path):
    file = "scenarios/correlation.json"
    schedule = [{"stage_id": 7, "profile_name": "default"}]
    edit(random_path, file, set_path("schedule", value=schedule))
    (warning,) = load_case(random_path).warnings
    assert warning == f"{file}: rows without effect, for they name no stage of the case: 1"
    edit(random_path, file, set_path("schedule", 0, "profile_name", value="wet"))
    _, findings, _ = check_case(random_path)
    (error,) = findings
    assert isinstance(error, InvalidEnum)
    assert "must be one of default, not 'wet'" in error.message
