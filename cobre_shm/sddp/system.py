"""The power system: buses, lines, hydro plants, thermal plants, non-controllable sources."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from cobre_shm.sddp.errors import OutOfRange, SchemaViolation
from cobre_shm.sddp.fields import Positions, Record, identified

_Entity = TypeVar("_Entity")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the deficit: up to ``depth_mw`` (may be infinite) at ``cost`` per MWh."""

    depth_mw: float
    cost: float


@dataclass(frozen=True, slots=True)
class Bus:
    """A node of the network; ``excess_cost`` in $ per MWh."""

    id: int
    name: str
    deficit: tuple[Segment, ...]
    excess_cost: float


@dataclass(frozen=True, slots=True)
class Line:
    """A transmission line; buses are positions, capacities in MW, cost in $ per MWh."""

    id: int
    name: str
    source: int
    target: int
    direct_mw: float
    reverse_mw: float
    exchange_cost: float


@dataclass(frozen=True, slots=True)
class Thermal:
    """A thermal plant; ``bus`` is a position, power in MW, cost in $ per MWh."""

    id: int
    name: str
    bus: int
    min_mw: float
    max_mw: float
    cost_per_mwh: float


@dataclass(frozen=True, slots=True)
class HydroCosts:
    """Penalties of a hydro plant in $ per (m3/s)h or per MWh, named as in ``penalties.json``."""

    spillage_cost: float
    diversion_cost: float
    turbined_violation_below_cost: float
    outflow_violation_below_cost: float
    outflow_violation_above_cost: float
    generation_violation_below_cost: float
    water_withdrawal_violation_cost: float
    inflow_nonnegativity_cost: float
    water_withdrawal_violation_pos_cost: float | None = None
    water_withdrawal_violation_neg_cost: float | None = None

    def updated(self, values: Mapping[str, float]) -> HydroCosts:
        """Return these costs with ``values`` in their place.

        A symmetric withdrawal cost takes the place of both one-sided costs from before.
        """
        cleared: dict[str, float | None] = {}
        if "water_withdrawal_violation_cost" in values:
            cleared = dict.fromkeys(_ONE_SIDED_COSTS)
        changes: dict[str, Any] = {**cleared, **values}
        return replace(self, **changes)


HYDRO_COST_NAMES = tuple(item.name for item in fields(HydroCosts))
_ONE_SIDED_COSTS = (
    "water_withdrawal_violation_pos_cost",
    "water_withdrawal_violation_neg_cost",
)
_OPTIONAL_COSTS = ("inflow_nonnegativity_cost", *_ONE_SIDED_COSTS)
_UNUSED_COSTS = (
    "storage_violation_below_cost",
    "filling_target_violation_cost",
    "evaporation_violation_cost",
)
_DEFAULT_INFLOW_COST = 1000.0


@dataclass(frozen=True, slots=True)
class Hydro:
    """A hydro plant; positions for ``bus``, ``downstream`` and ``diversion_target``.

    Storage in hm3, flows in m3/s, power in MW, productivity in MW per m3/s. Fields named as in
    the case directory may be overridden per stage under these names.
    """

    id: int
    name: str
    bus: int
    downstream: int | None
    min_storage_hm3: float
    max_storage_hm3: float
    min_outflow_m3s: float
    max_outflow_m3s: float
    productivity: float
    min_turbined_m3s: float
    max_turbined_m3s: float
    min_generation_mw: float
    max_generation_mw: float
    diversion_target: int | None
    max_diversion_m3s: float
    costs: HydroCosts
    water_withdrawal_m3s: float = 0.0
    productivity_by_stage: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """A non-controllable source (wind, sun), active from stage id ``entry`` until ``exit``."""

    id: int
    name: str
    bus: int
    max_generation_mw: float
    curtailment_cost: float
    entry: float
    exit: float

    def is_active(self, stage_id: int) -> bool:
        """Tell whether the source exists at a stage."""
        return self.entry <= stage_id < self.exit


@dataclass(frozen=True, slots=True)
class Penalties:
    """The costs that hold where an entity has none of its own."""

    deficit: tuple[Segment, ...]
    excess_cost: float
    exchange_cost: float
    curtailment_cost: float
    hydro: HydroCosts


