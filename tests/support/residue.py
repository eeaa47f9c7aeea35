"""What a test may leave behind in its process and on the machine."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
from dataclasses import dataclass, fields, replace
from pathlib import Path

# What tests start inherits it, and keeps it when its parent is gone. Not COBRE_*: ranks would
# say that they do not know it.
_VARIABLE = "TEST_RUN_OF_COBRE"
_PYTESTS = {b"pytest", b"py.test"}
_MODULES = {*_PYTESTS, b"cobre_shm"}
_mark = b""


def mark_this_run() -> None:
    """Have the processes that tests start from now on carry a mark of this run."""
    global _mark
    os.environ[_VARIABLE] = f"{os.getpid()}-{secrets.token_hex(8)}"
    _mark = f"{_VARIABLE}={os.environ[_VARIABLE]}".encode()


@dataclass(frozen=True)
class Residue:
    """Things that exist at one moment.

    Attributes:
        segments: Names in /dev/shm of this project, from any run on this machine.
        processes: Ids of this process's children, theirs, and so on, zombies included, and of
            orphans that carry the mark of this run.
        descriptors: Open file descriptors, with what they are open on.
        threads: Names of the threads of this process.
        mappings: Of shared memory of this project into this process.
    """

    segments: frozenset[str] = frozenset()
    processes: frozenset[int] = frozenset()
    descriptors: frozenset[tuple[int, str]] = frozenset()
    threads: frozenset[str] = frozenset()
    mappings: frozenset[str] = frozenset()

    def __sub__(self, other: Residue) -> Residue:
        return Residue(
            *(getattr(self, each.name) - getattr(other, each.name) for each in fields(self))
        )

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))


def snapshot() -> Residue:
    """Return what there is now."""
    return Residue(
        segments=frozenset(
            entry.name for entry in Path("/dev/shm").iterdir() if entry.name.startswith("cobre")
        ),
        processes=_descendants() | _marked(),
        descriptors=_descriptors(),
        threads=frozenset(
            f"{thread.name} ({thread.native_id})" for thread in threading.enumerate()
        ),
        mappings=frozenset(
            line for line in Path("/proc/self/maps").read_text().splitlines() if _is_ours(line)
        ),
    )


def _is_ours(mapping: str) -> bool:
    # Libraries in a checkout named after the project are not meant.
    return "cobre-" in mapping and ("/dev/shm/" in mapping or "/memfd:" in mapping)


def of_this_run(residue: Residue) -> Residue:
    """Return ``residue`` without segments if another run is active, whose they may be.

    Nothing about a segment tells from which run it came once its creator is gone.
    """
    if residue.segments and _is_another_run_active():
        return replace(residue, segments=frozenset())
    return residue


def _is_another_run_active() -> bool:
    own = os.getpid()
    ours = {*_line_of_descent(own), *_marked()}
    return any(
        pid not in ours
        and own not in _line_of_descent(pid)
        and (is_a_run(_read(pid, "cmdline")) or b"/dev/shm/cobre" in _read(pid, "maps"))
        for pid in _processes()
    )


def is_a_run(command_line: bytes) -> bool:
    """Whether this runs pytest or a module of ours; an editor in such a folder does not."""
    words = command_line.split(b"\0")
    # A script stands behind the interpreter that its first line names.
    programs = {word.rpartition(b"/")[2] for word in words[:2]}
    modules = {
        module.partition(b".")[0] for flag, module in itertools.pairwise(words) if flag == b"-m"
    }
    return bool(programs & _PYTESTS or modules & _MODULES)


def _line_of_descent(pid: int) -> list[int]:
    """Return a process, its parent, and so on."""
    line = []
    while pid:
        line.append(pid)
        pid = _parent_of(pid)
    return line


def _descendants() -> frozenset[int]:
    parents = {pid: _parent_of(pid) for pid in _processes()}
    found: set[int] = set()
    new = {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        found |= new
    return frozenset(found)


def _marked() -> frozenset[int]:
    """Return who was started by this run, whoever is its parent now."""
    return frozenset(
        pid
        for pid in _processes()
        if _mark and pid != os.getpid() and _mark in _read(pid, "environ").split(b"\0")
    )


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _parent_of(pid: int) -> int:
    # The second field, the name in parentheses, may contain anything.
    fields_behind_name = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields_behind_name[1]) if fields_behind_name else 0


def _read(pid: int, name: str) -> bytes:
    """Return a file of /proc; empty where the process is gone or another user's."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _descriptors() -> frozenset[tuple[int, str]]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add((int(entry.name), str(entry.readlink())))
        except OSError:
            # The descriptor through which this list was read.
            continue
    return frozenset(found)
