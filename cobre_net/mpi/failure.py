"""From an error of MPI to an error of ours: the one place."""

from __future__ import annotations

import copy
from typing import Any

from cobre_net.mpi.library import MPI
from cobre_shm.errors import CollectiveFailed

__all__ = ["failed", "of_node"]


def failed(error: Any, rank: int) -> CollectiveFailed:
    """Return what stands for an ``MPI.Exception``: the group is lost.

    MPI does not say what became of a collective that failed, nor which rank was the cause.
    """
    code, kind = error.Get_error_code(), error.Get_error_class()
    return CollectiveFailed(
        f"MPI failed on rank {rank}: {error.Get_error_string()}",
        context={
            "backend": "mpi",
            "rank": rank,
            "mpi_error_class": kind,
            "mpi_error_class_name": _NAMES.get(kind, "unknown"),
            "mpi_error_code": code,
        },
    )


def of_node(error: CollectiveFailed, first: int, size: int) -> CollectiveFailed:
    """Return what stands for a failure of a node's group, whose ranks begin at ``first``."""
    mine: Any = copy.copy(error)
    mine.context = dict(error.context)
    mine.message = (
        f"Within the node of ranks {first} to {first + size - 1}, counted from 0: {error.message}"
    )
    mine.args = (mine.message,)
    if hasattr(mine, "rank"):
        mine.rank = mine.context["rank"] = first + mine.rank
    if hasattr(mine, "missing_ranks"):
        mine.missing_ranks = [first + rank for rank in mine.missing_ranks]
        mine.context["missing_ranks"] = list(mine.missing_ranks)
    failure: CollectiveFailed = mine
    return failure


_NAMES = {
    getattr(MPI, name): name
    for name in dir(MPI)
    if name.startswith("ERR_") and isinstance(getattr(MPI, name), int)
}
