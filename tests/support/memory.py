"""A control group with little memory."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

import pytest

LIMIT_BYTES = 300 << 20


@pytest.fixture
def limited_group():
    """A control group with little memory."""
    mount, name = Path("/sys/fs/cgroup"), f"cobre-test-{secrets.token_hex(4)}"
    kinds = ((mount / "memory", "memory.limit_in_bytes"), (mount, "memory.max"))
    folder = None
    for parent, limit in kinds:
        candidate = parent / name
        with suppress(OSError):
            candidate.mkdir()
            with suppress(OSError):
                if (candidate / limit).exists():
                    (candidate / limit).write_text(str(LIMIT_BYTES))
                    folder = candidate
                    break
            # Of another kind, or refused.
            candidate.rmdir()
    if folder is None:
        pytest.skip("no control group for memory can be made here")
    yield folder
    folder.rmdir()
