"""Warnings of a case that is valid and may not be what its author meant."""

import pytest

from cobre_shm.sddp import load_case
from tests.sddp.editing import (
    constant_load,
    edit,
    hydro_plant,
    set_path,
    small_case,
    write_json,
    write_table,
)

_RESERVOIR = {"min_storage_hm3": 10.0, "max_storage_hm3": 100.0}


def test_losses_are_ignored_with_a_warning(shipped_copy):
    edit(shipped_copy, "system/lines.json", set_path("lines", 0, "losses_percent", value=3.0))
    (warning,) = load_case(shipped_copy).warnings
    assert "losses_percent" in warning


@pytest.mark.parametrize("kind", ["hydro", "thermal", "line"])
def test_stages_of_entry_and_exit_are_ignored_with_a_warning(shipped_copy, kind):
    before = load_case(shipped_copy)
    file, dates = f"system/{kind}s.json", {"entry_stage_id": 3, "exit_stage_id": None}
    edit(shipped_copy, file, lambda content: content[f"{kind}s"][0].update(dates))
    after = load_case(shipped_copy)
    (warning,) = after.warnings
    assert warning.startswith(f"{file}: {kind} 0: entry_stage_id is ignored")
    assert (after.hydros, after.thermals, after.lines) == (
        before.hydros,
        before.thermals,
        before.lines,
    )


def test_random_source_with_bounds_or_without_statistics_is_a_warning(random_path):
    name = "constraints/ncs_bounds.parquet"
    columns = ["ncs_id", "stage_id", "available_generation_mw"]
    write_table(random_path, name, columns, [(0, 2, 5.0)])
    (warning,) = load_case(random_path).warnings
    assert warning.startswith(f"{name}: source 0: available_generation_mw is ignored")
    write_table(random_path, name, columns, [(0, 2, None)])
    assert load_case(random_path).warnings == ()
    file = "scenarios/non_controllable_stats.parquet"
    write_table(random_path, file, ["ncs_id", "stage_id", "mean", "std"], [(0, 1, 0.5, 0.2)])
    (warning,) = load_case(random_path).warnings
    assert warning == f"{file}: source 0 has no row for stage 0, 2: it generates nothing there"
    sources = "system/non_controllable_sources.json"
    inside = {"entry_stage_id": 1, "exit_stage_id": 2}
    edit(
        random_path, sources, lambda content: content["non_controllable_sources"][0].update(inside)
    )
    assert load_case(random_path).warnings == ()


@pytest.mark.parametrize(("first", "given", "needed"), [(2, 1, 2), (1, 0, 1), (1, 1, 1)])
def test_too_few_past_inflows_are_a_warning(random_path, first, given, needed):
    """At the second stage one of two lags lies inside the study."""
    write_table(
        random_path,
        "scenarios/inflow_ar_coefficients.parquet",
        ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
        [(1, t, lag, 0.2, 0.8) for t in range(3) for lag in range(1, (2 if t else first) + 1)],
    )
    past = [{"hydro_id": 1, "values_m3s": [30.0] * given}]
    edit(random_path, "initial_conditions.json", lambda content: content.update(past_inflows=past))
    warnings = load_case(random_path).warnings
    if given == needed:
        assert warnings == ()
        return
    (warning,) = warnings
    assert f"hydro 1: its inflow depends on {needed} past_inflows, and {given} are" in warning


def test_statistics_that_leave_out_a_stage_are_a_warning(random_path):
    """The reference program refuses them; here what has no row counts as zero."""
    constant_load(random_path, 190.0, stages=2)
    (warning,) = load_case(random_path).warnings
    file = "scenarios/load_seasonal_stats.parquet"
    assert warning == f"{file}: bus 0 has no row for stage 2: its load is zero there"
    # Shifted by one: a row for a stage that does not exist, and none for the first.
    rows = [(0, t, 190.0, 0.0) for t in (1, 2, 3)]
    write_table(random_path, file, ["bus_id", "stage_id", "mean_mw", "std_mw"], rows)
    strange, missing = load_case(random_path).warnings
    assert strange == f"{file}: rows without effect, for they name no stage of the case: 1"
    assert missing == f"{file}: bus 0 has no row for stage 0: its load is zero there"


