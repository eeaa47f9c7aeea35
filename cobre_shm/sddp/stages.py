"""The stages of the study: their length, their blocks, what is drawn and how risk is measured."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cobre_shm.sddp.errors import OutOfRange, SchemaViolation
from cobre_shm.sddp.fields import Positions, Record, identified

_OTHER_SAMPLING = ("lhs", "qmc_sobol", "qmc_halton", "historical_residuals", "selective")

# In the place of a date that could not be read.
_NO_DATE = datetime.date(1, 1, 1)


@dataclass(frozen=True, slots=True)
class RiskMeasure:
    """CVaR of the worst share ``1 / (1 - weight + weight / tail)`` of the openings.

    That is the highest mean cost under weights that sum to 1 and of which none exceeds
    ``(1 - weight) / n + weight / (n * tail)`` for ``n`` openings; of CVaR as such a maximum:
    R. T. Rockafellar, S. Uryasev, "Conditional value-at-risk for general loss distributions",
    Journal of Banking & Finance 26, 2002. The reference program means
    ``(1 - weight) * expectation + weight * CVaR(tail)`` (A. Shapiro, "Analysis of stochastic dual
    dynamic programming method", European Journal of Operational Research 209, 2011), whose
    weights also have the lower limit ``(1 - weight) / n``; it leaves that out, and so do we. The
    two are equal for a weight of 0 or 1, and otherwise ours is at least as high.

    Attributes:
        tail: Share of the openings, above 0 and at most 1.
        weight: Of that tail against the expectation, 0 to 1.
    """

    tail: float
    weight: float


@dataclass(frozen=True, slots=True)
class Stage:
    """One study stage.

    Attributes:
        id: Id in the case directory.
        hours: Length of each load block, in hours.
        openings: Number of noise vectors of the stage.
        season_id: Season, or None.
        start: First day.
        risk: Risk measure over the openings of the next stage, or None for the expectation.
        discount: Factor between this stage's cost and the cost of the next stage.
    """

    id: int
    hours: tuple[float, ...]
    openings: int
    season_id: int | None
    start: datetime.date
    risk: RiskMeasure | None
    discount: float

    @property
    def last_block(self) -> int | None:
        """The largest block id; None where the blocks could not be read."""
        return len(self.hours) - 1 if self.hours else None


@dataclass(frozen=True, slots=True)
class Horizon:
    """All stages in order, with the position of each id.

    Attributes:
        stages: The study stages by id.
        positions: Position of each stage id.
        cycle: ``cycle_type`` of the season definitions, or None where there are none.
    """

    stages: tuple[Stage, ...]
    positions: Positions
    cycle: str | None


def parse_stages(document: Record) -> Horizon:
    """Read and check ``stages.json``."""
    graph = document.record("policy_graph")
    graph.choice("type", ("finite_horizon",), unsupported=("cyclic",))
    annual_rate = graph.number("annual_discount_rate", minimum=0.0)
    records, positions = identified(document, "stages")
    if not records and positions.complete:
        document.report(SchemaViolation, "stages", "must hold at least one stage")
    for record in records:
        record.integer("id", minimum=0)
    rates: dict[int, float] = {}
    for transition in graph.records("transitions", []):
        override = transition.number("annual_discount_rate_override", None, minimum=0.0)
        if override is not None:
            rates.setdefault(transition.reference("source_id", positions, "stage"), override)
    for record in document.records("pre_study_stages", []):
        record.integer("id", maximum=-1)
    seasons = document.record("season_definitions", required=False)
    return Horizon(
        stages=tuple(
            _parse_stage(record, rates.get(i, annual_rate)) for i, record in enumerate(records)
        ),
        positions=positions,
        cycle=seasons.text("cycle_type", "monthly") if seasons.data else None,
    )


def _parse_stage(record: Record, annual_rate: float) -> Stage:
    start, end = record.date("start_date"), record.date("end_date")
    if start is not None and end is not None and end <= start:
        record.report(
            OutOfRange,
            "end_date",
            f"must be after start_date ({start}), not {end}",
            value=str(end),
            expected=f"after {start}",
        )
    record.choice("sampling_method", ("saa",), "saa", unsupported=_OTHER_SAMPLING)
    record.choice("block_mode", ("parallel",), "parallel", unsupported=("chronological",))
    start, end = start or _NO_DATE, end or _NO_DATE
    days = (end - start).days
    return Stage(
        id=record.integer("id"),
        hours=_parse_blocks(record),
        openings=record.integer("num_scenarios", minimum=1, maximum=2**31 - 1),
        season_id=record.integer("season_id", None),
        start=start,
        risk=_parse_risk(record),
        discount=(1.0 + annual_rate) ** (-days / 365.25),
    )


def _parse_blocks(record: Record) -> tuple[float, ...]:
    """Return the hours of each block, or nothing where the blocks cannot be told apart."""
    before = len(record.findings)
    blocks = record.records("blocks")
    ids = [block.integer("id") for block in blocks]
    if len(record.findings) == before:
        if not blocks:
            record.report(SchemaViolation, "blocks", "must hold at least one block")
        for i, (block_id, block) in enumerate(sorted(zip(ids, blocks, strict=True), key=_first)):
            if block_id != i:
                block.report(
                    SchemaViolation,
                    "id",
                    f"block ids must be 0 to {len(blocks) - 1} without gaps",
                    value=block_id,
                    expected=str(i),
                )
                break
    readable = len(record.findings) == before
    hours = {i: block.number("hours", above=0.0) for i, block in zip(ids, blocks, strict=True)}
    return tuple(hours[i] for i in sorted(hours)) if readable else ()


def _first(pair: tuple[int, Record]) -> int:
    return pair[0]


def _parse_risk(record: Record) -> RiskMeasure | None:
    value = record.data.get("risk_measure", "expectation")
    if value == "expectation" or value is None:
        return None
    if not isinstance(value, dict) or "cvar" not in value:
        record.report(
            SchemaViolation,
            "risk_measure",
            "must be 'expectation' or an object 'cvar'",
            value=value,
            expected="'expectation' or {'cvar': {...}}",
        )
        return None
    cvar = record.record("risk_measure").record("cvar")
    return RiskMeasure(
        tail=cvar.number("alpha", above=0.0, maximum=1.0),
        weight=cvar.number("lambda", minimum=0.0, maximum=1.0),
    )
