"""The examples in docstrings, and what a checker says of a caller."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CALLER = """
import numpy as np
import cobre_shm
from cobre_shm import spawn

def work(offset: float) -> float:
    with cobre_shm.create_communicator() as comm:
        return float(comm.allreduce(np.ones(1))[0]) + offset

def watch(event: cobre_shm.ProgressEvent) -> bool:
    return event.gap_percent < 1.0

async def main() -> cobre_shm.TrainingResult:
    return await cobre_shm.train_async("case", num_workers=2, progress_callback=watch)

sums: list[float] = spawn.run(work, nprocs=2, args=(1.0,))
result = cobre_shm.train("case", backend="tcp", coordinator="host:1", rank=0, size=2)
bound: float = result.lower_bound
cost: float = result.policy.evaluate(0, [1.0])
workers: tuple[cobre_shm.WorkerInfo, ...] | None = result.workers
total = cobre_shm.simulate("case", result).total_cost.sum()
try:
    cobre_shm.train("case", num_workers=4)
except cobre_shm.WorkerError as error:
    number: int | None = error.signal
    inner: BaseException | None = error.inner
"""


@pytest.mark.parametrize("module", ["api.training", "spawn.calls"])
def test_examples_of_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(f"cobre_shm.{module}"))
    assert tried
    assert not failed


def test_strict_checker_accepts_a_caller(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary"),
            *("--config-file", str(ROOT / "pyproject.toml"), "--follow-imports=silent"),
            *("--cache-dir", str(tmp_path / "cache"), str(tmp_path / "caller.py")),
        ],
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=720,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