def test_plant_without_inflow_is_a_warning(tmp_path):
    small_case(tmp_path, stages=9)
    plants = [hydro_plant(h) for h in range(2)]
    write_json(tmp_path, "system/hydros.json", {"hydros": plants})
    file = "scenarios/inflow_seasonal_stats.parquet"
    columns = ["hydro_id", "stage_id", "mean_m3s", "std_m3s"]
    write_table(tmp_path, file, columns, [(1, t, 20.0, 0.0) for t in range(9)])
    (warning,) = load_case(tmp_path).warnings
    named = "0, 1, 2, 3, 4, 5 and 3 more"
    assert warning == f"{file}: hydro 0 has no row for stage {named}: its inflow is zero there"


def test_lag_whose_stage_has_no_statistics_is_a_warning(random_path):
    def without_seasons(content):
        del content["season_definitions"]
        for stage in content["stages"]:
            del stage["season_id"]

    edit(random_path, "stages.json", without_seasons)
    assert load_case(random_path).warnings == ()
    file = "scenarios/inflow_seasonal_stats.parquet"
    columns = ["hydro_id", "stage_id", "mean_m3s", "std_m3s"]
    rows = [(h, t, 25.0, 9.0) for h in range(3) for t in range(-1 if h else -2, 3)]
    write_table(random_path, file, columns, rows)
    # Plant 2 has no lags.
    (warning,) = load_case(random_path).warnings
    assert warning == (
        f"{file}: hydro 1 has no row for stage -2: coefficients of lags that reach it have no "
        "effect"
    )


@pytest.mark.parametrize(("storage", "is_outside"), [(20.0, False), (5.0, True), (101.0, True)])
def test_storage_outside_of_its_bounds_is_a_warning(random_path, storage, is_outside):
    edit(random_path, "system/hydros.json", set_path("hydros", 1, "reservoir", value=_RESERVOIR))
    change = set_path("storage", 1, "value_hm3", value=storage)
    edit(random_path, "initial_conditions.json", change)
    text = f"initial_conditions.json: hydro 1: its storage of {storage:g} hm3 is not within its "
    expected = (f"{text}bounds, 10 to 100",) if is_outside else ()
    assert load_case(random_path).warnings == expected


@pytest.mark.parametrize("name", ["turbined_m3s", "outflow_m3s", "generation_mw"])
def test_bound_that_a_plant_cannot_keep_is_a_warning(random_path, name):
    """A plant out of service has a maximum of zero, and its minimum as ever, at a price."""
    file = "constraints/hydro_bounds.parquet"
    columns = ["hydro_id", "stage_id", f"min_{name}", f"max_{name}"]
    write_table(random_path, file, columns, [(2, 1, 3.0, 0.0), (2, 2, 3.0, 3.0)])
    (warning,) = load_case(random_path).warnings
    assert warning.startswith(f"{file}: hydro 2: min_{name} exceeds max_{name} at stage 1: one")


def test_rows_without_effect_are_counted(random_path):
    file = "constraints/thermal_bounds.parquet"
    columns = ["thermal_id", "stage_id", "max_generation_mw", "block_id"]
    rows = [(0, 0, 50.0, None), (0, 1, 50.0, 0), (0, 1, 50.0, 1), (7, 0, 50.0, None), (0, 9, 1, 0)]
    write_table(random_path, file, columns, rows)
    factors = [{"bus_id": 4, "stage_id": 0, "block_factors": []}]
    write_json(random_path, "scenarios/load_factors.json", {"load_factors": factors})
    assert set(load_case(random_path).warnings) == {
        f"{file}: rows without effect, for they name a block: 2",
        f"{file}: rows without effect, for they name no entity or no stage of the case: 2",
        "scenarios/load_factors.json: rows without effect, for they name no entity or no stage of "
        "the case: 1",
    }


def test_seed_that_does_not_count_is_a_warning(shipped_copy):
    seed = load_case(shipped_copy).config.tree_seed
    for equal in (seed, -seed, None):
        change = set_path("training", "scenario_source", value={"seed": equal})
        edit(shipped_copy, "config.json", change)
        assert load_case(shipped_copy).warnings == ()
    change = set_path("training", "scenario_source", "seed", value=seed + 1)
    edit(shipped_copy, "config.json", change)
    (warning,) = load_case(shipped_copy).warnings
    assert warning.startswith("config.json: training.scenario_source.seed is ignored")
