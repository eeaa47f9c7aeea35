"""Where ranks run: sets of CPUs for ``--bind-to``.

Only CPUs on which we may run ourselves are used. Facts about cores and nodes are the kernel's,
below ``/sys/devices/system``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from cobre_shm.spawn.errors import InvalidArguments

__all__ = ["cpus_of_ranks", "format_numbers", "parse_numbers"]

_SYSTEM = Path("/sys/devices/system")


def cpus_of_ranks(policy: str, size: int, system: Path = _SYSTEM) -> list[list[int]]:
    """Return the CPUs of each rank; nothing where ranks are not bound.

    Args:
        policy: ``none``; ``core``: rank r has the r-th core with all its hardware threads;
            ``numa``: nodes are dealt out in blocks of neighbouring ranks; or a list such as
            ``0,2,4-7``: rank r has its r-th CPU. With more ranks than cores or CPUs, they are
            dealt out again from the first.
        size: Number of ranks.
        system: Where the kernel tells of CPUs and nodes.

    Raises:
        InvalidArguments: The policy is not understood, or names a CPU that may not be used.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if policy == "none":
        return []
    if policy == "core":
        cores = _cores(allowed, system)
        return [cores[rank % len(cores)] for rank in range(size)]
    if policy == "numa":
        nodes = _nodes(allowed, system)
        return [nodes[rank * len(nodes) // size] for rank in range(size)]
    try:
        wanted = parse_numbers(policy)
    except InvalidArguments as error:
        raise InvalidArguments(
            f"--bind-to: expected none, core, numa or CPUs such as 0,3-5, not {policy!r}"
        ) from error
    refused = [cpu for cpu in wanted if cpu not in allowed]
    if refused:
        raise InvalidArguments(
            f"--bind-to: CPU {refused[0]} may not be used here",
            suggestion=f"Usable are {format_numbers(allowed)}",
        )
    return [[wanted[rank % len(wanted)]] for rank in range(size)]


def parse_numbers(text: str) -> list[int]:
    """Return the numbers of a list such as ``0,2,4-7``, in its order.

    Raises:
        InvalidArguments: It is none.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InvalidArguments(f"Expected numbers such as 0,3-5, not {text!r}")
        start, end = int(first), int(last) if dash else int(first)
        if end < start or end - start > 1 << 16:
            raise InvalidArguments(f"Expected numbers such as 0,3-5, not {text!r}")
        numbers.extend(range(start, end + 1))
    return numbers


def format_numbers(numbers: Sequence[int]) -> str:
    """Return sorted numbers as the shortest such list."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _cores(allowed: Sequence[int], system: Path) -> list[list[int]]:
    cores: dict[str, list[int]] = {}
    for cpu in allowed:
        siblings = system / f"cpu/cpu{cpu}/topology/thread_siblings_list"
        name = str(cpu)
        with contextlib.suppress(OSError):
            name = siblings.read_text().strip()
        cores.setdefault(name, []).append(cpu)
    return list(cores.values())


def _nodes(allowed: Sequence[int], system: Path) -> list[list[int]]:
    nodes = []
    found = (system / "node").glob("node[0-9]*")
    for folder in sorted(found, key=lambda folder: int(folder.name[4:])):
        with contextlib.suppress(OSError, InvalidArguments):
            cpus = set(parse_numbers((folder / "cpulist").read_text().strip()))
            # A node may have memory alone, or none of the CPUs that are ours.
            if usable := [cpu for cpu in allowed if cpu in cpus]:
                nodes.append(usable)
    return nodes or [list(allowed)]
