"""Stage problems whose cost can be computed by hand: 100 hours, thermal power at 10 $/MWh."""

from __future__ import annotations

import pytest

from cobre_shm.sddp import SolverError, train
from tests.sddp.editing import (
    constant_load,
    edit,
    hydro_plant,
    write_json,
    write_table,
)

HOURS = 100.0


ZETA = 0.0036 * HOURS


def cost(case, comm):
    return train(case, comm, iterations=1).lower_bound[0]


def hydros(case, *plants, storage=(), inflow=()):
    """Give the case plants, their stored water in hm3, and constant inflow in m3/s."""
    write_json(case, "system/hydros.json", {"hydros": list(plants)})
    initial = [{"hydro_id": h, "value_hm3": value} for h, value in enumerate(storage)]
    write_json(case, "initial_conditions.json", {"storage": initial})
    if inflow:
        write_table(
            case,
            "scenarios/inflow_seasonal_stats.parquet",
            ["hydro_id", "stage_id", "mean_m3s", "std_m3s"],
            [(h, 0, value, 0.0) for h, value in enumerate(inflow)],
        )


def set_penalty(case, **values):
    edit(case, "penalties.json", lambda content: content["hydro"].update(values))


def table(case, name, columns, *rows):
    write_table(case, f"constraints/{name}.parquet", columns, list(rows))


def test_thermal_power_covers_the_load(small, comm):
    constant_load(small, 60.0)
    assert cost(small, comm) == pytest.approx(60 * 10 * HOURS)


def test_load_beyond_capacity_is_deficit_in_rising_segments(small, comm):
    constant_load(small, 130.0)
    segments = [{"depth_mw": 20.0, "cost": 500.0}, {"depth_mw": None, "cost": 2000.0}]
    edit(
        small,
        "system/buses.json",
        lambda content: content["buses"][0].update(deficit_segments=segments),
    )
    assert cost(small, comm) == pytest.approx((100 * 10 + 20 * 500 + 10 * 2000) * HOURS)


def test_minimum_generation_beyond_load_is_excess(small, comm):
    constant_load(small, 10.0)
    edit(
        small,
        "system/thermals.json",
        lambda content: content["thermals"][0]["generation"].update(min_mw=30.0),
    )
    assert cost(small, comm) == pytest.approx((30 * 10 + 20 * 1.0) * HOURS)


def test_line_carries_power_both_ways_at_its_factor(small, comm):
    write_json(
        small, "system/buses.json", {"buses": [{"id": 0, "name": "A"}, {"id": 1, "name": "B"}]}
    )
    line = {
        "id": 0,
        "name": "L",
        "source_bus_id": 1,
        "target_bus_id": 0,
        "exchange_cost": 2.0,
        "capacity": {"direct_mw": 99.0, "reverse_mw": 40.0},
    }
    write_json(small, "system/lines.json", {"lines": [line]})
    write_table(
        small,
        "scenarios/load_seasonal_stats.parquet",
        ["bus_id", "stage_id", "mean_mw", "std_mw"],
        [(1, 0, 50.0, 0.0)],
    )
    factors = [{"block_id": 0, "direct_factor": 1.0, "reverse_factor": 0.5}]
    write_json(
        small,
        "constraints/exchange_factors.json",
        {"exchange_factors": [{"line_id": 0, "stage_id": 0, "block_factors": factors}]},
    )
    assert cost(small, comm) == pytest.approx((20 * 10 + 20 * 2 + 30 * 1000) * HOURS)


def test_hydro_power_is_limited_by_water(small, comm):
    constant_load(small, 60.0)
    hydros(small, hydro_plant(0), storage=[7.2], inflow=[5.0])
    assert cost(small, comm) == pytest.approx((60 - 7.2 / ZETA - 5.0) * 10 * HOURS)


def test_water_of_the_upper_plant_is_used_again_below(small, comm):
    constant_load(small, 80.0)
    hydros(small, hydro_plant(0, downstream_id=1), hydro_plant(1), inflow=[10.0, 4.0])
    assert cost(small, comm) == pytest.approx((80 - 10 - 14) * 10 * HOURS)


def test_full_reservoir_spills_at_its_cost(small, comm):
    set_penalty(small, spillage_cost=3.0)
    plant = hydro_plant(0, reservoir={"max_storage_hm3": 0.0})
    hydros(small, plant, inflow=[70.0])
    constant_load(small, 50.0)
    assert cost(small, comm) == pytest.approx(20 * 3 * HOURS)


