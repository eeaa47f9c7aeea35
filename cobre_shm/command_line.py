"""What our command lines have in common."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

__all__ = ["BAD_ARGUMENTS", "BAD_BACKEND", "Parser"]

BAD_ARGUMENTS = 1
BAD_BACKEND = 4


class Parser(argparse.ArgumentParser):
    """Ends the program with 1; the 2 of argparse means a wrong configuration here."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong."""
        self.print_usage(sys.stderr)
        self.exit(BAD_ARGUMENTS, f"{self.prog}: error: {message}\n")