def parse_penalties(document: Record) -> Penalties:
    """Read and check ``penalties.json``."""
    bus, hydro = document.record("bus"), document.record("hydro")
    costs = {
        name: hydro.number(name, above=0.0)
        for name in HYDRO_COST_NAMES
        if name not in _OPTIONAL_COSTS
    }
    for name in _OPTIONAL_COSTS:
        if name in hydro:
            costs[name] = hydro.number(name, above=0.0)
    costs.setdefault("inflow_nonnegativity_cost", _DEFAULT_INFLOW_COST)
    for name in _UNUSED_COSTS:
        hydro.number(name, above=0.0)
    hydro.number("fpha_turbined_cost", minimum=0.0)
    return Penalties(
        deficit=_parse_segments(bus),
        excess_cost=bus.number("excess_cost", above=0.0),
        exchange_cost=document.record("line").number("exchange_cost", above=0.0),
        curtailment_cost=document.record("non_controllable_source").number(
            "curtailment_cost", above=0.0
        ),
        hydro=HydroCosts(**costs),
    )


def _parse_segments(record: Record) -> tuple[Segment, ...]:
    items = record.records("deficit_segments")
    if not items:
        record.report(SchemaViolation, "deficit_segments", "must hold at least one segment")
    segments = tuple(
        Segment(item.number("depth_mw", math.inf, above=0.0), item.number("cost", above=0.0))
        for item in items
    )
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if math.isinf(segment.depth_mw) != last:
            wanted = "null in the last segment" if last else "a number before the last segment"
            items[i].report(
                OutOfRange,
                "depth_mw",
                f"must be {wanted}",
                value=None if math.isinf(segment.depth_mw) else segment.depth_mw,
                expected=wanted,
            )
        if i and segment.cost < segments[i - 1].cost:
            items[i].report(
                OutOfRange,
                "cost",
                "must not fall from one segment to the next",
                value=segment.cost,
                expected=f"at least {segments[i - 1].cost:g}",
            )
    return segments


def _entities(
    document: Record, key: str, parse: Callable[[Record], _Entity]
) -> tuple[tuple[_Entity, ...], Positions]:
    records, positions = identified(document, key)
    return tuple(parse(record) for record in records), positions


def parse_buses(document: Record, penalties: Penalties) -> tuple[tuple[Bus, ...], Positions]:
    """Read and check ``system/buses.json``."""

    def parse(record: Record) -> Bus:
        own = "deficit_segments" in record
        return Bus(
            id=record.integer("id"),
            name=record.text("name", ""),
            deficit=_parse_segments(record) if own else penalties.deficit,
            excess_cost=penalties.excess_cost,
        )

    return _entities(document, "buses", parse)


def parse_lines(
    document: Record, penalties: Penalties, buses: Positions, warnings: list[str]
) -> tuple[tuple[Line, ...], Positions]:
    """Read and check ``system/lines.json``; losses are reported in ``warnings`` and dropped."""

    def parse(record: Record) -> Line:
        if record.number("losses_percent", 0.0, minimum=0.0, maximum=100.0) > 0:
            warnings.append(
                f"{record.file}: line {record.entity_id}: losses_percent is ignored, "
                "as the reference program does"
            )
        capacity = record.record("capacity")
        return Line(
            id=record.integer("id"),
            name=record.text("name", ""),
            source=record.reference("source_bus_id", buses, "bus"),
            target=record.reference("target_bus_id", buses, "bus"),
            direct_mw=capacity.number("direct_mw", minimum=0.0),
            reverse_mw=capacity.number("reverse_mw", minimum=0.0),
            exchange_cost=record.number("exchange_cost", penalties.exchange_cost, minimum=0.0),
        )

    return _entities(document, "lines", parse)


def parse_thermals(document: Record, buses: Positions) -> tuple[tuple[Thermal, ...], Positions]:
    """Read and check ``system/thermals.json``."""

    def parse(record: Record) -> Thermal:
        if "gnl_config" in record:
            record.refuse("gnl_config", "anticipated dispatch of a thermal plant")
        generation = record.record("generation")
        low = generation.number("min_mw", minimum=0.0)
        return Thermal(
            id=record.integer("id"),
            name=record.text("name", ""),
            bus=record.reference("bus_id", buses, "bus"),
            min_mw=low,
            max_mw=generation.number("max_mw", minimum=low),
            cost_per_mwh=record.number("cost_per_mwh", minimum=0.0),
        )

    return _entities(document, "thermals", parse)


def parse_sources(
    document: Record, penalties: Penalties, buses: Positions
) -> tuple[tuple[Source, ...], Positions]:
    """Read and check ``system/non_controllable_sources.json``."""

    def parse(record: Record) -> Source:
        return Source(
            id=record.integer("id"),
            name=record.text("name", ""),
            bus=record.reference("bus_id", buses, "bus"),
            max_generation_mw=record.number("max_generation_mw", minimum=0.0),
            curtailment_cost=record.number(
                "curtailment_cost", penalties.curtailment_cost, minimum=0.0
            ),
            entry=record.integer("entry_stage_id", -math.inf),
            exit=record.integer("exit_stage_id", math.inf),
        )

    return _entities(document, "non_controllable_sources", parse)
