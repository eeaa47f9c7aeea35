"""A request to end, from one thread to another that waits for descriptors."""

from __future__ import annotations

import os
from typing import Self

from cobre_shm.descriptors import above_standard

__all__ = ["Cancellation", "Cancelled"]


class Cancelled(Exception):
    """The work was ended because its :class:`Cancellation` asked for it."""


class Cancellation:
    """A request from another thread to end. Close it when nobody uses it any more."""

    def __init__(self) -> None:
        self._descriptor = above_standard(os.eventfd(0, os.EFD_CLOEXEC))
        self.is_requested: bool = False

    def request(self) -> None:
        """Ask for the end."""
        self.is_requested = True
        os.eventfd_write(self._descriptor, 1)

    def check(self) -> None:
        """Raise :class:`Cancelled` if the end has been asked for."""
        if self.is_requested:
            raise Cancelled

    def fileno(self) -> int:
        """Return a descriptor that is readable once the end has been asked for."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
