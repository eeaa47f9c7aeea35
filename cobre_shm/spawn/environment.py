"""What a rank finds in its environment.

Two parts: what all ranks share, which the zygote is started with, because libraries read it when
they are imported; and the few variables that say which rank it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cobre_shm.selection.launchers import LAUNCHER_VARIABLES
from cobre_shm.spawn.errors import InvalidArguments

__all__ = ["THREAD_VARIABLES", "common_environment", "parse_setting", "rank_variables"]

# Any of these makes backend detection think of an MPI launch. A batch shell of Slurm has one,
# and so has a launcher started under mpiexec, but the ranks started here are none of theirs.
_FOREIGN = LAUNCHER_VARIABLES
# What those launchers hand to libraries: a connection that a rank of ours must not take up.
_FOREIGN_PREFIXES = ("COBRE_TCP_", "PMI_", "PMIX_", "OMPI_COMM_", "HYDI_", "HYDRA_")

# N ranks with a pool of all CPUs each would fight for them.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
_DEFAULTS = {
    # A crash in native code shows the Python stack.
    "PYTHONFAULTHANDLER": "1",
    # Standard output is a pipe, where lines would otherwise stay back until a block is full.
    "PYTHONUNBUFFERED": "1",
}


def parse_setting(text: str) -> tuple[str, str | None]:
    """Return the name and value of ``NAME=VALUE``; the value is None for ``NAME`` alone.

    Raises:
        InvalidArguments: There is no name.
    """
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[^\s=\0]+", name):
        raise InvalidArguments(f"Expected NAME=VALUE, not {text!r}")
    return name, value if equals else None


def common_environment(
    base: Mapping[str, str],
    *,
    settings: Mapping[str, str] | None = None,
    unset: Iterable[str] = (),
    threads: int | None = 1,
    overrides_threads: bool = False,
) -> dict[str, str]:
    """Return the environment that all ranks share.

    Args:
        base: The launcher's own; what the user set there wins over the defaults.
        settings: Variables given on the command line, which win over all else.
        unset: Variables that ranks must not have.
        threads: Size of thread pools; None: nothing is said about them.
        overrides_threads: Whether ``threads`` was asked for and so wins over ``base``.
    """
    kept = {
        name: value
        for name, value in base.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    pools = {} if threads is None else dict.fromkeys(THREAD_VARIABLES, str(threads))
    first, last = ({}, pools) if overrides_threads else (pools, {})
    found = {**_DEFAULTS, **first, **kept, **last, "COBRE_COMM_BACKEND": "shm"}
    for name in unset:
        found.pop(name, None)
    return {**found, **(settings or {})}


def rank_variables(name: str, rank: int, size: int) -> dict[str, str]:
    """Return what sets a rank apart.

    Args:
        name: Of the shared memory segment, or ``fd:N`` for an inherited descriptor.
        rank: The rank, ``0 <= rank < size``.
        size: Number of ranks.
    """
    return {
        "COBRE_SHM_NAME": name,
        "COBRE_SHM_RANK": str(rank),
        "COBRE_SHM_SIZE": str(size),
        # Scripts written for other launchers read these.
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
    }
