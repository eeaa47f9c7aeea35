"""The programs in scripts/examples, as their heads say they are run. Each checks its own result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.conftest import get_mpi

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "scripts/examples"
LAUNCHER = ("-m", "cobre_shm.spawn", "-n")
# Where the regression must end, whoever adds up: the rows do not depend on the ranks.
REGRESSION = "beta 0.492427 -0.996295 2.018111 0.002466 1.526749"


def run(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=720,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    named = {"regression.py", "stencil.py", "planning.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"} == named


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ((), "1 rank(s) over local"),
        ((*LAUNCHER, "3"), "3 rank(s) over shm"),
        ((*LAUNCHER, "3", "--backend", "tcp"), "3 rank(s) over tcp"),
    ],
    ids=["alone", "shm", "tcp"],
)
def test_regression_is_one_script_for_every_launch(tmp_path, launch, said):
    out = run(*launch, EXAMPLES / "regression.py", cwd=tmp_path)
    assert out.startswith(said)
    assert REGRESSION in out


@pytest.mark.parametrize("size", [1, 3])
def test_regression_under_mpiexec(size):
    done = get_mpi("mpich").run(size, EXAMPLES / "regression.py")
    assert done.code == 0, done.stderr
    assert done.stdout.startswith(f"{size} rank(s) over mpi")
    assert REGRESSION in done.stdout


def test_regression_with_more_ranks_than_blocks(tmp_path):
    out = run(*LAUNCHER, "25", EXAMPLES / "regression.py", cwd=tmp_path)
    assert REGRESSION in out


@pytest.mark.parametrize("size", [1, 3])
def test_stencil_on_shared_rows(tmp_path, size):
    out = run(*LAUNCHER, size, EXAMPLES / "stencil.py", cwd=tmp_path)
    assert out.startswith(f"{size} rank(s), 500 steps: ")


def test_planning_from_python(tmp_path):
    pytest.importorskip("highspy", reason='needs the extra "sddp"')
    pytest.importorskip("pyarrow", reason='needs the extra "sddp"')
    out = run(EXAMPLES / "planning.py", cwd=tmp_path)
    assert "lower bound" in out
    assert "over 50 scenarios" in out
