"""Shared 64-bit words from Python, for the slow paths.

One ctypes access is one aligned move of 8 bytes. On x86-64 loads acquire and stores release by
themselves; kernels use ``kernels/atomics.py``.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["CutOff", "FileWords", "Words"]


class CutOff(OSError):
    """The file of a segment has fewer bytes than it was made with."""


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


class FileWords(Words):
    """The same words read from the file, where what has been cut off is an error and no SIGBUS.

    Linux copies an aligned word in one move, as a load from memory does. There is no storing.

    Raises:
        CutOff: From the loads.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(0)
        self._fd = fd

    def load(self, offset: int) -> int:
        """Return the signed word at ``offset``."""
        return int.from_bytes(self.load_bytes(offset, 8), "little", signed=True)

    def load_bytes(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset``; not atomic."""
        data = bytearray(count)
        if os.preadv(self._fd, [data], offset) < count:
            raise CutOff(f"it ends before byte {offset + count}")
        return bytes(data)
