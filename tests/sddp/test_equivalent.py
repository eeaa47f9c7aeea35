"""Random small systems: the bound converges to the optimum of the whole tree, from below."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import load_case, series_digest, train
from cobre_shm.sddp.node_arrays import NodeArrays
from tests.sddp.editing import edit, hydro_plant, small_case, write_json, write_table
from tests.sddp.equivalent import Equivalent
from tests.sddp.threads import run_ranks


def number(low, high, step=0.5):
    """Numbers on a grid: what differs by less than a solver's tolerance is no other system."""
    return st.integers(round(low / step), round(high / step)).map(lambda i: i * step)


def plants(count, buses):
    return st.tuples(*(plant(h, count, buses) for h in range(count)))


def plant(h, count, buses):
    last = h + 1 == count
    later = st.none() if last else st.sampled_from((None, h + 1))
    generation = {
        "productivity_mw_per_m3s": number(0.5, 2.0),
        "max_turbined_m3s": number(5, 60),
        "max_generation_mw": number(10, 80),
    }
    target = st.fixed_dictionaries({"downstream_id": st.just(h + 1), "max_flow_m3s": number(1, 10)})
    return st.fixed_dictionaries(
        {
            "bus_id": st.integers(0, buses - 1),
            "downstream_id": later,
            "reservoir": st.fixed_dictionaries({"max_storage_hm3": number(0, 40)}),
            "outflow": st.fixed_dictionaries({"min_outflow_m3s": number(0.5, 10)}),
            "generation": st.fixed_dictionaries(generation),
            "diversion": st.none() if last else st.one_of(st.none(), target, target),
        }
    )


@st.composite
def systems(draw):
    """Draw the numbers of a system of at most three stages with at most three openings each."""
    buses, stages = draw(st.integers(1, 2)), draw(st.sampled_from((3, 3, 2, 1)))
    count = draw(st.sampled_from((2, 2, 1, 0)))
    per_stage = range(stages)
    lagged = count > 0 and draw(st.booleans())
    # Without the penalty a negative inflow has no solution.
    penalty = lagged or draw(st.booleans())
    random_first = draw(st.booleans())
    cvar = st.fixed_dictionaries({"alpha": number(0.25, 1, 0.25), "lambda": number(0, 1, 0.25)})
    return {
        "stages": stages,
        "openings": draw(st.sampled_from((3, 2, 1))),
        "hours": draw(st.lists(number(20, 200, 10), min_size=1, max_size=2)),
        "rate": draw(number(0, 0.2, 0.05)),
        "cvar": draw(st.one_of(st.none(), cvar, cvar)),
        "penalty": penalty,
        "plants": draw(plants(count, buses)),
        "storage": [draw(number(0, 40)) for _ in range(count)],
        "past": [draw(number(0, 30)) for _ in range(count)],
        "lag": draw(number(0.1, 0.9, 0.1)) if lagged else None,
        "inflow": [
            (h, t, draw(number(5 if penalty else 15, 30)), draw(number(0.5, 4)))
            for h in range(count)
            for t in (-1, *per_stage)
        ],
        "load": [
            (b, t, draw(number(10, 90)), draw(number(0, 10)) if t or random_first else 0.0)
            for b in range(buses)
            for t in per_stage
        ],
        "thermals": [
            (
                draw(st.integers(0, buses - 1)),
                draw(number(5, 50)),
                draw(number(0, 5)),
                draw(number(10, 60)),
            )
            for _ in range(draw(st.integers(0, 2)))
        ],
        "line": (draw(number(0, 30)), draw(number(0, 30))) if buses > 1 else None,
        "wind": [(0, t, draw(number(0, 1, 0.1)), draw(number(0, 0.5, 0.1))) for t in per_stage]
        if draw(st.booleans())
        else None,
    }


