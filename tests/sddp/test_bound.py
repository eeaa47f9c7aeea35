"""Where the lower bound is not the limit that theory promises, with answers by hand.

Cobre 0.5.1 computes the same figures. In both cases the bound depends on where trajectories
went, so two programs that choose other optima of a degenerate problem need not meet.
"""

from __future__ import annotations

import pytest

from cobre_shm.sddp import train
from tests.sddp.editing import edit, hydro_plant, small_case, write_json, write_table


@pytest.fixture
def case(tmp_path):
    """Two stages of 100 hours, with two openings and one; power is cheap in the first only."""
    path = small_case(tmp_path / "two", stages=2, openings=2)
    edit(path, "stages.json", lambda content: content["stages"][1].update(num_scenarios=1))
    write_table(
        path,
        "constraints/thermal_bounds.parquet",
        ["thermal_id", "stage_id", "max_generation_mw", "cost_per_mwh"],
        [(0, 0, None, 1.0), (1, 0, 0.0, None), (2, 0, 0.0, None)],
    )
    return path


def write_one_plant(case, stored):
    """One hydro plant whose reservoir is full."""
    reservoir = {"max_storage_hm3": stored}
    write_json(case, "system/hydros.json", {"hydros": [hydro_plant(0, reservoir=reservoir)]})
    initial = {"storage": [{"hydro_id": 0, "value_hm3": stored}]}
    initial["past_inflows"] = [{"hydro_id": 0, "values_m3s": [6.0]}]
    write_json(case, "initial_conditions.json", initial)


def write_random_values(case, load, noise):
    """Mean and deviation of the load by stage; noise as (stage, opening, component, value)."""
    write_table(
        case,
        "scenarios/load_seasonal_stats.parquet",
        ["bus_id", "stage_id", "mean_mw", "std_mw"],
        [(0, t, *moments) for t, moments in enumerate(load)],
    )
    names = ["stage_id", "opening_index", "entity_index", "value"]
    write_table(case, "scenarios/noise_openings.parquet", names, noise)


def test_bound_with_truncated_inflow_may_lie_above_the_optimum(case, comm):
    """Stage 1 never gets inflow, since 0.5 lag - 10 is negative; a cut thinks that the lag counts.

    Inflow of stage 0 is 2 or 10 m3/s and the load 25 MW: 2300 $ or 1500 $ now. The 10 m3/s in
    the reservoir are kept for stage 1, which then costs 15 000 $ at 10 $/MWh. The cut found
    behind an inflow of 10 falls by 0.5 * 1000 $ per m3/s, so it says 19 000 $ behind 2.
    """
    write_one_plant(case, 3.6)
    write_table(
        case,
        "scenarios/inflow_seasonal_stats.parquet",
        ["hydro_id", "stage_id", "mean_m3s", "std_m3s"],
        [(0, 0, 6.0, 4.0), (0, 1, 1.0, 4.0)],
    )
    write_table(
        case,
        "scenarios/inflow_ar_coefficients.parquet",
        ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
        [(0, 1, 1, 0.5, 0.5)],
    )
    # Without water in stage 1 the slope would be one of many.
    write_table(
        case,
        "constraints/hydro_bounds.parquet",
        ["hydro_id", "stage_id", "min_storage_hm3"],
        [(0, 0, 1.8)],
    )
    noise = [(0, 0, 0, -1.0), (0, 1, 0, 1.0), (1, 0, 0, -4.0)]
    write_random_values(case, [(25.0, 0.0), (25.0, 0.0)], noise)
    edit(
        case,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method="truncation"),
    )
    result = train(case, comm)
    assert result.upper_bound_mean[-1] == pytest.approx(1900.0 + 15_000.0, rel=0.05)
    assert result.lower_bound[-1] == pytest.approx(1900.0 + (15_000.0 + 19_000.0) / 2)


def test_bound_at_the_mean_load_rests_on_cuts_from_elsewhere(case, comm):
    """The load of stage 0 is 7 or 33 MW, and trajectories leave water for 23, 16 or 0 m3/s.

    At the mean, 20, ten MW cost 1 $/MWh and 13 m3/s are left for stage 1, which needs 25: ten
    MW at 10 $/MWh and two of four at 20 $/MWh, 14 000 $. No trajectory comes there. The cuts,
    25 000 $ - 13 * 1000 $ and 51 000 $ - 13 * 3000 $, both say 12 000 $.
    """
    write_one_plant(case, 8.28)
    thermals = [
        {
            "id": j,
            "name": "T",
            "bus_id": 0,
            "cost_per_mwh": cost,
            "generation": {"min_mw": 0.0, "max_mw": most},
        }
        for j, (cost, most) in enumerate(((10.0, 10.0), (20.0, 4.0), (30.0, 20.0)))
    ]
    write_json(case, "system/thermals.json", {"thermals": thermals})
    values = {(0, 0): (0.0, -1.0), (0, 1): (0.0, 1.0), (1, 0): (0.0, 0.0)}
    noise = [(*at, i, value) for at, pair in values.items() for i, value in enumerate(pair)]
    write_random_values(case, [(20.0, 13.0), (25.0, 0.0)], noise)
    result = train(case, comm)
    assert result.lower_bound[-1] == pytest.approx(1000.0 + 12_000.0)
