"""Processes that tests start, how they are found, and what they are waited for with."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Longer than a collective may stand still: who waits for the one that waits so long gives up.
_APPEAR_SECS = 60.0


@contextlib.contextmanager
def started(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Give a process that has ended after the block: whoever leaves it early kills it.

    Ranks and workers end with their launcher.
    """
    with subprocess.Popen([str(word) for word in command], **options) as process:
        try:
            yield process
        finally:
            process.kill()


def processes_with(mark: str) -> list[int]:
    """Return the pids of living processes with this, as NAME=VALUE, in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def appear(paths: Iterable[Path]) -> bool:
    """Wait for files; if who writes them waited for us, that would never end well."""
    deadline = time.monotonic() + _APPEAR_SECS
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
