"""Reading of the hydro plants and of their production models."""

from __future__ import annotations

import math
from dataclasses import replace

from cobre_shm.sddp.errors import DuplicateId, OutOfRange
from cobre_shm.sddp.fields import Positions, Record, identified
from cobre_shm.sddp.stages import Stage
from cobre_shm.sddp.system import HYDRO_COST_NAMES, Hydro, Penalties

_MODELS = ("constant_productivity", "linearized_head")


def parse_hydros(
    document: Record, penalties: Penalties, buses: Positions
) -> tuple[tuple[Hydro, ...], Positions]:
    """Read and check ``system/hydros.json``."""
    records, positions = identified(document, "hydros")
    hydros = tuple(_parse_hydro(record, penalties, buses, positions) for record in records)
    for start, record in enumerate(records):
        if _is_in_circle(hydros, start):
            record.report(
                OutOfRange,
                "downstream_id",
                "the cascade runs in a circle",
                value=record.data["downstream_id"],
                expected="a path that ends",
            )
            break
    else:
        _check_diversions(hydros, records)
    return hydros, positions


def _is_in_circle(hydros: tuple[Hydro, ...], start: int) -> bool:
    below = hydros[start].downstream
    for _ in hydros:
        # Minus one stands for a plant that does not exist.
        if below is None or below < 0:
            return False
        below = hydros[below].downstream
    return True


def _check_diversions(hydros: tuple[Hydro, ...], records: list[Record]) -> None:
    """Report a diversion whose water comes back: each round would give its energy once more."""
    for h, record in enumerate(records):
        target = hydros[h].diversion_target
        if target is not None and h in _reached(hydros, target):
            diversion = record.record("diversion")
            diversion.report(
                OutOfRange,
                "downstream_id",
                "the diverted water runs in a circle",
                value=diversion.data["downstream_id"],
                expected="a plant from which no water comes back",
            )
            break


def _reached(hydros: tuple[Hydro, ...], start: int) -> set[int]:
    """Return the plants that the water of one reaches, that one included."""
    reached: set[int] = set()
    ahead: list[int | None] = [start]
    while ahead:
        h = ahead.pop()
        # Minus one stands for a plant that does not exist.
        if h is not None and h >= 0 and h not in reached:
            reached.add(h)
            ahead += (hydros[h].downstream, hydros[h].diversion_target)
    return reached


def _parse_hydro(
    record: Record, penalties: Penalties, buses: Positions, positions: Positions
) -> Hydro:
    for name in ("evaporation", "filling"):
        if name in record:
            record.refuse(name, name)
    reservoir, outflow = record.record("reservoir"), record.record("outflow")
    generation = record.record("generation")
    generation.choice("model", _MODELS, unsupported=("fpha",))
    diversion = record.record("diversion", required=False)
    low_storage = reservoir.number("min_storage_hm3", minimum=0.0)
    low_outflow = outflow.number("min_outflow_m3s", minimum=0.0)
    low_turbined = generation.number("min_turbined_m3s", minimum=0.0)
    low_generation = generation.number("min_generation_mw", minimum=0.0)
    own = record.record("penalties", required=False)
    costs = {name: own.number(name, minimum=0.0) for name in HYDRO_COST_NAMES if name in own}
    return Hydro(
        id=record.integer("id"),
        name=record.text("name", ""),
        bus=record.reference("bus_id", buses, "bus"),
        downstream=(
            record.reference("downstream_id", positions, "hydro plant")
            if "downstream_id" in record
            else None
        ),
        min_storage_hm3=low_storage,
        max_storage_hm3=reservoir.number("max_storage_hm3", minimum=low_storage),
        min_outflow_m3s=low_outflow,
        max_outflow_m3s=outflow.number("max_outflow_m3s", math.inf, minimum=low_outflow),
        productivity=generation.number("productivity_mw_per_m3s", minimum=0.0),
        min_turbined_m3s=low_turbined,
        max_turbined_m3s=generation.number("max_turbined_m3s", minimum=low_turbined),
        min_generation_mw=low_generation,
        max_generation_mw=generation.number("max_generation_mw", minimum=low_generation),
        diversion_target=(
            diversion.reference("downstream_id", positions, "hydro plant")
            if diversion.data
            else None
        ),
        max_diversion_m3s=(
            diversion.number("max_flow_m3s", minimum=0.0) if diversion.data else 0.0
        ),
        costs=penalties.hydro.updated(costs),
    )


def apply_production_models(
    document: Record,
    hydros: tuple[Hydro, ...],
    positions: Positions,
    stages: tuple[Stage, ...],
) -> tuple[Hydro, ...]:
    """Give the plants the productivities of ``system/hydro_production_models.json``."""
    result = list(hydros)
    seen: set[int] = set()
    for model in document.records("production_models"):
        h = model.reference("hydro_id", positions, "hydro plant")
        model.choice("selection_mode", ("stage_ranges",), unsupported=("seasonal",))
        by_stage: dict[int, float] = {}
        for span in model.records("stage_ranges"):
            span.choice("model", _MODELS, unsupported=("fpha",))
            first = span.integer("start_stage_id")
            last = span.integer("end_stage_id", math.inf)
            productivity = span.number("productivity_override", None, above=0.0)
            if productivity is not None:
                by_stage.update(
                    (t, productivity) for t, stage in enumerate(stages) if first <= stage.id <= last
                )
        if h in seen:
            # The later one would take the place of the first, also at stages that it leaves out.
            model.report(
                DuplicateId,
                "hydro_id",
                "the hydro plant has a production model already",
                value=model.data["hydro_id"],
                expected="one production model per hydro plant",
            )
        if h >= 0:
            seen.add(h)
            result[h] = replace(hydros[h], productivity_by_stage=by_stage)
    return tuple(result)
