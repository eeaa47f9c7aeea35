"""What pages a mapping of shared memory consists of: huge ones, on which node, there or not.

Pages come when they are first touched, unless they are populated before. On a machine with several
memory nodes they lie on the node of the process that does it, or are spread over all of them.

Sources: madvise(2), mbind(2), mprotect(2); Documentation/admin-guide/mm/transhuge.rst of Linux.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cobre_shm import layout

__all__ = ["HUGE_PAGE_BYTES", "PagePolicy", "make_read_only", "populate", "share_of", "touch"]

HUGE_PAGE_BYTES = 2 << 20

logger: logging.Logger = logging.getLogger("cobre_shm")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.syscall.restype = ctypes.c_long

_PROT_READ = 1
_HUGEPAGE, _NOHUGEPAGE, _POPULATE_WRITE, _COLLAPSE = 14, 15, 23, 25
_SYS_MBIND = 237
_MPOL_INTERLEAVE = 3
_NODES = Path("/sys/devices/system/node/online")

# From here on "auto" asks for huge pages; numpy does so for private memory.
_LARGE_BYTES = 4 << 20
# A signal ends a call of the system; so much is done again.
_POPULATED_AT_ONCE = 16 << 20


@dataclass(frozen=True)
class PagePolicy:
    """Which pages shared memory should have. A wish that the system refuses is no error.

    Attributes:
        hugepages: ``auto``: for large memory, if the administrator leaves it to programs
            (``shmem_enabled`` is ``advise``). ``always``: also where he does not, by collapsing
            (Linux 6.1). ``never``: not even if he does.
        interleave: Whether to spread the pages of regions over all memory nodes.
    """

    hugepages: str = "auto"
    interleave: bool = False

    def apply(self, address: int, nbytes: int, *, spread: bool = False) -> None:
        """Tell the system about a mapping that has no pages yet.

        Args:
            address: Of the mapping.
            nbytes: Its length.
            spread: Whether it is for all ranks alike, so that interleaving makes sense.
        """
        with suppress(OSError):
            if self.hugepages == "never":
                _advise(address, nbytes, _NOHUGEPAGE)
            elif self.hugepages == "always" or nbytes >= _LARGE_BYTES:
                _advise(address, nbytes, _HUGEPAGE)
        if spread and self.interleave:
            _interleave(address, nbytes)

    def collapse(self, fd: int, offset: int, address: int, nbytes: int) -> None:
        """Have huge pages in a mapping that has no pages yet, if they are wanted at all costs.

        Args:
            fd: Descriptor of the memory.
            offset: Where in it the mapping begins.
            address: Of the mapping.
            nbytes: Its length.
        """
        if self.hugepages != "always":
            return
        with suppress(OSError):
            # The kernel collapses only where some page is there; the fewer, the less it copies.
            for start in range(0, nbytes - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
                populate(fd, offset + start, address + start, layout.PAGE_BYTES)
            _advise(address, nbytes, _COLLAPSE)


def populate(fd: int, offset: int, address: int, nbytes: int) -> None:
    """Have the system allocate memory that is mapped at ``address``, all of it or an error.

    Raises:
        OSError: It is not there. What has been allocated goes with the object.
    """
    for start in range(0, nbytes, _POPULATED_AT_ONCE):
        length = min(_POPULATED_AT_ONCE, nbytes - start)
        try:
            _advise(address + start, length, _POPULATE_WRITE)
        except OSError as error:
            if error.errno == errno.EFAULT:
                # Where touching the page would be a SIGBUS.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            if error.errno != errno.EINVAL:
                raise
            # Before Linux 5.14.
            os.posix_fallocate(fd, offset + start, length)


def touch(address: int, nbytes: int) -> None:
    """Map pages that are allocated, so that nobody waits for that later, as far as possible."""
    with suppress(OSError):
        _advise(address, nbytes, _POPULATE_WRITE)


def make_read_only(address: int, nbytes: int) -> None:
    """Have every write to a mapping end in a SIGSEGV.

    Raises:
        OSError: The system refuses.
    """
    whole_pages = -(-nbytes // layout.PAGE_BYTES) * layout.PAGE_BYTES
    _check(_LIBC.mprotect(address, whole_pages, _PROT_READ))


def share_of(nbytes: int, rank: int, size: int) -> tuple[int, int]:
    """Return where the share of ``rank`` in common memory begins and ends: blocks of whole pages.

    Block r of ``size`` equal blocks, as a program that divides an array among the ranks has them;
    so, as a rule, pages lie near the rank that writes them.
    """
    unit = HUGE_PAGE_BYTES if nbytes >= size * HUGE_PAGE_BYTES else layout.PAGE_BYTES
    units = -(-nbytes // unit)
    return min(nbytes, units * rank // size * unit), min(nbytes, units * (rank + 1) // size * unit)


def _advise(address: int, nbytes: int, advice: int) -> None:
    while True:
        try:
            _check(_LIBC.madvise(address, nbytes, advice))
        except InterruptedError:
            # Python handles signals between two turns.
            continue
        return


def _interleave(address: int, nbytes: int) -> None:
    nodes = _memory_nodes()
    if len(nodes) < 2:
        logger.info("COBRE_SHM_NUMA_INTERLEAVE: this machine has one memory node, nothing to do")
        return
    mask = (ctypes.c_ulong * (max(nodes) // 64 + 1))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    code = _LIBC.syscall(
        ctypes.c_long(_SYS_MBIND),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_long(_MPOL_INTERLEAVE),
        mask,
        # The kernel takes one bit less than it is told of.
        ctypes.c_ulong(64 * len(mask) + 1),
        ctypes.c_ulong(0),
    )
    if code:
        logger.warning(
            "COBRE_SHM_NUMA_INTERLEAVE: the system refused: %s", os.strerror(ctypes.get_errno())
        )


def _memory_nodes() -> list[int]:
    """Return the numbers of the memory nodes: of ``0-1,4`` as the kernel writes it."""
    nodes: list[int] = []
    with suppress(OSError, ValueError):
        for part in _NODES.read_text().strip().split(","):
            first, _, last = part.partition("-")
            nodes += range(int(first), int(last or first) + 1)
    return nodes


def _check(code: int) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
