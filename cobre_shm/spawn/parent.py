"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

__all__ = ["die_with"]

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> Callable[[], None]:
    """Return what a child calls so that it is killed when ``parent``, its parent, ends.

    Everything is looked up here: between fork and exec, no library may be loaded.
    """
    prctl = ctypes.CDLL(None).prctl

    def request() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        # It may have ended before the request was made.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return request
