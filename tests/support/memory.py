"""How much memory a process holds, and a control group with little of it."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

import pytest

LIMIT_BYTES = 300 << 20


def resident_bytes() -> int:
    """Return what this process has in memory; statm may be some pages a processor behind."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("Rss:")[1].split()[0]) << 10


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
