"""One training, begun on one backend and finished on another, has the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

BACKENDS = ("shm", "tcp")
SERIES = ("iteration", "lower_bound", "upper_bound_mean", "upper_bound_std", "gap_percent")


def run(path, out, iterations, ranks=1, backend="local"):
    launcher = ["-m", "cobre_shm.spawn", "-n", str(ranks), "--backend", backend] * (ranks > 1)
    done = subprocess.run(
        [
            *(sys.executable, *launcher, "-m", "cobre_shm.sddp", str(path)),
            *("--output-dir", str(out), "--iterations", str(iterations)),
            *("--checkpoint-every", "2", "--resume", "--quiet"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COBRE_COMM_BACKEND": backend},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def content(out):
    table = pq.read_table(out / "training" / "convergence.parquet")
    return (out / "policy" / "cuts.parquet").read_bytes(), [table[name] for name in SERIES]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_equal_over_backends_ranks_and_pauses(random_path, tmp_path, backend):
    """Two trajectories, CVaR, random load and wind; three ranks leave one without work."""
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    run(random_path, alone, 5)
    run(random_path, mixed, 2, ranks=3, backend=backend)
    run(random_path, mixed, 3)
    run(random_path, mixed, 5, ranks=2, backend=backend)
    assert content(mixed) == content(alone)
