"""Reading of the hydro plants and of their production models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from cobre_shm.sddp.errors import OutOfRange
from cobre_shm.sddp.fields import Record, identified
from cobre_shm.sddp.stages import Stage
from cobre_shm.sddp.system import HYDRO_COST_NAMES, Hydro, Penalties, positions_of

_MODELS = ("constant_productivity", "linearized_head")


def parse_hydros(
    document: Record, penalties: Penalties, buses: Mapping[int, int]
) -> tuple[Hydro, ...]:
    """Read and check ``system/hydros.json``.

    Raises:
        CaseError: A value is wrong, the cascade runs in a circle, or a plant asks for
            something that is not supported.
    """
    records = identified(document, "hydros")
    positions = positions_of(records)
    hydros = tuple(_parse_hydro(record, penalties, buses, positions) for record in records)
    for start, record in enumerate(records):
        below = hydros[start].downstream
        for _ in hydros:
            if below is None:
                break
            below = hydros[below].downstream
        if below is not None:
            raise record.error(
                OutOfRange,
                "downstream_id",
                "the cascade runs in a circle",
                value=record.data["downstream_id"],
                expected="a path that ends",
            )
    return hydros


def _parse_hydro(
    record: Record, penalties: Penalties, buses: Mapping[int, int], positions: Mapping[int, int]
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
        min_turbined_m3s=generation.number("min_turbined_m3s", minimum=0.0),
        max_turbined_m3s=generation.number("max_turbined_m3s", minimum=0.0),
        min_generation_mw=generation.number("min_generation_mw", minimum=0.0),
        max_generation_mw=generation.number("max_generation_mw", minimum=0.0),
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
    document: Record, hydros: tuple[Hydro, ...], stages: tuple[Stage, ...]
) -> tuple[Hydro, ...]:
    """Give the plants the productivities of ``system/hydro_production_models.json``."""
    positions = {hydro.id: i for i, hydro in enumerate(hydros)}
    result = list(hydros)
    for model in document.records("production_models", []):
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
        result[h] = replace(hydros[h], productivity_by_stage=by_stage)
    return tuple(result)
