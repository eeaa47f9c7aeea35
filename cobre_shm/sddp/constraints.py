"""Generic constraints: linear conditions on the quantities of a stage, written as text.

An expression is a sum of terms such as ``2.5 * hydro_turbined(3)`` or ``- line_direct(0, 1)``,
where the first number in parentheses is the id of the entity and the optional second one the
load block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cobre_shm.sddp.case_files import UNKNOWN, CaseFiles
from cobre_shm.sddp.errors import MissingReference, OutOfRange, SchemaViolation, Unsupported
from cobre_shm.sddp.fields import Positions, Record, identified
from cobre_shm.sddp.stages import Horizon, Stage

CONSTRAINTS = "constraints/generic_constraints.json"
BOUNDS = "constraints/generic_constraint_bounds.parquet"

# The entity that each quantity belongs to.
QUANTITIES = {
    "thermal_generation": "thermal_id",
    "hydro_generation": "hydro_id",
    "hydro_turbined": "hydro_id",
    "hydro_spillage": "hydro_id",
    "hydro_outflow": "hydro_id",
    "hydro_storage": "hydro_id",
    "line_direct": "line_id",
    "line_reverse": "line_id",
    "line_exchange": "line_id",
    "bus_deficit": "bus_id",
    "bus_excess": "bus_id",
}
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_TERM = re.compile(
    rf"\s*(?P<sign>[-+])?\s*(?:(?P<factor>{_NUMBER})\s*\*\s*)?"
    r"(?P<name>[a-z_]+)\s*\(\s*(?P<entity>\d{1,18})\s*(?:,\s*(?P<block>\d{1,18})\s*)?\)\s*"
)


@dataclass(frozen=True, slots=True)
class Term:
    """``factor`` times a quantity of the entity at a position, in one block or each one."""

    factor: float
    quantity: str
    entity: int
    block: int | None


@dataclass(frozen=True, slots=True)
class GenericConstraint:
    """A condition on a stage.

    Attributes:
        terms: The left-hand side.
        sense: ``<=``, ``>=`` or ``==``.
        penalty: Cost of a violation in $ per unit and hour, or None where it must hold.
        bounds: By stage position, (block or None for every block, right-hand side).
    """

    terms: tuple[Term, ...]
    sense: str
    penalty: float | None
    bounds: Mapping[int, tuple[tuple[int | None, float], ...]]

    def limits(self, bound: float) -> tuple[float, float]:
        """Return lower and upper limit of the left-hand side."""
        return (
            -math.inf if self.sense == "<=" else bound,
            math.inf if self.sense == ">=" else bound,
        )


def parse_constraints(
    files: CaseFiles, horizon: Horizon, positions: Mapping[str, Positions]
) -> tuple[GenericConstraint, ...]:
    """Read and check the generic constraints.

    Bounds of an unknown constraint or stage have no effect.
    """
    records: list[Record] = []
    ids = Positions(())
    if CONSTRAINTS in files:
        records, ids = identified(files.record(CONSTRAINTS), "constraints")
    bounds: dict[int, dict[int, list[tuple[int | None, float]]]] = {}
    for row in files.rows(BOUNDS, ("constraint_id", "stage_id", "bound")):
        constraint = ids.get(row.integer("constraint_id"))
        t = horizon.positions.get(row.integer("stage_id"))
        if constraint is None or t is None:
            files.skip(BOUNDS, UNKNOWN)
            continue
        last = horizon.stages[t].last_block
        block = row.integer("block_id", minimum=0, maximum=last) if "block_id" in row else None
        by_stage = bounds.setdefault(constraint, {})
        by_stage.setdefault(t, []).append((block, row.number("bound")))
    return tuple(
        _parse_constraint(record, bounds.get(i, {}), horizon, positions)
        for i, record in enumerate(records)
    )


def _parse_constraint(
    record: Record,
    bounds: Mapping[int, list[tuple[int | None, float]]],
    horizon: Horizon,
    positions: Mapping[str, Positions],
) -> GenericConstraint:
    slack = record.record("slack", required=False)
    terms = _parse_expression(record, positions)
    _check_blocks(record, terms, [horizon.stages[t] for t in sorted(bounds)])
    return GenericConstraint(
        terms=terms,
        sense=record.choice("sense", ("<=", ">=", "==")),
        penalty=slack.number("penalty", above=0.0) if slack.boolean("enabled", False) else None,
        bounds={t: tuple(items) for t, items in bounds.items()},
    )


def _check_blocks(record: Record, terms: tuple[Term, ...], stages: list[Stage]) -> None:
    """Report a block that a stage lacks to which the constraint applies."""
    block = max((term.block for term in terms if term.block is not None), default=0)
    for stage in stages:
        if stage.last_block is not None and block > stage.last_block:
            record.report(
                OutOfRange,
                "expression",
                f"there is no block {block} at stage {stage.id}",
                value=record.data["expression"],
                expected=f"blocks of at most {stage.last_block}",
            )
            break


def _parse_expression(record: Record, positions: Mapping[str, Positions]) -> tuple[Term, ...]:
    text = record.text("expression")
    if not isinstance(record.data.get("expression"), str):
        return ()
    terms: list[Term] = []
    place = 0
    while place < len(text) or not terms:
        match = _TERM.match(text, place)
        if match is None or (terms and match["sign"] is None):
            record.report(
                SchemaViolation,
                "expression",
                f"not readable at {text[place : place + 20]!r}",
                value=text,
                expected="terms like 2.5 * hydro_turbined(3)",
            )
            break
        terms.append(_parse_term(record, text, match, positions))
        place = match.end()
    return tuple(terms)


def _parse_term(
    record: Record, text: str, match: re.Match[str], positions: Mapping[str, Positions]
) -> Term:
    name, entity = match["name"], int(match["entity"])
    factor = float(match["factor"] or 1.0)
    if not math.isfinite(factor):
        record.report(
            OutOfRange,
            "expression",
            f"the factor {match['factor']} is too large",
            value=text,
            expected="a finite number",
        )
    position = -1
    if name not in QUANTITIES:
        record.report(
            Unsupported,
            "expression",
            f"the quantity {name!r} is not supported",
            value=text,
            expected="one of " + ", ".join(QUANTITIES),
        )
    else:
        column = QUANTITIES[name]
        position = positions[column].get(entity, -1)
        if position < 0 and positions[column].complete:
            what = column.removesuffix("_id")
            record.report(
                MissingReference,
                "expression",
                f"{name}: there is no {what} with id {entity}",
                value=text,
                expected=f"the id of a {what}",
            )
    return Term(
        factor=-factor if match["sign"] == "-" else factor,
        quantity=name,
        entity=position,
        block=None if match["block"] is None else int(match["block"]),
    )
