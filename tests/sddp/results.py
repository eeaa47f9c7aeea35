"""What a training finds in one process, and what it writes, to compare others with."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pyarrow.parquet

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import load_case, series_digest, train


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
