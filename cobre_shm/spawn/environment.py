"""What a rank finds in its environment."""

from __future__ import annotations

from collections.abc import Mapping

from cobre_shm.selection.launchers import LAUNCHER_VARIABLES

__all__ = ["rank_environment"]

# Any of these makes backend detection think of an MPI launch. A batch shell of Slurm has one,
# and so has a launcher started under mpiexec, but the ranks started here are none of theirs.
_FOREIGN = LAUNCHER_VARIABLES
_FOREIGN_PREFIX = "COBRE_TCP_"

_DEFAULTS = {
    # N ranks with a pool of all CPUs each would fight for them.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    # A crash in native code shows the Python stack.
    "PYTHONFAULTHANDLER": "1",
    # Standard output is a pipe, where lines would otherwise stay back until a block is full.
    "PYTHONUNBUFFERED": "1",
}


def rank_environment(base: Mapping[str, str], name: str, rank: int, size: int) -> dict[str, str]:
    """Return the environment of one rank.

    Args:
        base: The launcher's own environment; what the user set there wins over the defaults.
        name: Name of the shared memory segment, or ``fd:N`` for an inherited descriptor.
        rank: The rank, ``0 <= rank < size``.
        size: Number of ranks.
    """
    kept = {
        key: value
        for key, value in base.items()
        if key not in _FOREIGN and not key.startswith(_FOREIGN_PREFIX)
    }
    return {
        **_DEFAULTS,
        **kept,
        "COBRE_COMM_BACKEND": "shm",
        "COBRE_SHM_NAME": name,
        "COBRE_SHM_RANK": str(rank),
        "COBRE_SHM_SIZE": str(size),
        # Scripts written for other launchers read these.
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
    }
