"""Beginning a training with the cuts of an earlier policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case import Case
from cobre_shm.sddp.errors import CheckpointError, require
from cobre_shm.sddp.sharing import on_rank_zero

Floats = npt.NDArray[np.float64]


def share_policy(directory: str | Path, case: Case, comm: Communicator) -> tuple[Floats, ...]:
    """Read a policy on rank 0 and give it to every rank. Collective.

    Args:
        directory: The ``policy`` directory of a training; only rank 0 needs to see it.
        case: The case to train, equal on every rank.
        comm: The communicator.

    Returns:
        For each stage float64 (cuts, 1 + state components): intercept in $ and coefficients in
        $ per unit of the component.

    Raises:
        CheckpointError: The policy is absent, damaged or of another system; on every rank.
        MissingDependency: pyarrow is not installed; on every rank.
    """
    width = 1 + case.state_size

    def read() -> bytes:
        cuts = _read_policy(Path(directory), case)
        counts = np.array([len(values) for values in cuts], dtype=np.float64)
        return np.concatenate([counts, *(values.reshape(-1) for values in cuts)]).tobytes()

    data = np.frombuffer(on_rank_zero(read, comm), dtype=np.float64)
    counts = data[: case.stages].astype(np.int64)
    values = data[case.stages :].reshape(-1, width)
    return tuple(np.split(values, np.cumsum(counts)[:-1]))


def _read_policy(directory: Path, case: Case) -> list[Floats]:
    state = _read_state(directory / "state.json")
    ours = [
        {"column": f"coef_{j}", "kind": kind, "hydro_id": hydro, "lag": lag, "unit": unit}
        for j, (kind, hydro, lag, unit) in enumerate(case.state_names())
    ]
    if state.get("components") != ours:
        raise _refusal(directory, "its state is not that of the case: other plants or lags")
    path = directory / "cuts.parquet"
    columns = _read_table(path)
    names = ["intercept", *(f"coef_{j}" for j in range(len(ours)))]
    missing = [name for name in ("stage_id", *names) if name not in columns]
    if missing:
        raise _refusal(path, f"it has no column {missing[0]!r}")
    stage_ids = np.asarray(columns["stage_id"], dtype=np.int64)
    values = np.column_stack([np.asarray(columns[name], dtype=np.float64) for name in names])
    if not np.isfinite(values).all():
        raise _refusal(path, "a cut holds something that is no number")
    known = [stage.id for stage in case.horizon.stages[:-1]]
    foreign = sorted(set(stage_ids.tolist()) - set(known))
    if foreign:
        raise _refusal(path, f"it has cuts of stage {foreign[0]}, which the case has not")
    last = values[:0]
    return [*(values[stage_ids == stage] for stage in known), last]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refusal(path, f"it cannot be read: {error}") from error
    return state if isinstance(state, dict) else {}


def _read_table(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise require("pyarrow") from error
    try:
        with path.open("rb") as file:
            table = parquet.ParquetFile(file, pre_buffer=False).read(use_threads=False)
            columns: dict[str, list[Any]] = table.to_pydict()
            return columns
    except (OSError, ValueError) as error:
        raise _refusal(path, f"it cannot be read: {str(error).splitlines()[0]}") from error


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot begin with the policy in {str(path)!r}: {reason}",
        context={"checkpoint_path": str(path), "operation": "read", "detail": reason},
        suggestion="Name the policy directory of a training of the same plants and stages",
    )
