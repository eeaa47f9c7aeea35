"""The functions that images hold: names, numbers of arguments, and how images are called."""

from __future__ import annotations

__all__ = ["CORE", "FUNCTIONS", "KERNELS", "MPI_FUNCTIONS", "MPI_ROAD"]

CORE = "core"
"""The image that holds ``KERNELS`` and ``FUNCTIONS``."""

MPI_ROAD = "mpi_road"
"""The image that holds ``MPI_FUNCTIONS``: only a run under MPI loads it."""

KERNELS = {
    "barrier": 3,
    "broadcast": 6,
    "allreduce_common": 7,
    "allgatherv": 8,
    "allreduce": 7,
    "claim": 0,
}
"""Collectives: their arguments follow ``context`` and ``resume``, first the three call words what,
tag and count, then the operation's own."""

FUNCTIONS = {
    "barrier_call": 2,
    "broadcast_call": 4,
    "allreduce_call": 4,
    "allgatherv_call": 4,
    "allreduce_shared_call": 4,
    "plan_call": 2,
    "call_back": 4,
    "raise_kept": 1,
    "reduce_rows": 7,
}
"""Functions of 64-bit integers: methods for CPython, METH_NOARGS and METH_FASTCALL | METH_KEYWORDS
(``kernels/road.py``), the ways from jitted code to Python
(``kernels/abandoning.py``), and the reduction of rows."""

MPI_FUNCTIONS = {
    "barrier_call": 2,
    "broadcast_call": 4,
    "allreduce_call": 4,
    "allgatherv_call": 4,
}
"""Methods for CPython, as those of ``FUNCTIONS`` (``kernels/mpi_road.py``)."""
