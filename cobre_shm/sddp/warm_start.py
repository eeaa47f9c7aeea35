"""Beginning a training with the cuts of an earlier policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case import Case
from cobre_shm.sddp.errors import CaseError, CheckpointError
from cobre_shm.sddp.policy_files import read_policy
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
        cuts = _read_cuts(Path(directory), case)
        counts = np.array([len(values) for values in cuts], dtype=np.float64)
        return np.concatenate([counts, *(values.reshape(-1) for values in cuts)]).tobytes()

    data = np.frombuffer(on_rank_zero(read, comm), dtype=np.float64)
    counts = data[: case.stages].astype(np.int64)
    values = data[case.stages :].reshape(-1, width)
    return tuple(np.split(values, np.cumsum(counts)[:-1]))


def _read_cuts(directory: Path, case: Case) -> list[Floats]:
    try:
        policy = read_policy(directory)
    except CaseError as error:
        raise _refusal(directory, error.message) from error
    if list(policy.components) != case.state_names():
        raise _refusal(directory, "its state is not that of the case: other plants or lags")
    # After the last stage there is nothing to be worth anything.
    known = [stage.id for stage in case.horizon.stages[:-1]]
    cuts = {
        stage: np.column_stack([found.intercept, found.coefficients])
        for stage, found in zip(policy.stages, policy.cuts, strict=True)
        if len(found)
    }
    foreign = sorted(set(cuts) - set(known))
    if foreign:
        raise _refusal(directory, f"it has cuts of stage {foreign[0]}, which the case has not")
    none = np.zeros((0, 1 + case.state_size))
    return [*(cuts.get(stage, none) for stage in known), none]


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot begin with the policy in {str(path)!r}: {reason}",
        context={"checkpoint_path": str(path), "operation": "read", "detail": reason},
        suggestion="Name the policy directory of a training of the same plants and stages",
    )
