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

from cobre_shm.sddp.documents import Documents
from cobre_shm.sddp.errors import OutOfRange, SchemaViolation
from cobre_shm.sddp.fields import Record
from cobre_shm.sddp.stages import Horizon

Floats = npt.NDArray[np.float64]
Groups = tuple[tuple[tuple[int, ...], Floats], ...]

_FILE = "scenarios/correlation.json"
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
    documents: Documents,
    horizon: Horizon,
    parts: Mapping[str, tuple[int, ...]],
    positions: Mapping[str, Mapping[int, int]],
) -> Correlation | None:
    """Read and check ``scenarios/correlation.json``.

    Args:
        documents: The files of the case.
        horizon: The stages.
        parts: For each class of entity the positions that have a noise component, in order.
        positions: Position by id, for each key column.

    Raises:
        CaseError: A matrix has the wrong shape, or a name is unknown.
    """
    if _FILE not in documents:
        return None
    document = Record(documents[_FILE], _FILE)
    document.choice("method", ("spectral", "cholesky"), "spectral")
    offsets, offset = {}, 0
    for name, members in parts.items():
        offsets[name] = {position: offset + i for i, position in enumerate(members)}
        offset += len(members)
    profiles = {
        name: _parse_groups(document.record("profiles").record(name), offsets, positions)
        for name in document.record("profiles").data
    }
    scheduled = {
        entry.integer("stage_id"): entry.text("profile_name")
        for entry in document.records("schedule", [])
    }
    default = "default" if "default" in profiles else next(iter(profiles), "")
    if default != "default" and len(profiles) != 1:
        default = ""
    by_stage: dict[int, Groups] = {}
    for stage in horizon.stages:
        name = scheduled.get(stage.id, default)
        if name not in profiles:
            raise document.error(
                SchemaViolation,
                "profiles",
                f"no profile for stage {stage.id}",
                value=name,
                expected="one of " + ", ".join(profiles),
            )
        by_stage[stage.id] = profiles[name]
    return Correlation(by_stage)


def _parse_groups(
    profile: Record,
    offsets: Mapping[str, Mapping[int, int]],
    positions: Mapping[str, Mapping[int, int]],
) -> Groups:
    groups = []
    for group in profile.records("correlation_groups"):
        entities = group.records("entities")
        kinds = {entity.choice("type", tuple(_ID_COLUMN)) for entity in entities}
        if len(kinds) > 1:
            group.refuse("entities", "a correlation group with entities of several types")
        matrix = _parse_matrix(group, len(entities))
        kept, members = [], []
        for i, entity in enumerate(entities):
            kind = entity.text("type")
            column = _ID_COLUMN[kind]
            position = entity.reference("id", positions[column], f"entity of type {kind}")
            # A load without spread has no noise component to correlate.
            if position in offsets[kind]:
                kept.append(i)
                members.append(offsets[kind][position])
        if members:
            groups.append((tuple(members), _square_root(matrix[np.ix_(kept, kept)])))
    return tuple(groups)


def _parse_matrix(group: Record, size: int) -> Floats:
    lines = group.items("matrix")
    cells = Record({f"matrix[{i}]": line for i, line in enumerate(lines)}, group.file, group.path)
    values = [cells.numbers(name) for name in cells.data]
    if len(values) != size or any(len(line) != size for line in values):
        raise group.error(
            SchemaViolation,
            "matrix",
            f"must have {size} rows of {size} numbers",
            expected=f"{size} by {size}",
        )
    matrix = np.array(values, dtype=np.float64).reshape(size, size)
    if not np.allclose(matrix, matrix.T, atol=1e-9) or np.abs(np.diag(matrix) - 1).max() > 1e-9:
        raise group.error(
            OutOfRange,
            "matrix",
            "must be symmetric with ones on the diagonal",
            expected="a correlation matrix",
        )
    return matrix


def _square_root(matrix: Floats) -> Floats:
    values, vectors = np.linalg.eigh(matrix)
    root: Floats = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