def test_generation_limit_caps_the_turbine(small, comm):
    set_penalty(small, spillage_cost=0.5)
    plant = hydro_plant(
        0,
        reservoir={"max_storage_hm3": 0.0},
        generation={"productivity_mw_per_m3s": 2.0, "max_generation_mw": 60.0},
    )
    hydros(small, plant, inflow=[40.0])
    constant_load(small, 60.0)
    assert cost(small, comm) == pytest.approx(10 * 0.5 * HOURS)


@pytest.mark.parametrize(
    ("limit", "penalty", "missing"),
    [
        ({"outflow": {"min_outflow_m3s": 12.0}}, "outflow_violation_below_cost", 7.0),
        ({"generation": {"min_turbined_m3s": 9.0}}, "turbined_violation_below_cost", 4.0),
        ({"generation": {"min_generation_mw": 8.0}}, "generation_violation_below_cost", 3.0),
    ],
)
def test_minimum_that_cannot_be_met_costs_its_penalty(small, comm, limit, penalty, missing):
    set_penalty(small, **{penalty: 7.0})
    hydros(small, hydro_plant(0, **limit), inflow=[5.0])
    constant_load(small, 5.0)
    assert cost(small, comm) == pytest.approx(missing * 7 * HOURS)


def test_outflow_above_its_limit_costs_its_penalty(small, comm):
    set_penalty(small, outflow_violation_above_cost=7.0)
    plant = hydro_plant(0, outflow={"max_outflow_m3s": 20.0}, reservoir={"max_storage_hm3": 0.0})
    hydros(small, plant, inflow=[30.0])
    constant_load(small, 30.0)
    assert cost(small, comm) == pytest.approx(10 * 7 * HOURS)


def test_water_withdrawal_takes_water_or_costs_its_penalty(small, comm):
    set_penalty(small, water_withdrawal_violation_cost=7.0)
    hydros(small, hydro_plant(0), inflow=[5.0])
    write_table(
        small,
        "constraints/hydro_bounds.parquet",
        ["hydro_id", "stage_id", "water_withdrawal_m3s"],
        [(0, 0, 8.0)],
    )
    assert cost(small, comm) == pytest.approx(3 * 7 * HOURS)


def test_diverted_water_reaches_its_target(small, comm):
    set_penalty(small, diversion_cost=0.5, spillage_cost=100.0)
    upper = hydro_plant(
        0,
        diversion={"downstream_id": 1, "max_flow_m3s": 6.0},
        reservoir={"max_storage_hm3": 0.0},
        generation={"max_turbined_m3s": 4.0},
    )
    hydros(small, upper, hydro_plant(1), inflow=[10.0, 0.0])
    constant_load(small, 30.0)
    assert cost(small, comm) == pytest.approx(((30 - 4 - 6) * 10 + 6 * 0.5) * HOURS)


def test_negative_inflow_is_filled_up_at_its_penalty(small, comm):
    set_penalty(small, inflow_nonnegativity_cost=4.0)
    hydros(small, hydro_plant(0), inflow=[-5.0])
    edit(
        small,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method="penalty"),
    )
    assert cost(small, comm) == pytest.approx(5 * 4 * HOURS)


def test_available_wind_is_used_first_and_curtailment_costs(small, comm):
    source = {
        "id": 0,
        "name": "W",
        "bus_id": 0,
        "max_generation_mw": 80.0,
        "curtailment_cost": 0.25,
    }
    write_json(
        small, "system/non_controllable_sources.json", {"non_controllable_sources": [source]}
    )
    write_table(
        small,
        "scenarios/non_controllable_stats.parquet",
        ["ncs_id", "stage_id", "mean", "std"],
        [(0, 0, 0.5, 0.0)],
    )
    constant_load(small, 60.0)
    assert cost(small, comm) == pytest.approx((20 * 10 - 40 * 0.25) * HOURS)


def test_source_is_absent_outside_its_stages(small, comm):
    source = {"id": 0, "name": "W", "bus_id": 0, "max_generation_mw": 80.0, "entry_stage_id": 1}
    write_json(
        small, "system/non_controllable_sources.json", {"non_controllable_sources": [source]}
    )
    constant_load(small, 60.0)
    assert cost(small, comm) == pytest.approx(60 * 10 * HOURS)


def test_problem_without_solution_names_its_place(small, comm):
    hydros(small, hydro_plant(0), inflow=[-5.0])
    with pytest.raises(SolverError) as caught:
        cost(small, comm)
    assert caught.value.context["stage"] == 0
    assert caught.value.context["iteration"] == 1
    assert {"scenario", "opening", "solver_status"} <= set(caught.value.context)


