"""Making cases for tests: a copy of a case with parts replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_TYPES = {"lag": pa.int32(), "opening_index": pa.uint32(), "entity_index": pa.uint32()}


def copy_case(source: Path, target: Path) -> Path:
    """Copy a case so that its files can be changed, wherever they came from."""
    for path in source.rglob("*"):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination)
    return target


def edit(case: Path, file: str, change: Callable[[Any], Any]) -> None:
    """Let ``change`` alter the content of a JSON file in place."""
    path = case / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_json(case: Path, file: str, content: Any) -> None:
    path = case / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_table(case: Path, file: str, names: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Write rows as Parquet; ids and the like are integers, the others float64."""
    arrays = []
    for i, name in enumerate(names):
        kind = pa.int32() if name.endswith("_id") else _TYPES.get(name, pa.float64())
        arrays.append(pa.array([row[i] for row in rows], type=kind))
    path = case / file
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays, names=names), path, compression="zstd")


def small_case(case: Path, *, stages: int = 1, openings: int = 1, hours: float = 100.0) -> Path:
    """Write a case with one bus and one dear thermal plant, no load and no hydro plant.

    Without a discount and with an exchange cost of 0.01, so that costs can be computed by hand.
    """
    costs = [
        "spillage_cost",
        "diversion_cost",
        "turbined_violation_below_cost",
        "outflow_violation_below_cost",
        "outflow_violation_above_cost",
        "generation_violation_below_cost",
        "water_withdrawal_violation_cost",
        "fpha_turbined_cost",
        "storage_violation_below_cost",
        "filling_target_violation_cost",
        "evaporation_violation_cost",
    ]
    write_json(
        case,
        "config.json",
        {
            "training": {
                "forward_passes": 2,
                "stopping_rules": [{"type": "iteration_limit", "limit": 6}],
            },
            "modeling": {"inflow_non_negativity": {"method": "none"}},
        },
    )
    write_json(
        case,
        "penalties.json",
        {
            "bus": {"deficit_segments": [{"depth_mw": None, "cost": 1000.0}], "excess_cost": 1.0},
            "line": {"exchange_cost": 0.01},
            "hydro": dict.fromkeys(costs, 0.01),
            "non_controllable_source": {"curtailment_cost": 0.005},
        },
    )
    months = [f"20{30 + (m // 12)}-{m % 12 + 1:02d}-01" for m in range(stages + 1)]
    write_json(
        case,
        "stages.json",
        {
            "policy_graph": {"type": "finite_horizon", "annual_discount_rate": 0.0},
            "stages": [
                {
                    "id": t,
                    "start_date": months[t],
                    "end_date": months[t + 1],
                    "blocks": [{"id": 0, "name": "ALL", "hours": hours}],
                    "num_scenarios": openings,
                }
                for t in range(stages)
            ],
        },
    )
    write_json(case, "initial_conditions.json", {"storage": [], "filling_storage": []})
    write_json(case, "system/buses.json", {"buses": [{"id": 0, "name": "A"}]})
    write_json(case, "system/lines.json", {"lines": []})
    write_json(case, "system/hydros.json", {"hydros": []})
    thermal = {"id": 0, "name": "T", "bus_id": 0, "cost_per_mwh": 10.0}
    thermal["generation"] = {"min_mw": 0.0, "max_mw": 100.0}
    write_json(case, "system/thermals.json", {"thermals": [thermal]})
    return case


def hydro_plant(hydro_id: int, **changes: Any) -> dict[str, Any]:
    """Return a plant of 1 MW per m3/s with 100 hm3 and 50 m3/s; ``changes`` replace fields."""
    plant: dict[str, Any] = {
        "id": hydro_id,
        "name": f"H{hydro_id}",
        "bus_id": 0,
        "downstream_id": None,
        "reservoir": {"min_storage_hm3": 0.0, "max_storage_hm3": 100.0},
        "outflow": {"min_outflow_m3s": 0.0, "max_outflow_m3s": None},
        "generation": {
            "model": "constant_productivity",
            "productivity_mw_per_m3s": 1.0,
            "min_turbined_m3s": 0.0,
            "max_turbined_m3s": 50.0,
            "min_generation_mw": 0.0,
            "max_generation_mw": 50.0,
        },
    }
    for key, value in changes.items():
        plant[key] = {**plant[key], **value} if isinstance(plant.get(key), dict) else value
    return plant


