"""What replaces a plant's own values at a stage, with answers found by hand."""

from __future__ import annotations

import pytest

from tests.sddp.editing import (
    constant_load,
    edit,
    hydro_plant,
    write_json,
    write_table,
)
from tests.sddp.test_stage_lp import HOURS, ZETA, cost, hydros, set_penalty, table


def test_thermal_bounds_and_cost_by_stage_replace_the_plants(small, comm):
    write_table(
        small,
        "constraints/thermal_bounds.parquet",
        ["thermal_id", "stage_id", "max_generation_mw", "cost_per_mwh", "block_id"],
        [
            (0, 0, 40.0, 20.0, None),
            (0, 0, 1.0, 1.0, 0),
            (0, 5, 1.0, 1.0, None),
            (8, 0, 1.0, 1.0, None),
        ],
    )
    constant_load(small, 60.0)
    assert cost(small, comm) == pytest.approx((40 * 20 + 20 * 1000) * HOURS)


def test_production_model_replaces_the_productivity(small, comm):
    hydros(small, hydro_plant(0), inflow=[10.0])
    model = {
        "start_stage_id": 0,
        "end_stage_id": None,
        "model": "constant_productivity",
        "productivity_override": 1.5,
    }
    write_json(
        small,
        "system/hydro_production_models.json",
        {
            "production_models": [
                {"hydro_id": 0, "selection_mode": "stage_ranges", "stage_ranges": [model]}
            ]
        },
    )
    constant_load(small, 60.0)
    assert cost(small, comm) == pytest.approx((60 - 15) * 10 * HOURS)


def test_hydro_bounds_by_stage_replace_the_plants(small, comm):
    """Turbine at most 20, stock at least 3.6 hm3 of the 7.2 at the start."""
    constant_load(small, 60.0)
    hydros(small, hydro_plant(0), storage=[7.2], inflow=[15.0])
    names = ["hydro_id", "stage_id", "max_turbined_m3s", "min_storage_hm3"]
    table(small, "hydro_bounds", names, (0, 0, 20.0, None))
    assert cost(small, comm) == pytest.approx((60 - 20) * 10 * HOURS)
    table(small, "hydro_bounds", names, (0, 0, 50.0, 3.6))
    assert cost(small, comm) == pytest.approx((60 - 15 - 3.6 / ZETA) * 10 * HOURS)


def test_generation_bounds_by_stage_replace_the_plants(small, comm):
    constant_load(small, 60.0)
    hydros(small, hydro_plant(0), inflow=[15.0])
    set_penalty(small, spillage_cost=0.5)
    names = ["hydro_id", "stage_id", "max_generation_mw", "max_storage_hm3"]
    table(small, "hydro_bounds", names, (0, 0, 4.0, 0.0))
    assert cost(small, comm) == pytest.approx((56 * 10 + 11 * 0.5) * HOURS)


def test_stage_productivity_does_not_change_a_minimum_generation(small, comm):
    """The floor of 8 MW is measured with the plant's own 1 MW per m3/s: 5 m3/s are 3 short."""
    set_penalty(small, generation_violation_below_cost=7.0)
    hydros(small, hydro_plant(0, generation={"min_generation_mw": 8.0}), inflow=[5.0])
    span = {"start_stage_id": 0, "end_stage_id": 0, "model": "constant_productivity"}
    span["productivity_override"] = 4.0
    models = [{"hydro_id": 0, "selection_mode": "stage_ranges", "stage_ranges": [span]}]
    write_json(small, "system/hydro_production_models.json", {"production_models": models})
    constant_load(small, 20.0)
    assert cost(small, comm) == pytest.approx(3 * 7 * HOURS)


