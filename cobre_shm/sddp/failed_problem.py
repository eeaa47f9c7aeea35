"""A stage problem without solution as a file that people and other solvers can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cobre_shm.sddp.case import Case
from cobre_shm.sddp.errors import OutputError
from cobre_shm.sddp.layout import StageLp
from cobre_shm.sddp.results import write_atomically


@dataclass(frozen=True)
class ProblemWriter:
    """Writes problems of a case into a directory.

    Attributes:
        case: The case; its ids name columns and rows.
        directory: Where the files go; made when the first one is written.
    """

    case: Case
    directory: Path

    def write(self, solver: Any, lp: StageLp, name: str) -> Path | None:
        """Write the problem that stands in a HiGHS object, in the LP format of CPLEX.

        Args:
            solver: The HiGHS object, with state and noise of the failed attempt.
            lp: The problem without cuts.
            name: Name of the file without suffix.

        Returns:
            The file, or None if it could not be written: the failure itself matters more.
        """
        for column, text in _columns(self.case, lp):
            solver.passColName(column, text)
        for row, text in _rows(self.case, lp):
            solver.passRowName(row, text)
        base = len(lp.row_lower)
        for i in range(solver.getNumRow() - base):
            solver.passRowName(base + i, f"cut_{i}")
        path = self.directory / f"{name}.lp"
        with suppress(OutputError):
            write_atomically(path, lambda partial: _write(solver, partial))
            return path
        return None


def _write(solver: Any, partial: Path) -> None:
    # It knows the format by the name.
    named = partial.with_name(f"{partial.name}.lp")
    try:
        solver.writeModel(str(named))
        named.rename(partial)
    finally:
        named.unlink(missing_ok=True)


def _ids(entities: Sequence[Any]) -> list[int]:
    return [entity.id for entity in entities]


def _columns(case: Case, lp: StageLp) -> Iterator[tuple[int, str]]:
    at, hydros, buses = lp.layout, _ids(case.hydros), _ids(case.buses)
    yield at.theta, "future_cost"
    for name in ("storage", "start_storage", "noise_inflow", "inflow_slack"):
        for hydro, column in zip(hydros, getattr(at, name), strict=False):
            yield column, f"{name}_h{hydro}"
    for i, column in enumerate(at.lags):
        yield column, f"lag{i // len(hydros) + 1}_h{hydros[i % len(hydros)]}"
        yield at.inflow[i % len(hydros)], f"inflow_h{hydros[i % len(hydros)]}"
    for h, slacks in zip(hydros, at.withdrawal_slack, strict=True):
        for sign, column in zip(("short", "over"), slacks or (), strict=False):
            yield column, f"withdrawal_{sign}_h{h}"
    blocks: tuple[tuple[str, list[int], Sequence[Sequence[int] | None]], ...] = (
        ("turbined_h", hydros, at.turbined),
        ("spilled_h", hydros, at.spilled),
        ("diverted_h", hydros, at.diverted),
        ("thermal_t", _ids(case.thermals), at.thermal),
        ("direct_l", _ids(case.lines), at.direct),
        ("reverse_l", _ids(case.lines), at.reverse),
        ("source_n", _ids(case.sources), at.source),
        ("excess_b", buses, at.excess),
        ("load_b", [buses[b] for b in at.random_load], list(at.random_load.values())),
    )
    for name, ids, table in blocks:
        for entity_id, columns in zip(ids, table, strict=True):
            for k, column in enumerate(columns or ()):
                yield column, f"{name}{entity_id}_k{k}"
    for bus, segments in zip(buses, at.deficit, strict=True):
        for i, columns in enumerate(segments):
            for k, column in enumerate(columns):
                yield column, f"deficit{i}_b{bus}_k{k}"


def _rows(case: Case, lp: StageLp) -> Iterator[tuple[int, str]]:
    for hydro, row in zip(_ids(case.hydros), lp.layout.water_rows, strict=True):
        yield row, f"water_h{hydro}"
    for bus, rows in zip(_ids(case.buses), lp.layout.load_rows, strict=True):
        for k, row in enumerate(rows):
            yield row, f"load_b{bus}_k{k}"
