"""The files that a simulation leaves behind, one row per scenario, stage and entity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.results import (
    SIMULATION_SUMMARY,
    Columns,
    remove_old,
    write_csv,
    write_json,
    write_table,
)
from cobre_shm.sddp.simulation import SimulationResult, StageOutcome
from cobre_shm.sddp.training_result import CONFIDENCE, mean_and_std

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_BY_HYDRO = {
    "turbined_m3s": "turbined",
    "spillage_m3s": "spilled",
    "inflow_m3s": "inflow",
    "storage_initial_hm3": "storage_initial",
    "storage_final_hm3": "storage_final",
    "generation_mw": "hydro_generation",
    "water_value_per_hm3": "water_value",
}
_BY_BUS = {
    "load_mw": "load",
    "deficit_mw": "deficit",
    "excess_mw": "excess",
    "spot_price": "spot_price",
}


def write_simulation(result: SimulationResult, root: Path) -> None:
    """Write everything that a simulation produced into ``root/simulation``.

    Nothing of an earlier simulation stays there, and the summary comes last.

    Raises:
        OutputError: A file cannot be written.
    """
    case, folder = result.case, root / "simulation"
    remove_old(root / SIMULATION_SUMMARY)
    costs = _costs(result)
    write_table(folder / "costs.parquet", costs)
    write_csv(folder / "costs.csv", costs)
    tables: tuple[tuple[str, str, Sequence[Any], dict[str, str]], ...] = (
        ("hydros", "hydro_id", case.hydros, _BY_HYDRO),
        ("thermals", "thermal_id", case.thermals, {"generation_mw": "thermal"}),
        ("buses", "bus_id", case.buses, _BY_BUS),
        ("exchanges", "line_id", case.lines, {"net_flow_mw": "exchange"}),
        ("non_controllables", "ncs_id", case.sources, {"generation_mw": "source"}),
    )
    for name, key, entities, columns in tables:
        if entities:
            ids = np.array([entity.id for entity in entities], dtype=np.int32)
            write_table(folder / f"{name}.parquet", _table(result, key, ids, columns))
        else:
            remove_old(folder / f"{name}.parquet")
    write_json(root / SIMULATION_SUMMARY, summary(result))


def summary(result: SimulationResult) -> dict[str, Any]:
    """Return count, mean, deviation, 95 % half width and quantiles of the total cost in $."""
    costs = result.total_cost
    mean, std = mean_and_std(costs)
    return {
        "scenarios": len(costs),
        "cost_unit": "$",
        "mean": mean,
        "std": std,
        "ci95_half_width": float(CONFIDENCE * std / np.sqrt(len(costs))),
        "minimum": float(costs.min()),
        "maximum": float(costs.max()),
        "quantiles": {str(q): float(np.quantile(costs, q)) for q in _QUANTILES},
    }


def _costs(result: SimulationResult) -> Columns:
    stages, scenarios = result.case.horizon.stages, len(result.total_cost)
    ids = np.array([stage.id for stage in stages], dtype=np.int32)

    def by_scenario(name: str) -> npt.NDArray[Any]:
        return np.stack([getattr(stage, name) for stage in result.stages], axis=1).reshape(-1)

    return {
        "scenario_id": np.repeat(np.arange(scenarios, dtype=np.int32), len(stages)),
        "stage_id": np.tile(ids, scenarios),
        "immediate_cost": by_scenario("immediate_cost"),
        "future_cost": by_scenario("future_cost"),
        "discount_factor": np.tile(result.discounts, scenarios),
    }


def _table(
    result: SimulationResult, key: str, ids: npt.NDArray[np.int32], columns: dict[str, str]
) -> Columns:
    parts = [
        _stage_rows(stage.id, outcome, key, ids, columns)
        for stage, outcome in zip(result.case.horizon.stages, result.stages, strict=True)
    ]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole["scenario_id"], kind="stable")
    return {name: values[order] for name, values in whole.items()}


def _stage_rows(
    stage_id: int,
    outcome: StageOutcome,
    key: str,
    ids: npt.NDArray[np.int32],
    columns: dict[str, str],
) -> dict[str, npt.NDArray[Any]]:
    arrays = {name: getattr(outcome, field) for name, field in columns.items()}
    index = np.indices(next(iter(arrays.values())).shape, dtype=np.int32)
    rows = {
        "scenario_id": index[0].reshape(-1),
        "stage_id": np.full(index[0].size, stage_id, dtype=np.int32),
        key: ids[index[1].reshape(-1)],
    }
    if len(index) > 2:
        rows["block_id"] = index[2].reshape(-1)
    return rows | {name: array.reshape(-1) for name, array in arrays.items()}
