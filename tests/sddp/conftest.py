"""Cases for the tests of the training workload."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("highspy", reason='needs the extra "sddp"')
pytest.importorskip("pyarrow", reason='needs the extra "sddp"')

from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp import shipped_case_path
from tests.sddp.editing import copy_case, random_case, small_case

_DEFAULT_CASES = Path(__file__).parents[3] / "shared" / "cases"


@pytest.fixture
def comm():
    with LocalCommunicator() as communicator:
        yield communicator


@pytest.fixture(scope="session")
def reference_cases() -> Path:
    """The directory with cases of the reference program and its results on them."""
    path = Path(os.environ.get("REFERENCE_CASES", _DEFAULT_CASES))
    if not (path / "expected.json").is_file():
        pytest.skip(f"no reference cases in {path}; set REFERENCE_CASES")
    return path


@pytest.fixture(scope="session")
def expected(reference_cases):
    return json.loads((reference_cases / "expected.json").read_text())["cases"]


@pytest.fixture
def shipped_copy(tmp_path) -> Path:
    return copy_case(shipped_case_path(), tmp_path / "case")


@pytest.fixture
def small(tmp_path) -> Path:
    return small_case(tmp_path / "small")


@pytest.fixture
def random_path(tmp_path) -> Path:
    return random_case(tmp_path / "random")
