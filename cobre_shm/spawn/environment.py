"""What a rank finds in its environment.

Two parts: what all ranks share, which the zygote is started with, because libraries read it when
they are imported; and the few variables that say which rank it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cobre_shm.selection.launchers import LAUNCHER_VARIABLES
from cobre_shm.spawn.errors import InvalidArguments

__all__ = [
    "THREAD_VARIABLES",
    "check_variable",
    "common_environment",
    "parse_setting",
    "rank_variables",
]

# Any of these makes backend detection think of an MPI launch. A batch shell of Slurm has one,
# and so has a launcher started under mpiexec, but the ranks started here are none of theirs.
_FOREIGN = LAUNCHER_VARIABLES
# What those launchers hand to libraries: a connection that a rank of ours must not take up.
_FOREIGN_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM_", "HYDI_", "HYDRA_")
# Of the backend that ranks do not meet in, all; of tcp, what is this launcher's to say.
_OTHER_PREFIXES = {"shm": ("COBRE_TCP_",), "tcp": ("COBRE_SHM_", "COBRE_TCP_")}
_KEPT = {
    "shm": frozenset[str](),
    "tcp": frozenset(
        (
            "COBRE_TCP_CONNECT_TIMEOUT_MS",
            "COBRE_TCP_TIMEOUT_SECS",
            "COBRE_TCP_STALL_WARN_SECS",
            "COBRE_TCP_INSECURE",
            "COBRE_TCP_SECRET_FILE",
        )
    ),
}

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

# What the launcher decides by itself, beside what ``rank_variables`` names.
_DECIDED = frozenset(
    (
        "COBRE_COMM_BACKEND",
        "COBRE_SHM_NAME",
        "COBRE_TCP_COORDINATOR",
        "COBRE_TCP_BIND_ADDR",
        "COBRE_TCP_REPORT",
    )
)


def check_variable(option: str, name: str, value: str | None = None) -> None:
    """Refuse what must not be on a command line, or would be of no effect there.

    Args:
        option: Of the command line, for the message.
        name: The variable.
        value: What it would be set to; None: nothing is said about that.

    Raises:
        InvalidArguments: It is a secret, or decided by the launcher.
    """
    if name == "COBRE_TCP_SECRET" and value is not None:
        raise InvalidArguments(
            f"{option} {name}: everybody on this machine can read command lines",
            suggestion="Put the secret into a file with mode 0600 and name that in "
            "COBRE_TCP_SECRET_FILE, or set the variable before the launcher is started",
        )
    if name in _DECIDED or any(name in rank_variables(each, 0, 1) for each in _OTHER_PREFIXES):
        raise InvalidArguments(
            f"{option} {name}: the launcher sets it",
            suggestion="See -n, --backend, --nnodes and --coordinator",
        )


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
    backend: str = "shm",
    settings: Mapping[str, str] | None = None,
    unset: Iterable[str] = (),
    threads: int | None = 1,
    overrides_threads: bool = False,
) -> dict[str, str]:
    """Return the environment that all ranks share.

    Args:
        base: The launcher's own; what the user set there wins over the defaults.
        backend: In which the ranks meet, ``shm`` or ``tcp``.
        settings: Variables given on the command line, which win over all else.
        unset: Variables that ranks must not have.
        threads: Size of thread pools; None: nothing is said about them.
        overrides_threads: Whether ``threads`` was asked for and so wins over ``base``.
    """
    prefixes = (*_FOREIGN_PREFIXES, *_OTHER_PREFIXES[backend])
    kept = {
        name: value
        for name, value in base.items()
        if name in _KEPT[backend] or (name not in _FOREIGN and not name.startswith(prefixes))
    }
    pools = {} if threads is None else dict.fromkeys(THREAD_VARIABLES, str(threads))
    first, last = ({}, pools) if overrides_threads else (pools, {})
    found = {**_DEFAULTS, **first, **kept, **last, "COBRE_COMM_BACKEND": backend}
    for name in unset:
        found.pop(name, None)
    return {**found, **(settings or {})}


def rank_variables(
    backend: str,
    rank: int,
    size: int,
    *,
    local_rank: int | None = None,
    local_size: int | None = None,
) -> dict[str, str]:
    """Return what says which rank it is, whatever else its backend needs.

    Args:
        backend: In which the ranks meet.
        rank: The rank, ``0 <= rank < size``.
        size: Number of ranks.
        local_rank: Its number on this machine; the same as ``rank`` if it is not given.
        local_size: Number of ranks on this machine; ``size`` if it is not given.
    """
    prefix = f"COBRE_{backend.upper()}"
    return {
        f"{prefix}_RANK": str(rank),
        f"{prefix}_SIZE": str(size),
        # Scripts written for other launchers read these.
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank if local_rank is None else local_rank),
        "LOCAL_WORLD_SIZE": str(size if local_size is None else local_size),
    }
