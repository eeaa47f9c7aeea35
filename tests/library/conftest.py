"""A case that trains in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("highspy", reason='needs the extra "sddp"')
pytest.importorskip("pyarrow", reason='needs the extra "sddp"')

from tests.sddp.editing import random_case


@pytest.fixture
def case_path(tmp_path) -> Path:
    return random_case(tmp_path / "random")


def limit(iterations: int) -> dict[str, object]:
    """Overrides of the configuration that end a training after so many iterations."""
    return {"training": {"stopping_rules": [{"type": "iteration_limit", "limit": iterations}]}}
