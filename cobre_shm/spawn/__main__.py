"""The launcher's entry: ``python -m cobre_shm.spawn``, or ``cobrerun``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cobre_shm.spawn.signals import remember_interrupts

__all__ = ["main", "run"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    remember_interrupts()
    try:
        # Only now: a ^C during this import counts.
        from cobre_shm.spawn.command import execute

        return execute(words)
    except KeyboardInterrupt:
        # Before the launcher watches signals, or after: there is no rank.
        return 130


def run() -> NoReturn:
    """Run this process's command line, and end it."""
    code = main()
    # Nothing of ours is left that Python could free or write, and freeing takes it a while.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    # Python says what it could not write, or there is nothing to write to.
    sys.exit(code)


if __name__ == "__main__":
    run()
