"""Correlation between the noise components of a stage.

A group of entities with correlation matrix C gets the noise ``D @ eta``, where D is the
symmetric square root of C. Eigenvalues below zero, which a matrix estimated from data may have,
count as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.case_files import UNKNOWN_STAGE, CaseFiles
from cobre_shm.sddp.errors import DuplicateId, OutOfRange, SchemaViolation
from cobre_shm.sddp.fields import Positions, Record
from cobre_shm.sddp.stages import Horizon
from cobre_shm.sddp.symmetric_root import symmetric_root

Floats = npt.NDArray[np.float64]
Groups = tuple[tuple[tuple[int, ...], Floats], ...]

_FILE = "scenarios/correlation.json"
_ROUNDING = 1e-9
_ID_COLUMN = {"inflow": "hydro_id", "load": "bus_id", "ncs": "ncs_id"}


@dataclass(frozen=True)
class Correlation:
    """For each stage id the groups: noise components and the square root of their matrix."""

    by_stage: Mapping[int, Groups]

    def apply(self, stage_id: int, vector: Floats) -> Floats:
        """Return ``vector`` with the correlation of a stage; the argument stays as it is."""
        result = vector.copy()
        for members, root in self.by_stage[stage_id]:
            index = list(members)
            # Summed in member order rather than by BLAS, whose order depends on the machine.
            result[index] = np.add.accumulate(root * vector[index], axis=1)[:, -1]
        return result


def parse_correlation(
    files: CaseFiles,
    horizon: Horizon,
    parts: Mapping[str, tuple[int, ...]],
    positions: Mapping[str, Positions],
) -> Correlation | None:
    """Read and check ``scenarios/correlation.json``.

    Args:
        files: The files of the case.
        horizon: The stages.
        parts: For each class of entity the positions that have a noise component, in order.
        positions: Position by id, for each key column.
    """
    if _FILE not in files:
        return None
    document = files.record(_FILE)
    document.choice("method", ("spectral", "cholesky"), "spectral")
    offsets, offset = {}, 0
    for name, members in parts.items():
        offsets[name] = {position: offset + i for i, position in enumerate(members)}
        offset += len(members)
    parts_of = document.record("profiles")
    profiles = {
        name: _parse_groups(parts_of.record(name), offsets, positions) for name in parts_of.data
    }
    some = next(iter(profiles), "")
    scheduled = {
        entry.integer("stage_id"): entry.choice("profile_name", tuple(profiles)) or some
        for entry in document.records("schedule", [])
    }
    files.skip(_FILE, UNKNOWN_STAGE, len(set(scheduled) - set(horizon.positions)))
    default = "default" if "default" in profiles else some
    if default != "default" and len(profiles) != 1:
        default = ""
    by_stage: dict[int, Groups] = {}
    for stage in horizon.stages:
        name = scheduled.get(stage.id, default)
        if name not in profiles:
            parts_of.report(
                SchemaViolation,
                name,
                f"no profile for stage {stage.id}",
                value=name,
                expected="one of " + ", ".join(profiles),
            )
            break
        by_stage[stage.id] = profiles[name]
    return Correlation(by_stage)


def _parse_groups(
    profile: Record,
    offsets: Mapping[str, Mapping[int, int]],
    positions: Mapping[str, Positions],
) -> Groups:
    groups = []
    seen: set[tuple[str, int]] = set()
    for group in profile.records("correlation_groups"):
        before = len(group.findings)
        entities = group.records("entities")
        kinds = [entity.choice("type", tuple(_ID_COLUMN)) for entity in entities]
        if len(set(kinds)) > 1:
            group.refuse("entities", "a correlation group with entities of several types")
        found = [
            entity.reference("id", positions[_ID_COLUMN[kind]], f"entity of type {kind}")
            for entity, kind in zip(entities, kinds, strict=True)
            if kind in _ID_COLUMN
        ]
        matrix = _parse_matrix(group, len(entities))
        if len(group.findings) > before:
            continue
        for entity, member in zip(entities, zip(kinds, found, strict=True), strict=True):
            if member in seen:
                entity.report(
                    DuplicateId,
                    "id",
                    "the entity occurs twice in a profile",
                    value=entity.data["id"],
                    expected="one place per entity and profile",
                )
            # Minus one stands for an entity that does not exist.
            if member[1] >= 0:
                seen.add(member)
        # A load without spread has no noise component to correlate.
        kept = [i for i, at in enumerate(found) if at in offsets[kinds[i]]]
        if kept:
            members = tuple(offsets[kinds[i]][found[i]] for i in kept)
            groups.append((members, symmetric_root(matrix[np.ix_(kept, kept)])))
    return tuple(groups)


def _parse_matrix(group: Record, size: int) -> Floats:
    """Return a group's matrix; zeros with a finding where it is no correlation matrix."""
    before = len(group.findings)
    matrix = np.zeros((size, size))
    lines = group.items("matrix")
    cells = Record(
        {f"matrix[{i}]": line for i, line in enumerate(lines)},
        group.file,
        group.findings,
        group.path,
    )
    values = [cells.numbers(name) for name in cells.data]
    if len(group.findings) > before:
        return matrix
    if len(values) != size or any(len(line) != size for line in values):
        group.report(
            SchemaViolation,
            "matrix",
            f"must have {size} rows of {size} numbers",
            expected=f"{size} by {size}",
        )
        return matrix
    matrix[:] = values
    if (np.abs(matrix) > 1 + _ROUNDING).any():
        group.report(
            OutOfRange,
            "matrix",
            "must hold no correlation above 1 in size",
            value=float(np.abs(matrix).max()),
            expected="at most 1 in size",
        )
    elif (
        not np.allclose(matrix, matrix.T, atol=_ROUNDING)
        or (np.abs(np.diag(matrix) - 1) > _ROUNDING).any()
    ):
        group.report(
            OutOfRange,
            "matrix",
            "must be symmetric with ones on the diagonal",
            expected="a correlation matrix",
        )
    return matrix
