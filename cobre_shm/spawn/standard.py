"""The standard descriptors of a process that may lack some."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["open_standard_descriptors", "standard_descriptors"]


def open_standard_descriptors() -> list[int]:
    """Give missing standard descriptors to the null device, or a pipe of ours would become one.

    Children inherit them. Returns those that were missing.
    """
    missing = []
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == standard:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, standard)
                os.close(null)
            missing.append(standard)
    return missing


@contextmanager
def standard_descriptors() -> Iterator[None]:
    """Have all three in the block; what was missing is missing again behind it."""
    missing = open_standard_descriptors()
    try:
        yield
    finally:
        null = Path(os.devnull).stat()
        for standard in missing:
            with suppress(OSError):
                if os.path.samestat(os.fstat(standard), null):
                    os.close(standard)
