"""Warnings of a case that is valid and may not be what its author meant."""

import pytest

from cobre_shm.sddp import load_case
from tests.sddp.editing import edit, set_path, write_table


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
    assert warning.startswith(f"{file}: source 0 has statistics, but none at stage 0, 2")
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
