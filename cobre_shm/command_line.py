"""What our command lines have in common."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["BAD_ARGUMENTS", "BAD_BACKEND", "BROKEN_PIPE", "Parser", "while_somebody_reads"]

BAD_ARGUMENTS = 1
BAD_BACKEND = 4
# As if SIGPIPE had ended us.
BROKEN_PIPE = 128 + signal.SIGPIPE


class Parser(argparse.ArgumentParser):
    """Ends the program with 1; the 2 of argparse means a wrong configuration here."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong."""
        self.print_usage(sys.stderr)
        self.exit(BAD_ARGUMENTS, f"{self.prog}: error: {message}\n")


def while_somebody_reads(action: Callable[[], int | None]) -> int:
    """Run a command that prints.

    Returns:
        What it returns, 0 for None; 141 when nobody reads what it prints.
    """
    try:
        code = action()
        # A process that was started without the descriptor has none, and prints nothing.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would try again at its end, and complain.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        return BROKEN_PIPE
    return code or 0