def test_blocks_divide_the_stage(small, comm):
    blocks = [{"id": i, "name": str(i), "hours": hours} for i, hours in enumerate((30.0, 70.0))]
    edit(small, "stages.json", lambda content: content["stages"][0].update(blocks=blocks))
    constant_load(small, 50.0)
    factors = [{"block_id": 0, "factor": 2.2}]
    write_json(
        small,
        "scenarios/load_factors.json",
        {"load_factors": [{"bus_id": 0, "stage_id": 0, "block_factors": factors}]},
    )
    assert cost(small, comm) == pytest.approx((100 * 10 + 10 * 1000) * 30 + 50 * 10 * 70)


def test_withdrawal_has_a_price_on_either_side(small, comm):
    """Too little costs 7 per m3/s, and the reservoir cannot keep what nobody takes."""
    set_penalty(
        small,
        water_withdrawal_violation_neg_cost=7.0,
        water_withdrawal_violation_pos_cost=3.0,
        spillage_cost=100.0,
    )
    plant = hydro_plant(
        0, reservoir={"max_storage_hm3": 0.0}, generation={"max_turbined_m3s": 10.0}
    )
    hydros(small, plant, inflow=[30.0])
    table(small, "hydro_bounds", ["hydro_id", "stage_id", "water_withdrawal_m3s"], (0, 0, 8.0))
    constant_load(small, 10.0)
    assert cost(small, comm) == pytest.approx(12 * 3 * HOURS)


def test_unbounded_deficit_segment_may_be_the_only_one_of_a_bus(small, comm):
    constant_load(small, 130.0)
    segments = [{"depth_mw": None, "cost": 70.0}]
    edit(
        small,
        "system/buses.json",
        lambda content: content["buses"][0].update(deficit_segments=segments),
    )
    assert cost(small, comm) == pytest.approx((100 * 10 + 30 * 70) * HOURS)


def constraint(case, expression, sense, bound, penalty=None, blocks=(None,)):
    slack = {"enabled": penalty is not None, **({} if penalty is None else {"penalty": penalty})}
    item = {"id": 4, "name": "C", "expression": expression, "sense": sense, "slack": slack}
    write_json(case, "constraints/generic_constraints.json", {"constraints": [item]})
    table(
        case,
        "generic_constraint_bounds",
        ["constraint_id", "stage_id", "block_id", "bound"],
        *((4, 0, block, bound) for block in blocks),
    )


@pytest.mark.parametrize(
    ("sense", "bound", "penalty", "expected"),
    [
        ("<=", 50.0, None, 25 * 10 + 35 * 1000),
        ("<=", 50.0, 3.0, 60 * 10 + (120 - 50) * 3),
        (">=", 150.0, None, 75 * 10 + 15),
        (">=", 150.0, 3.0, 60 * 10 + (150 - 120) * 3),
        ("==", 60.0, None, 30 * 10 + 30 * 1000),
        ("==", 150.0, 3.0, 60 * 10 + 30 * 3),
    ],
)
def test_generic_constraint_holds_or_costs_its_penalty(
    small, comm, sense, bound, penalty, expected
):
    """The load is 60 MW, an excess costs 1 and a deficit 1000; the constraint counts twice."""
    constant_load(small, 60.0)
    constraint(small, "2 * thermal_generation(0)", sense, bound, penalty)
    assert cost(small, comm) == pytest.approx(expected * HOURS)


def test_generic_constraint_holds_in_the_blocks_of_its_bounds(small, comm):
    blocks = [{"id": i, "name": str(i), "hours": hours} for i, hours in enumerate((30.0, 70.0))]
    edit(small, "stages.json", lambda content: content["stages"][0].update(blocks=blocks))
    constant_load(small, 60.0)
    constraint(small, "thermal_generation(0)", "<=", 50.0, blocks=(1,))
    short = 50 * 10 + 10 * 1000
    assert cost(small, comm) == pytest.approx(60 * 10 * 30 + short * 70)
    # A term with a block of its own stands for that block in every row.
    constraint(small, "thermal_generation(0, 0)", "<=", 50.0, blocks=(1,))
    assert cost(small, comm) == pytest.approx(short * 30 + 60 * 10 * 70)


def test_inflow_penalty_is_a_thousand_unless_it_is_given(small, comm):
    hydros(small, hydro_plant(0), inflow=[-5.0])
    edit(small, "config.json", lambda content: content.pop("modeling"))
    assert cost(small, comm) == pytest.approx(5 * 1000 * HOURS)
