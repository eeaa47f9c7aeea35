"""What ``ps``, ``top`` and ``pgrep -f`` show for a rank: its program, and not the zygote's.

The kernel shows a stretch of the process's own memory, where it put the arguments at the start
(``arg_start`` and ``arg_end`` in ``proc_pid_stat(5)``). Python has copied them long ago, so they
may be written over. Those of the zygote are always longer than those of a rank: they hold the
program's, and the code that begins the zygote.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["show_as"]

# Their places behind the name in parentheses, which is the second field.
_ARG_START, _ARG_END = 48 - 3, 49 - 3


def show_as(command: Sequence[str]) -> None:
    """Have this process shown with another command line; nothing happens where it does not fit."""
    text = b"".join(os.fsencode(word) + b"\0" for word in command)
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        # Where the kernel does not tell, both are 0.
        if start > 0 and len(text) <= end - start:
            ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)