def test_line_bounds_by_stage_replace_the_lines(small, comm):
    buses = [{"id": 0, "name": "A"}, {"id": 1, "name": "B"}]
    write_json(small, "system/buses.json", {"buses": buses})
    line = {"id": 0, "name": "L", "source_bus_id": 0, "target_bus_id": 1}
    line["capacity"] = {"direct_mw": 99.0, "reverse_mw": 99.0}
    write_json(small, "system/lines.json", {"lines": [line]})
    names = ["bus_id", "stage_id", "mean_mw", "std_mw"]
    write_table(small, "scenarios/load_seasonal_stats.parquet", names, [(1, 0, 50.0, 0.0)])
    table(small, "line_bounds", ["line_id", "stage_id", "direct_mw"], (0, 0, 30.0))
    table(small, "penalty_overrides_line", ["line_id", "stage_id", "exchange_cost"], (0, 0, 3.0))
    assert cost(small, comm) == pytest.approx((30 * (10 + 3) + 20 * 1000) * HOURS)


def wind(case, capacity=80.0, **fields):
    source = {"id": 0, "name": "W", "bus_id": 0, "max_generation_mw": capacity, **fields}
    write_json(case, "system/non_controllable_sources.json", {"non_controllable_sources": [source]})


def test_bound_of_a_source_replaces_its_capacity(small, comm):
    wind(small, curtailment_cost=0.25)
    table(small, "ncs_bounds", ["ncs_id", "stage_id", "available_generation_mw"], (0, 0, 12.0))
    constant_load(small, 60.0)
    assert cost(small, comm) == pytest.approx((48 * 10 - 12 * 0.25) * HOURS)


def test_factor_of_a_source_holds_in_its_block(small, comm):
    blocks = [{"id": i, "name": str(i), "hours": hours} for i, hours in enumerate((30.0, 70.0))]
    edit(small, "stages.json", lambda content: content["stages"][0].update(blocks=blocks))
    wind(small, curtailment_cost=0.25)
    factors = [{"block_id": 1, "factor": 0.5}]
    items = [{"ncs_id": 0, "stage_id": 0, "block_factors": factors}]
    name = "scenarios/non_controllable_factors.json"
    write_json(small, name, {"non_controllable_factors": items})
    constant_load(small, 60.0)
    windy, calm = -60 * 0.25, 20 * 10 - 40 * 0.25
    assert cost(small, comm) == pytest.approx(windy * 30 + calm * 70)


@pytest.mark.parametrize(("noise", "share"), [(3.0, 1.0), (-3.0, 0.0), (-0.5, 0.25)])
def test_availability_is_a_share_of_the_capacity(small, comm, noise, share):
    wind(small, capacity=20.0, curtailment_cost=0.25)
    write_table(
        small,
        "scenarios/non_controllable_stats.parquet",
        ["ncs_id", "stage_id", "mean", "std"],
        [(0, 0, 0.5, 0.5)],
    )
    columns = ["stage_id", "opening_index", "entity_index", "value"]
    write_table(small, "scenarios/noise_openings.parquet", columns, [(0, 0, 0, noise)])
    constant_load(small, 60.0)
    power = 20.0 * share
    assert cost(small, comm) == pytest.approx(((60 - power) * 10 - power * 0.25) * HOURS)


def test_penalties_of_a_plant_replace_the_global_ones_and_a_stage_those(small, comm):
    plant = hydro_plant(0, reservoir={"max_storage_hm3": 0.0}, penalties={"spillage_cost": 2.0})
    hydros(small, plant, inflow=[70.0])
    constant_load(small, 50.0)
    assert cost(small, comm) == pytest.approx(20 * 2 * HOURS)
    table(small, "penalty_overrides_hydro", ["hydro_id", "stage_id", "spillage_cost"], (0, 0, 5.0))
    assert cost(small, comm) == pytest.approx(20 * 5 * HOURS)


def test_excess_cost_by_stage_replaces_the_global_one(small, comm):
    change = {"min_mw": 30.0, "max_mw": 30.0}
    edit(
        small,
        "system/thermals.json",
        lambda content: content["thermals"][0]["generation"].update(change),
    )
    table(small, "penalty_overrides_bus", ["bus_id", "stage_id", "excess_cost"], (0, 0, 4.0))
    assert cost(small, comm) == pytest.approx((30 * 10 + 30 * 4) * HOURS)
