"""An image of machine code: how it is stored, and how it gets into memory.

An image needs no linker any more. Its code reaches everything relative to its own place, and what
is outside, functions of Python's C API and of the C library, through a table behind the code:

    code and constants | to a page | one address for each function that is outside

So it goes into memory by being copied there and having the table filled in. It stays for the life
of the process: C functions that Python knows point into it, and are called until the very end.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import source_hash

__all__ = ["PAGE_BYTES", "WORD_BYTES", "DamagedImage", "Image"]

PAGE_BYTES = 4096
WORD_BYTES = 8
_MAGIC = b"cobre-shm image 1\n"
_CHECKSUM_BYTES = 8
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS = 0x02, 0x20
_FAILED = ctypes.c_void_p(-1).value


class DamagedImage(Exception):
    """What was read is no image, or not the whole of one."""


@dataclass(frozen=True)
class Image:
    """Linked machine code.

    Attributes:
        entries: Where functions begin, in bytes from the start of ``code``.
        externals: Names of the functions that it calls, in the order of the table.
        code: Code and constants, padded to a page; the table follows.
    """

    entries: Mapping[str, int]
    externals: tuple[str, ...]
    code: bytes

    def to_bytes(self) -> bytes:
        """Return it as :meth:`from_bytes` takes it."""
        facts = {"entries": self.entries, "externals": self.externals}
        body = json.dumps(facts).encode() + b"\n" + self.code
        return _MAGIC + source_hash(body) + body

    @classmethod
    def from_bytes(cls, stored: bytes) -> Image:
        """Return what was stored.

        Raises:
            DamagedImage: It is not what ``to_bytes`` gave.
        """
        begin = len(_MAGIC) + _CHECKSUM_BYTES
        body = stored[begin:]
        if stored[:begin] != _MAGIC + source_hash(body):
            raise DamagedImage
        facts, _, code = body.partition(b"\n")
        known = json.loads(facts)
        return cls(known["entries"], tuple(known["externals"]), code)

    def load(self) -> dict[str, int]:
        """Copy it into memory and return the addresses of its functions.

        Raises:
            OSError: The system refuses executable memory.
        """
        table = [_address(name) for name in self.externals]
        words = (ctypes.c_uint64 * len(table))(*table)
        start = _map(len(self.code) + len(table) * WORD_BYTES)
        ctypes.memmove(start, self.code, len(self.code))
        ctypes.memmove(start + len(self.code), words, len(table) * WORD_BYTES)
        _protect(start, len(self.code), _PROT_READ | _PROT_EXEC)
        if table:
            _protect(start + len(self.code), len(table) * WORD_BYTES, _PROT_READ)
        return {name: start + offset for name, offset in self.entries.items()}


# Finds what the process has, the C library included.
_libraries = ctypes.PyDLL(None, use_errno=True)


def _address(name: str) -> int:
    address = ctypes.cast(_libraries[name], ctypes.c_void_p).value
    assert address is not None
    return address


def _map(nbytes: int) -> int:
    mmap = _libraries["mmap"]
    mmap.restype = ctypes.c_void_p
    mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS
    start = mmap(None, nbytes, _PROT_READ | _PROT_WRITE, flags, -1, 0)
    if start is None or start == _FAILED:
        raise OSError(ctypes.get_errno(), "no memory for kernels")
    return int(start)


def _protect(start: int, nbytes: int, protection: int) -> None:
    mprotect = _libraries["mprotect"]
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if mprotect(start, nbytes, protection):
        raise OSError(ctypes.get_errno(), "memory cannot be made executable for kernels")
