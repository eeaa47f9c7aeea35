"""Variants of the shipped case, each with one more part of the format.

``variants.json`` holds what the reference program (Cobre 0.5.1, package ``cobre-python``)
computes for them. To make it anew, write the variants with :func:`write_variants`, run
``cobre.run.run`` on each and collect ``training/convergence.parquet``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cobre_shm.sddp import shipped_case_path
from tests.sddp.editing import copy_case, edit, write_json, write_table

STAGES = range(12)
HYDROS = range(4)
ITERATIONS = 4


def _cvar(case: Path) -> None:
    def change(content: Any) -> None:
        for stage in content["stages"]:
            stage["risk_measure"] = {"cvar": {"alpha": 0.3, "lambda": 0.4}}

    edit(case, "stages.json", change)


def _random_load(case: Path) -> None:
    write_table(
        case,
        "scenarios/load_seasonal_stats.parquet",
        ["bus_id", "stage_id", "mean_mw", "std_mw"],
        [(bus, t, (540.0, 1190.0)[bus] + t, (30.0, 60.0)[bus]) for bus in (0, 1) for t in STAGES],
    )


def _wind(case: Path, stages: range = STAGES) -> None:
    source = {"id": 0, "name": "WIND", "bus_id": 1, "max_generation_mw": 200.0}
    write_json(
        case,
        "system/non_controllable_sources.json",
        {"non_controllable_sources": [source]},
    )
    write_table(
        case,
        "scenarios/non_controllable_stats.parquet",
        ["ncs_id", "stage_id", "mean", "std"],
        [(0, t, 0.4, 0.3) for t in stages],
    )


def _wind_in_half_the_year(case: Path) -> None:
    _wind(case, range(6))
    factors = [{"block_id": 0, "factor": 1.1}, {"block_id": 1, "factor": 0.8}]
    items = [{"ncs_id": 0, "stage_id": t, "block_factors": factors} for t in STAGES]
    write_json(case, "scenarios/non_controllable_factors.json", {"non_controllable_factors": items})


def _lags(method: str) -> Callable[[Path], None]:
    def change(case: Path) -> None:
        write_table(
            case,
            "scenarios/inflow_ar_coefficients.parquet",
            ["hydro_id", "stage_id", "lag", "coefficient", "residual_std_ratio"],
            [
                (h, t, lag, coefficient, 0.8)
                for h in range(3)
                for t in STAGES
                for lag, coefficient in ((1, 0.5), (2, 0.1))
            ],
        )
        past = [{"hydro_id": h, "values_m3s": [80.0, 70.0]} for h in HYDROS]
        edit(case, "initial_conditions.json", lambda content: content.update(past_inflows=past))
        edit(
            case,
            "config.json",
            lambda content: content["modeling"]["inflow_non_negativity"].update(method=method),
        )

    return change


def _correlation(case: Path) -> None:
    entities = [{"type": "inflow", "id": h} for h in HYDROS]
    matrix = (np.full((4, 4), 0.6) + 0.4 * np.eye(4)).tolist()
    groups = [{"name": "rivers", "entities": entities, "matrix": matrix}]
    write_json(
        case,
        "scenarios/correlation.json",
        {"method": "spectral", "profiles": {"default": {"correlation_groups": groups}}},
    )


def _overrides(case: Path) -> None:
    write_table(
        case,
        "constraints/hydro_bounds.parquet",
        ["hydro_id", "stage_id", "max_storage_hm3", "water_withdrawal_m3s", "min_turbined_m3s"],
        [*((2, t, 700.0 + t, 8.0, 90.0) for t in STAGES), (0, 3, None, 5.0, None)],
    )
    write_table(
        case,
        "constraints/thermal_bounds.parquet",
        ["thermal_id", "stage_id", "max_generation_mw", "cost_per_mwh"],
        [*((2, t, 250.0, None) for t in range(6)), (5, 7, None, 200.0)],
    )
    write_table(
        case,
        "constraints/line_bounds.parquet",
        ["line_id", "stage_id", "direct_mw", "reverse_mw"],
        [(0, t, 700.0, None) for t in range(6)],
    )
    tables = (
        ("hydro", ["outflow_violation_below_cost", "spillage_cost"], (5.0, 0.5)),
        ("bus", ["excess_cost"], (7.0,)),
        ("line", ["exchange_cost"], (3.0,)),
    )
    for kind, columns, values in tables:
        write_table(
            case,
            f"constraints/penalty_overrides_{kind}.parquet",
            [f"{kind}_id", "stage_id", *columns],
            [(0, t, *values) for t in STAGES],
        )


def _diversion(case: Path) -> None:
    def change(content: Any) -> None:
        content["hydros"][0]["diversion"] = {"downstream_id": 2, "max_flow_m3s": 40.0}
        content["hydros"][3]["outflow"]["max_outflow_m3s"] = 500.0

    edit(case, "system/hydros.json", change)


def _withdrawal(case: Path) -> None:
    one_sided = {
        "water_withdrawal_violation_pos_cost": 3.0,
        "water_withdrawal_violation_neg_cost": 12.0,
    }
    edit(case, "penalties.json", lambda content: content["hydro"].update(one_sided))
    own = {"spillage_cost": 0.7, "water_withdrawal_violation_cost": 9.0}
    edit(case, "system/hydros.json", lambda content: content["hydros"][1].update(penalties=own))
    write_table(
        case,
        "constraints/hydro_bounds.parquet",
        ["hydro_id", "stage_id", "water_withdrawal_m3s"],
        [(h, t, 20.0) for h in (1, 2) for t in STAGES],
    )


def _discount_by_transition(case: Path) -> None:
    transitions = [{"source_id": t, "target_id": t + 1, "probability": 1.0} for t in range(11)]
    for t in (2, 5):
        transitions[t]["annual_discount_rate_override"] = 0.2
    edit(
        case,
        "stages.json",
        lambda content: content["policy_graph"].update(transitions=transitions),
    )


def _production_model(case: Path) -> None:
    spans = [
        {"start_stage_id": 0, "end_stage_id": 5, "productivity_override": 0.8},
        {"start_stage_id": 6, "end_stage_id": None, "productivity_override": 0.6},
    ]
    ranges = [{**span, "model": "constant_productivity"} for span in spans]
    model = {"hydro_id": 2, "selection_mode": "stage_ranges", "stage_ranges": ranges}
    write_json(case, "system/hydro_production_models.json", {"production_models": [model]})


def _exchange_factors(case: Path) -> None:
    factors = [
        {"block_id": 0, "direct_factor": 0.4, "reverse_factor": 0.5},
        {"block_id": 1, "direct_factor": 0.7, "reverse_factor": 0.9},
    ]
    items = [{"line_id": 0, "stage_id": t, "block_factors": factors} for t in STAGES]
    write_json(case, "constraints/exchange_factors.json", {"exchange_factors": items})


def _shared_noise(case: Path) -> None:
    def change(content: Any) -> None:
        del content["season_definitions"]
        for stage in content["stages"]:
            stage["season_id"] = stage["id"] // 2
            stage["num_scenarios"] = 8 if stage["id"] % 2 == 0 else 10

    edit(case, "stages.json", change)


def _generic_constraints(case: Path) -> None:
    slack = {"enabled": True, "penalty": 700.0}
    none = {"enabled": False}
    constraints = [
        ("hydro_generation(0) + 2 * thermal_generation(1)", "<=", slack),
        ("hydro_turbined(1) - 0.5 * hydro_spillage(2) + hydro_outflow(3, 1)", ">=", slack),
        ("line_exchange(0)", "<=", none),
        ("hydro_storage(2) + 1.5 * hydro_storage(0)", ">=", slack),
        ("bus_deficit(0) + bus_excess(1) + thermal_generation(3)", "==", slack),
    ]
    write_json(
        case,
        "constraints/generic_constraints.json",
        {
            "constraints": [
                {"id": i, "name": str(i), "expression": text, "sense": sense, "slack": slack}
                for i, (text, sense, slack) in enumerate(constraints)
            ]
        },
    )
    bounds = [400.0, 300.0, 650.0, 900.0, 90.0]
    write_table(
        case,
        "constraints/generic_constraint_bounds.parquet",
        ["constraint_id", "stage_id", "block_id", "bound"],
        [
            (i, t, None if t < 6 else i % 2, bound)
            for i, bound in enumerate(bounds)
            for t in range(1, 12)
        ],
    )


def _load_and_wind(case: Path) -> None:
    _random_load(case)
    _wind(case)


def _much_at_once(case: Path) -> None:
    for change in (
        *(_cvar, _load_and_wind, _lags("penalty"), _correlation, _overrides, _diversion),
        *(_discount_by_transition, _production_model, _exchange_factors, _generic_constraints),
    ):
        change(case)


def _own_openings(case: Path) -> None:
    """Openings of the user, with CVaR, random load and lagged inflow."""
    for change in (_cvar, _random_load, _lags("truncation_with_penalty"), _generic_constraints):
        change(case)
    components = len(HYDROS) + 2
    rows = [
        # Made up, but neither symmetric nor sorted.
        (t, opening, i, 1.7 * np.sin(1.0 + 2.3 * t + 3.1 * opening + 5.7 * i))
        for t, stage in enumerate(json.loads((case / "stages.json").read_text())["stages"])
        for opening in range(stage["num_scenarios"])
        for i in range(components)
    ]
    names = ["stage_id", "opening_index", "entity_index", "value"]
    write_table(case, "scenarios/noise_openings.parquet", names, rows)


VARIANTS: dict[str, Callable[[Path], None]] = {
    "plain": lambda _: None,
    "cvar": _cvar,
    "random_load": _random_load,
    "wind": _wind,
    "wind_in_half_the_year": _wind_in_half_the_year,
    "load_and_wind": _load_and_wind,
    "lags_none": _lags("none"),
    "lags_penalty": _lags("penalty"),
    "lags_truncation": _lags("truncation"),
    "lags_truncation_with_penalty": _lags("truncation_with_penalty"),
    "correlation": _correlation,
    "overrides": _overrides,
    "diversion": _diversion,
    "withdrawal": _withdrawal,
    "discount_by_transition": _discount_by_transition,
    "production_model": _production_model,
    "exchange_factors": _exchange_factors,
    "shared_noise": _shared_noise,
    "generic_constraints": _generic_constraints,
    "much_at_once": _much_at_once,
    "own_openings": _own_openings,
}


def write_variant(name: str, target: Path) -> Path:
    """Write one variant, with three trajectories an iteration and its tree exported."""
    case = copy_case(shipped_case_path(), target)

    def change(content: Any) -> None:
        content["training"]["forward_passes"] = 3
        content["training"]["stopping_rules"][0]["limit"] = ITERATIONS
        content["exports"] = {"stochastic": True}

    edit(case, "config.json", change)
    VARIANTS[name](case)
    return case


def write_variants(root: Path) -> None:
    """Write every variant into a directory of its name below ``root``."""
    for name in VARIANTS:
        write_variant(name, root / name)
