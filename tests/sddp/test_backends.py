"""One training, begun on one backend and finished on another, has the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

BACKENDS = ("shm", "tcp")
SERIES = ("iteration", "lower_bound", "upper_bound_mean", "upper_bound_std", "gap_percent")


def run(path, out, iterations, ranks=1, backend="local"):
    launcher = ["-m", "cobre_shm.spawn", "-n", str(ranks), "--backend", backend]
    done = subprocess.run(
        [
            *(sys.executable, *(launcher if ranks > 1 else []), "-m", "cobre_shm.sddp", str(path)),
            *("--output-dir", str(out), "--iterations", str(iterations)),
            *("--checkpoint-every", "2", "--resume", "--output-format", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COBRE_COMM_BACKEND": backend},
    )
    # The first run in a new environment compiles, and says so.
    said = [line for line in done.stderr.splitlines() if "Compiling the kernels" not in line]
    assert (done.returncode, said) == (0, [])
    *events, answer = map(json.loads, done.stdout.splitlines())
    assert (answer["summary"]["backend"], answer["summary"]["ranks"]) == (backend, ranks)
    return [event["iteration"] for event in events]


def content(out):
    table = pq.read_table(out / "training" / "convergence.parquet")
    return (out / "policy" / "cuts.parquet").read_bytes(), [table[name] for name in SERIES]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_equal_over_backends_ranks_and_pauses(random_path, tmp_path, backend):
    """Two trajectories, CVaR, random load and wind; three ranks leave one without work."""
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    assert run(random_path, alone, 5) == [1, 2, 3, 4, 5]
    # Those that begin anew have the same bytes as well.
    assert run(random_path, mixed, 2, ranks=3, backend=backend) == [1, 2]
    assert run(random_path, mixed, 3) == [3]
    assert run(random_path, mixed, 5, ranks=2, backend=backend) == [4, 5]
    assert content(mixed) == content(alone)
