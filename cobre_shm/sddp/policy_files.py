"""Reading the files of a policy, ``cuts.parquet`` and ``state.json``, which results.py writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.cuts import StageCuts
from cobre_shm.sddp.errors import MissingFile, ParseError, SchemaViolation
from cobre_shm.sddp.results import read_table

# Kind (``storage`` or ``inflow_lag``), hydro id, lag, unit.
Component = tuple[str, int, int, str]


@dataclass(frozen=True)
class StoredPolicy:
    """A policy as it was written.

    Attributes:
        stages: Ids of the stages, in order.
        components: Of the state, in the order of a cut's coefficients.
        cuts: Cuts of each stage.
    """

    stages: tuple[int, ...]
    components: tuple[Component, ...]
    cuts: tuple[StageCuts, ...]


def read_policy(directory: str | Path) -> StoredPolicy:
    """Read the folder ``policy`` of a training's output.

    Raises:
        MissingFile: A file is not there.
        ParseError: A file cannot be read.
        SchemaViolation: The two files do not belong together.
        MissingDependency: pyarrow is not installed.
    """
    root = Path(directory)
    described = _read_state(root / "state.json")
    columns = read_table(root / "cuts.parquet")
    try:
        components = tuple(
            (str(item["kind"]), int(item["hydro_id"]), int(item["lag"]), str(item["unit"]))
            for item in described["components"]
        )
        stages = tuple(int(stage) for stage in described["stage_ids"])
        names = [item["column"] for item in described["components"]]
        return StoredPolicy(stages, components, _cuts_by_stage(columns, stages, names))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise SchemaViolation(
            f"{root}: not a policy: {reason}",
            context={"file": str(root), "expected": "cuts.parquet and state.json"},
        ) from error


def _cuts_by_stage(
    columns: dict[str, npt.NDArray[Any]], stages: tuple[int, ...], names: list[str]
) -> tuple[StageCuts, ...]:
    of_stage, intercept = columns["stage_id"], columns["intercept"].astype(np.float64)
    foreign = set(of_stage.tolist()) - set(stages)
    if foreign:
        raise ValueError(f"there are cuts of stage {min(foreign)}, which it has not")
    unnamed = {name for name in columns if name.startswith("coef_")} - set(names)
    if unnamed:
        raise ValueError(f"cuts.parquet has {min(unnamed)}, of which state.json knows nothing")
    coefficients = np.empty((len(intercept), len(names)))
    for j, name in enumerate(names):
        coefficients[:, j] = columns[name]
    if not (np.isfinite(intercept).all() and np.isfinite(coefficients).all()):
        raise ValueError("a cut holds something that is no number")
    return tuple(
        StageCuts(
            intercept=intercept[rows],
            coefficients=coefficients[rows],
            iteration=columns["iteration"][rows].astype(np.int64),
            scenario=columns["scenario"][rows].astype(np.int64),
        )
        for rows in (np.flatnonzero(of_stage == stage) for stage in stages)
    )


def _read_state(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(
            f"{path}: there is no such file",
            context={"file": str(path)},
            suggestion="Give the folder 'policy' of a training's output directory",
        ) from error
    except (OSError, ValueError) as error:
        raise ParseError(f"{path}: not readable: {error}", context={"file": str(path)}) from error
