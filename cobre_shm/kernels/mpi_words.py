"""Words of the fast road to MPI (``mpi_road.py``), behind those of ``context.py``."""

from __future__ import annotations

from cobre_shm.kernels import context

__all__ = [
    "ALLGATHER",
    "BYTE",
    "CLOSED",
    "COMM",
    "COUNTS",
    "ERROR",
    "IN_PLACE",
    "LENGTHS",
    "LIST_TYPE",
    "METHOD",
    "PIECE_BYTES",
    "ROOM",
    "SMALL_BYTES",
    "WORDS",
]

COMM, BYTE, IN_PLACE = context.WORDS, context.WORDS + 1, context.WORDS + 2
ALLGATHER = context.WORDS + 3  # address of the function
PIECE_BYTES = context.WORDS + 4  # the largest message
SMALL_BYTES = context.WORDS + 5  # operands of all ranks that are gathered to be reduced
ROOM = context.WORDS + 6  # address of memory of SMALL_BYTES
COUNTS = context.WORDS + 7  # address of room for two 64-bit integers per rank
LENGTHS = context.WORDS + 8  # address of room for two 32-bit integers per rank
LIST_TYPE = context.WORDS + 9
ERROR = context.WORDS + 10  # what the last function that failed returned
CLOSED = context.WORDS + 11  # 1: no call may take the road
METHOD = context.WORDS + 12  # 1: a Python method is inside the communicator
WORDS = context.WORDS + 13