def write_system(path, system):
    small_case(path, stages=system["stages"], openings=system["openings"])

    def stages(content):
        content["policy_graph"]["annual_discount_rate"] = system["rate"]
        for stage in content["stages"]:
            stage["blocks"] = [
                {"id": k, "name": str(k), "hours": hours} for k, hours in enumerate(system["hours"])
            ]
            if system["cvar"] is not None:
                stage["risk_measure"] = {"cvar": system["cvar"]}

    edit(path, "stages.json", stages)

    def penalties(content):
        content["bus"]["deficit_segments"] = [
            {"depth_mw": 20.0, "cost": 300.0},
            {"depth_mw": None, "cost": 1000.0},
        ]
        content["hydro"].update(
            spillage_cost=0.01,
            diversion_cost=0.1,
            outflow_violation_below_cost=40.0,
            inflow_nonnegativity_cost=500.0,
        )

    edit(path, "penalties.json", penalties)
    method = "penalty" if system["penalty"] else "none"
    edit(
        path,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method=method),
    )
    edit(path, "config.json", lambda content: content["training"].update(forward_passes=4))
    buses = 1 + (system["line"] is not None)
    write_json(path, "system/buses.json", {"buses": [{"id": b, "name": "B"} for b in range(buses)]})
    if system["line"] is not None:
        direct, reverse = system["line"]
        line = {"id": 0, "name": "L", "source_bus_id": 0, "target_bus_id": 1}
        line["capacity"] = {"direct_mw": direct, "reverse_mw": reverse}
        write_json(path, "system/lines.json", {"lines": [line]})
    thermals = [
        {
            "id": j,
            "name": "T",
            "bus_id": bus,
            "cost_per_mwh": cost,
            "generation": {"min_mw": low, "max_mw": high},
        }
        for j, (bus, cost, low, high) in enumerate(system["thermals"])
    ]
    write_json(path, "system/thermals.json", {"thermals": thermals})
    hydros = []
    for h, item in enumerate(system["plants"]):
        diversion = item["diversion"]
        parts = {key: value for key, value in item.items() if key != "diversion"}
        hydros.append(hydro_plant(h, **parts, **({"diversion": diversion} if diversion else {})))
    write_json(path, "system/hydros.json", {"hydros": hydros})
    initial = {
        "storage": [
            {"hydro_id": h, "value_hm3": min(value, plant["reservoir"]["max_storage_hm3"])}
            for h, (value, plant) in enumerate(zip(system["storage"], hydros, strict=True))
        ],
        "past_inflows": [
            {"hydro_id": h, "values_m3s": [value]} for h, value in enumerate(system["past"])
        ],
    }
    write_json(path, "initial_conditions.json", initial)
    names = ["hydro_id", "stage_id", "mean_m3s", "std_m3s"]
    write_table(path, "scenarios/inflow_seasonal_stats.parquet", names, system["inflow"])
    names = ["bus_id", "stage_id", "mean_mw", "std_mw"]
    write_table(path, "scenarios/load_seasonal_stats.parquet", names, system["load"])
    if system["lag"] is not None:
        write_table(
            path,
            "scenarios/inflow_ar_coefficients.parquet",
            ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
            [
                (h, t, 1, system["lag"], 0.8)
                for h in range(len(hydros))
                for t in range(system["stages"])
            ],
        )
    if system["wind"] is not None:
        source = {"id": 0, "name": "W", "bus_id": 0, "max_generation_mw": 25.0}
        write_json(
            path, "system/non_controllable_sources.json", {"non_controllable_sources": [source]}
        )
        names = ["ncs_id", "stage_id", "mean", "std"]
        write_table(path, "scenarios/non_controllable_stats.parquet", names, system["wind"])
    return path


def check(system):
    with tempfile.TemporaryDirectory() as directory:
        path = write_system(Path(directory) / "case", system)
        case = load_case(path)
        tree = NodeArrays(LocalCommunicator()).opening_tree(case)
        optimum = Equivalent(path, tree).optimum()
    result = train(case, LocalCommunicator(), iterations=25)
    bounds, size = result.lower_bound, max(1.0, abs(optimum))
    # The first stage is valued at its mean load. If that is not the load of its trajectories,
    # they need not come where a cut is missing.
    if not any(std for _, t, _, std in system["load"] if t == 0):
        assert bounds[-1] == pytest.approx(optimum, abs=1e-6 * size)
    assert (bounds <= optimum + 1e-7 * size).all()
    assert (np.diff(bounds) >= -1e-7 * size).all()
    return case, result


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(systems())
def test_bound_converges_to_the_optimum_of_a_random_system(system):
    check(system)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(systems(), st.sampled_from((2, 3, 8)))
def test_bound_of_many_random_systems_on_any_number_of_ranks(system, size):
    case, result = check(system)
    results = run_ranks(size, lambda comm: train(case, comm, iterations=25))
    assert {series_digest(other) for other in results} == {series_digest(result)}