def constant_load(case: Path, mean: float, std: float = 0.0, stages: int = 1) -> None:
    write_table(
        case,
        "scenarios/load_seasonal_stats.parquet",
        ["bus_id", "stage_id", "mean_mw", "std_mw"],
        [(0, t, mean, std) for t in range(stages)],
    )


def random_case(case: Path) -> Path:
    """Write a three-stage case that has something of everything that is random or varies.

    Two plants in a cascade with a diversion, autoregressive inflow, random load and wind, two
    blocks, factors, CVaR, discount, correlation, bounds and penalties by stage.
    """
    small_case(case, stages=3, openings=4)
    stage_ids = range(3)

    def stages(content: dict[str, Any]) -> None:
        content["policy_graph"]["annual_discount_rate"] = 0.08
        content["season_definitions"] = {"cycle_type": "monthly", "seasons": []}
        for stage in content["stages"]:
            stage["season_id"] = stage["id"]
            stage["blocks"] = [
                {"id": 0, "name": "HIGH", "hours": 40.0},
                {"id": 1, "name": "LOW", "hours": 60.0},
            ]
            stage["risk_measure"] = {"cvar": {"alpha": 0.5, "lambda": 0.3}}

    edit(case, "stages.json", stages)
    plants = [
        hydro_plant(
            0,
            downstream_id=1,
            diversion={"downstream_id": 2, "max_flow_m3s": 10.0},
            outflow={"min_outflow_m3s": 5.0, "max_outflow_m3s": 60.0},
        ),
        hydro_plant(1, generation={"min_turbined_m3s": 4.0, "min_generation_mw": 3.0}),
        hydro_plant(2),
    ]
    write_json(case, "system/hydros.json", {"hydros": plants})
    write_json(
        case,
        "initial_conditions.json",
        {
            "storage": [{"hydro_id": h, "value_hm3": 20.0} for h in range(3)],
            "past_inflows": [{"hydro_id": h, "values_m3s": [30.0, 28.0]} for h in range(3)],
        },
    )
    write_json(
        case,
        "system/non_controllable_sources.json",
        {
            "non_controllable_sources": [
                {"id": 0, "name": "WIND", "bus_id": 0, "max_generation_mw": 40.0}
            ]
        },
    )
    write_table(
        case,
        "scenarios/inflow_seasonal_stats.parquet",
        ["hydro_id", "stage_id", "mean_m3s", "std_m3s"],
        [(h, t, 25.0 + t, 9.0) for h in range(3) for t in range(-2, 3)],
    )
    write_table(
        case,
        "scenarios/inflow_ar_coefficients.parquet",
        ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
        [
            (h, t, lag, coefficient, 0.8)
            for h in range(2)
            for t in stage_ids
            for lag, coefficient in ((1, 0.5), (2, 0.1))
        ],
    )
    constant_load(case, 190.0, 12.0, stages=3)
    write_table(
        case,
        "scenarios/non_controllable_stats.parquet",
        ["ncs_id", "stage_id", "mean", "std"],
        [(0, t, 0.5, 0.2) for t in stage_ids],
    )
    factors = [{"block_id": 0, "factor": 1.1}, {"block_id": 1, "factor": 0.9}]
    write_json(
        case,
        "scenarios/load_factors.json",
        {"load_factors": [{"bus_id": 0, "stage_id": 1, "block_factors": factors}]},
    )
    write_json(
        case,
        "scenarios/non_controllable_factors.json",
        {"non_controllable_factors": [{"ncs_id": 0, "stage_id": 2, "block_factors": factors}]},
    )
    matrix = (np.full((3, 3), 0.6) + 0.4 * np.eye(3)).tolist()
    entities = [{"type": "inflow", "id": h} for h in range(3)]
    groups = [{"name": "rivers", "entities": entities, "matrix": matrix}]
    write_json(
        case,
        "scenarios/correlation.json",
        {"method": "spectral", "profiles": {"default": {"correlation_groups": groups}}},
    )
    write_table(
        case,
        "constraints/hydro_bounds.parquet",
        ["hydro_id", "stage_id", "max_storage_hm3", "water_withdrawal_m3s"],
        [(2, 1, 80.0, 2.0), (0, 0, None, 1.0)],
    )
    write_table(
        case,
        "constraints/penalty_overrides_hydro.parquet",
        ["hydro_id", "stage_id", "outflow_violation_below_cost"],
        [(0, 1, 5.0)],
    )
    return case


def set_path(*path, value):
    """Return a change that sets a nested value."""

    def change(content):
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


def delete_path(*path):
    def change(content):
        for step in path[:-1]:
            content = content[step]
        del content[path[-1]]

    return change
