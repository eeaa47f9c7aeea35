"""A training between two iterations as one file, so that it can go on later.

Layout of the file: a magic word, the SHA-256 of what follows, and an archive of numpy arrays
without pickled objects. A file that was cut off, or that belongs to another case or another
version of the solver, is told by its content and refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.case import Case
from cobre_shm.sddp.errors import CheckpointError
from cobre_shm.sddp.results import write_atomically
from cobre_shm.sddp.training_result import Iteration

Floats = npt.NDArray[np.float64]
Statuses = npt.NDArray[np.int8]

FILE_NAME = "training.checkpoint"

_MAGIC = b"cobre-shm checkpoint 2\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """A training after an iteration; equal for every number of ranks, times excepted.

    Attributes:
        history: Every iteration so far.
        retries: Problems so far that HiGHS needed more than one attempt for.
        given: For each stage the cuts that the training began with, float64
            (cuts, 1 + state components): intercept and coefficients in scaled $.
        cuts: The same for the cuts that the training made, in order.
        bases: int8 (trajectories, statuses): the basis of each trajectory's chain at each
            stage, one stage after the other, columns before rows.
        bound_bases: int8 (chains, statuses): the basis of each chain of the lower bound.
        timing: float64, (ranks, iterations, columns): what each rank spent.
    """

    history: tuple[Iteration, ...]
    retries: int
    given: tuple[Floats, ...]
    cuts: tuple[Floats, ...]
    bases: Statuses
    bound_bases: Statuses
    timing: Floats


def encode(checkpoint: Checkpoint, case_digest: str) -> bytes:
    """Return the content of a checkpoint file."""
    header = {
        **_identity(case_digest),
        "history": [asdict(item) for item in checkpoint.history],
        "retries": checkpoint.retries,
    }
    arrays: dict[str, Any] = {
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        "bases": checkpoint.bases,
        "bound_bases": checkpoint.bound_bases,
        "timing": checkpoint.timing,
    }
    for name in ("given", "cuts"):
        stages: Sequence[Floats] = getattr(checkpoint, name)
        arrays |= {f"{name}_{t}": values for t, values in enumerate(stages)}
    archive = io.BytesIO()
    # Without allow_pickle, which numpy before 2.1 would store as an array of that name.
    np.savez(archive, **arrays)
    content = archive.getvalue()
    return _MAGIC + hashlib.sha256(content).digest() + content


def decode(data: bytes, case_digest: str, stages: int, path: str | Path) -> Checkpoint:
    """Return the checkpoint that :func:`encode` made.

    Args:
        data: The content of the file.
        case_digest: Digest of the case that goes on.
        stages: Number of stages of that case.
        path: Where the content is from, for messages.

    Raises:
        CheckpointError: The content is damaged or does not belong to the case.
    """
    start = len(_MAGIC) + _DIGEST_BYTES
    content = data[start:]
    if not data.startswith(_MAGIC):
        raise refusal(path, "it is no checkpoint of this version of cobre-shm")
    if hashlib.sha256(content).digest() != data[len(_MAGIC) : start]:
        raise refusal(path, "its content is damaged or incomplete")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            _check_identity(header, case_digest, path)
            return Checkpoint(
                history=tuple(Iteration(**item) for item in header["history"]),
                retries=header["retries"],
                given=tuple(arrays[f"given_{t}"] for t in range(stages)),
                cuts=tuple(arrays[f"cuts_{t}"] for t in range(stages)),
                bases=arrays["bases"],
                bound_bases=arrays["bound_bases"],
                timing=arrays["timing"],
            )
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        # The hash is right, so some other program wrote this.
        raise refusal(path, f"it cannot be read: {error}") from error


def read_checkpoint(path: Path, case: Case) -> bytes:
    """Return the content of a checkpoint file that fits a case, or nothing if there is none.

    Raises:
        CheckpointError: The file cannot be read, is damaged or belongs to something else.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise refusal(path, f"it cannot be read: {error.strerror or error}") from error
    decode(data, case.digest, case.stages, path)
    return data


def write_checkpoint(path: Path, data: bytes) -> None:
    """Replace a checkpoint file, so that a crash at any moment leaves the old or the new one.

    Raises:
        OutputError: The file cannot be written; the old one is as it was.
    """

    def write(file: Path) -> None:
        file.write_bytes(data)

    write_atomically(path, write)


def _identity(case_digest: str) -> dict[str, Any]:
    """What must agree for a training to go on with the same bits."""
    return {
        "case": case_digest,
        "highspy": metadata.version("highspy"),
        "iteration_fields": [item.name for item in fields(Iteration)],
    }


_DIFFERENCES = {
    "case": "it belongs to another case, or the case was changed since",
    "highspy": "it was made with highspy {theirs}, but highspy {ours} is installed",
    "iteration_fields": "it was made by another version of cobre-shm",
}


def _check_identity(header: dict[str, Any], case_digest: str, path: str | Path) -> None:
    for name, ours in _identity(case_digest).items():
        theirs = header.get(name)
        if theirs != ours:
            raise refusal(path, _DIFFERENCES[name].format(ours=ours, theirs=theirs))


def refusal(path: str | Path, reason: str) -> CheckpointError:
    """Return the error that a checkpoint file cannot be gone on with."""
    return CheckpointError(
        f"cannot resume from {str(path)!r}: {reason}",
        context={"checkpoint_path": str(path), "operation": "read", "detail": reason},
        suggestion="Remove the file to train from the start, or begin with the cuts of an "
        "earlier policy (warm start)",
    )
