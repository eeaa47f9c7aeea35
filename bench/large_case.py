"""A case of realistic size: 24 hydro plants, 24 monthly stages, 3 blocks, 15 openings.

    python bench/large_case.py DIRECTORY

writes it. Four rivers of six plants each, one bus per river and one without water, five lines,
32 thermal plants, first-order autoregressive inflow that is correlated along each river. All
figures are made up, by formulas without random numbers, so that every copy is the same.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RIVERS, PLANTS = 4, 6
HYDROS, BUSES, THERMALS, STAGES, OPENINGS = RIVERS * PLANTS, RIVERS + 1, 32, 24, 15
# Block lengths as shares of a month of 730 hours.
BLOCKS = (("PEAK", 110.0, 1.25), ("SHOULDER", 350.0, 1.05), ("NIGHT", 270.0, 0.83))
LINES = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 0))
PENALTIES = {
    "spillage_cost": 0.01,
    "diversion_cost": 0.1,
    "turbined_violation_below_cost": 500.0,
    "outflow_violation_below_cost": 500.0,
    "outflow_violation_above_cost": 500.0,
    "generation_violation_below_cost": 1000.0,
    "water_withdrawal_violation_cost": 1000.0,
    "fpha_turbined_cost": 0.05,
    "storage_violation_below_cost": 10000.0,
    "filling_target_violation_cost": 50000.0,
    "evaporation_violation_cost": 5000.0,
    "inflow_nonnegativity_cost": 1000.0,
}


def write_large_case(case: Path, iterations: int, forward_passes: int = 4) -> Path:
    """Write the case into the directory ``case`` and return it."""
    _settings(case, iterations, forward_passes)
    _stages(case)
    _system(case)
    _scenarios(case)
    return case


def _json(case: Path, file: str, content: Any) -> None:
    path = case / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def _table(case: Path, file: str, names: list[str], rows: list[tuple[Any, ...]]) -> None:
    whole = {"hydro_id", "bus_id", "stage_id", "lag"}
    columns = {
        name: pa.array([row[i] for row in rows], pa.int32() if name in whole else pa.float64())
        for i, name in enumerate(names)
    }
    path = case / file
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd")


def _settings(case: Path, iterations: int, forward_passes: int) -> None:
    rules = [{"type": "iteration_limit", "limit": iterations}]
    scheme = {name: {"scheme": "in_sample"} for name in ("inflow", "load", "ncs")}
    training = {"forward_passes": forward_passes, "stopping_rules": rules}
    _json(
        case,
        "config.json",
        {
            "training": {**training, "scenario_source": {"seed": 42, **scheme}},
            "simulation": {"enabled": False, "num_scenarios": 100},
            "modeling": {"inflow_non_negativity": {"method": "penalty"}},
        },
    )
    deficit = [{"depth_mw": None, "cost": 3000.0}]
    _json(
        case,
        "penalties.json",
        {
            "bus": {"deficit_segments": deficit, "excess_cost": 0.5},
            "line": {"exchange_cost": 0.05},
            "hydro": PENALTIES,
            "non_controllable_source": {"curtailment_cost": 0.005},
        },
    )


def _month(t: int) -> str:
    return f"{2030 + t // 12}-{t % 12 + 1:02d}-01"


def _stages(case: Path) -> None:
    seasons = [{"id": m, "month_start": m + 1, "label": f"month {m + 1}"} for m in range(12)]
    blocks = [{"id": k, "name": name, "hours": h} for k, (name, h, _) in enumerate(BLOCKS)]
    stages = [
        {
            "id": t,
            "start_date": _month(t),
            "end_date": _month(t + 1),
            "season_id": t % 12,
            "blocks": blocks,
            "num_scenarios": OPENINGS,
        }
        for t in range(STAGES)
    ]
    _json(
        case,
        "stages.json",
        {
            "policy_graph": {"type": "finite_horizon", "annual_discount_rate": 0.06},
            "season_definitions": {"cycle_type": "monthly", "seasons": seasons},
            "stages": stages,
        },
    )


def _hydro(h: int) -> dict[str, Any]:
    river, place = divmod(h, PLANTS)
    size = 900.0 + 350.0 * ((5 * h) % 7) if place % 2 == 0 else 60.0 + 10.0 * h
    productivity = 0.35 + 0.11 * ((3 * h) % 6)
    turbined = 150.0 + 90.0 * place + 20.0 * river
    return {
        "id": h,
        "name": f"R{river}P{place}",
        "bus_id": river,
        "downstream_id": h + 1 if place + 1 < PLANTS else None,
        "reservoir": {"min_storage_hm3": round(0.1 * size, 3), "max_storage_hm3": size},
        "outflow": {"min_outflow_m3s": 12.0 + 6.0 * place, "max_outflow_m3s": None},
        "generation": {
            "model": "constant_productivity",
            "productivity_mw_per_m3s": round(productivity, 3),
            "min_turbined_m3s": 0.0,
            "max_turbined_m3s": turbined,
            "min_generation_mw": 0.0,
            "max_generation_mw": round(productivity * turbined, 3),
        },
    }


def _thermal(j: int) -> dict[str, Any]:
    return {
        "id": j,
        "name": f"T{j}",
        "bus_id": j % BUSES,
        "cost_per_mwh": round(28.0 + 11.7 * j + 0.9 * j * (j % 3), 2),
        "generation": {"min_mw": 20.0 if j < 6 else 0.0, "max_mw": 55.0 + 13.0 * ((7 * j) % 11)},
    }


def _system(case: Path) -> None:
    _json(case, "system/buses.json", {"buses": [{"id": b, "name": f"B{b}"} for b in range(BUSES)]})
    lines = [
        {
            "id": i,
            "name": f"L{source}{target}",
            "source_bus_id": source,
            "target_bus_id": target,
            "capacity": {"direct_mw": 300.0 + 60.0 * i, "reverse_mw": 240.0 + 50.0 * i},
        }
        for i, (source, target) in enumerate(LINES)
    ]
    _json(case, "system/lines.json", {"lines": lines})
    hydros = [_hydro(h) for h in range(HYDROS)]
    _json(case, "system/hydros.json", {"hydros": hydros})
    _json(case, "system/thermals.json", {"thermals": [_thermal(j) for j in range(THERMALS)]})
    storage = [
        {"hydro_id": h, "value_hm3": round(0.55 * hydro["reservoir"]["max_storage_hm3"], 3)}
        for h, hydro in enumerate(hydros)
    ]
    past = [{"hydro_id": h, "values_m3s": [round(0.9 * _inflow(h, -1), 3)]} for h in range(HYDROS)]
    _json(
        case,
        "initial_conditions.json",
        {"storage": storage, "filling_storage": [], "past_inflows": past},
    )


def _inflow(h: int, t: int) -> float:
    river, place = divmod(h, PLANTS)
    season = 1.0 + 0.55 * math.cos(2 * math.pi * (t - 1 - river) / 12)
    return (70.0 if place == 0 else 22.0 + 4.0 * place) * (1.0 + 0.15 * river) * season


def _scenarios(case: Path) -> None:
    statistics = [
        (h, t, round(_inflow(h, t), 3), round((0.25 + 0.02 * (h % 5)) * _inflow(h, t), 3))
        for h in range(HYDROS)
        for t in range(-1, STAGES)
    ]
    names = ["hydro_id", "stage_id", "mean_m3s", "std_m3s"]
    _table(case, "scenarios/inflow_seasonal_stats.parquet", names, statistics)
    coefficient = 0.6
    _table(
        case,
        "scenarios/inflow_ar_coefficients.parquet",
        ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
        [
            (h, t, 1, coefficient, math.sqrt(1.0 - coefficient**2))
            for h in range(HYDROS)
            for t in range(STAGES)
        ],
    )
    loads = [
        (b, t, round((760.0, 640.0, 820.0, 590.0, 430.0)[b] * (1.0 + 0.06 * math.sin(t / 2)), 3))
        for b in range(BUSES)
        for t in range(STAGES)
    ]
    _table(
        case,
        "scenarios/load_seasonal_stats.parquet",
        ["bus_id", "stage_id", "mean_mw", "std_mw"],
        [(*row, 0.0) for row in loads],
    )
    factors = [{"block_id": k, "factor": factor} for k, (_, _, factor) in enumerate(BLOCKS)]
    _json(
        case,
        "scenarios/load_factors.json",
        {
            "load_factors": [
                {"bus_id": b, "stage_id": t, "block_factors": factors}
                for b in range(BUSES)
                for t in range(STAGES)
            ]
        },
    )
    matrix = (0.5 * np.eye(PLANTS) + np.full((PLANTS, PLANTS), 0.5)).tolist()
    groups = [
        {
            "name": f"river {river}",
            "entities": [
                {"type": "inflow", "id": river * PLANTS + place} for place in range(PLANTS)
            ],
            "matrix": matrix,
        }
        for river in range(RIVERS)
    ]
    profiles = {"default": {"correlation_groups": groups}}
    _json(case, "scenarios/correlation.json", {"method": "spectral", "profiles": profiles})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    write_large_case(parser.parse_args().directory, iterations=16)
