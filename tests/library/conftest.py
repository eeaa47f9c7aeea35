"""A case that trains in a moment."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("highspy", reason='needs the extra "sddp"')
pytest.importorskip("pyarrow", reason='needs the extra "sddp"')

import cobre_shm
from tests.sddp.editing import random_case

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def case_path(tmp_path) -> Path:
    return random_case(tmp_path / "random")


def limit(iterations: int) -> dict[str, object]:
    """Overrides of the configuration that end a training after so many iterations."""
    return {"training": {"stopping_rules": [{"type": "iteration_limit", "limit": iterations}]}}


@pytest.fixture
def alone(case_path) -> cobre_shm.TrainingResult:
    """The result in this process."""
    return cobre_shm.train(case_path, config_overrides=limit(3))


def program(code, *arguments):
    """Run a program of its own to its end."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )


def global_state():
    # pytest itself notes the stage of a test in the environment.
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return own, multiprocessing.get_start_method(allow_none=True), Path.cwd()


@pytest.fixture
def nothing_global_is_changed():
    before = global_state()
    yield
    assert global_state() == before
