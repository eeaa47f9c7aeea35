"""What a training finds in one process, and what it writes, to compare others with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet

from cobre_shm.communicator import Communicator
from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import Case, load_case, series_digest, train
from cobre_shm.sddp.checkpoint import FILE_NAME
from cobre_shm.sddp.training_result import TrainingDetails


@cache
def digest_alone(path: Path, iterations: int) -> str:
    """Return the digest of a training in one process."""
    return series_digest(train(load_case(path), LocalCommunicator(), iterations=iterations))


def values(folder: Path) -> dict[tuple[str, str], bytes]:
    """Return the bytes of what a training wrote, without its clocks."""
    clocks = ("time_forward_ms", "time_backward_ms", "time_total_ms")
    found = {}
    for name in ("training/convergence", "policy/cuts"):
        table = pyarrow.parquet.read_table(folder / f"{name}.parquet")
        for column in table.column_names:
            if column not in clocks:
                found[name, column] = table[column].combine_chunks().buffers()[1].to_pybytes()
    return found


def checkpoint_of(out: Path) -> Path:
    """Return the checkpoint file of an output directory."""
    return out / "policy" / FILE_NAME


def train_until(
    path: Path | Case, out: Path, iterations: int, comm: Communicator | None = None, **options: Any
) -> TrainingDetails:
    """Train so many iterations, which leaves a checkpoint."""
    options = {"checkpoint_every": 100, **options}
    comm = comm or LocalCommunicator()
    return train(path, comm, iterations=iterations, output_dir=out, **options)
