"""Shared 64-bit words from Python, for the slow paths.

One ctypes access is one aligned move of 8 bytes. On x86-64 loads acquire and stores release by
themselves; kernels use ``kernels/atomics.py``.
"""

from __future__ import annotations

import ctypes

__all__ = ["Words"]


class Words:
    """The words of a mapping, by byte offset."""

    def __init__(self, address: int) -> None:
        self.address = address

    def load(self, offset: int) -> int:
        """Return the signed word at ``offset``."""
        return ctypes.c_int64.from_address(self.address + offset).value

    def store(self, offset: int, value: int) -> None:
        """Store a signed word."""
        ctypes.c_int64.from_address(self.address + offset).value = value

    def load_bytes(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset``; not atomic."""
        return ctypes.string_at(self.address + offset, count)

    def store_bytes(self, offset: int, value: bytes) -> None:
        """Store bytes; not atomic."""
        ctypes.memmove(self.address + offset, value, len(value))
