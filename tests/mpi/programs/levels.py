"""Prints how the ranks talk, and what a sum that depends on its order is."""

import numpy as np

from cobre_shm import create_communicator

with create_communicator() as comm:
    # In rank order: 1e16 takes up the ones before it, and loses those behind it.
    total = comm.allreduce(np.array([1e16 if comm.rank == 1 else 1.0]))
    print(f"rank {comm.rank} of {comm.size}, {comm.backend}, {comm.levels}, {total[0]:.17g}")
