"""What programs have in common whose functions ``check_*`` all ranks run, one after the other."""

import numpy as np
from mpi4py import MPI

from cobre_shm import MpiConfig, create_communicator

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.Get_rank(), WORLD.Get_size()
rng = np.random.default_rng(7)
BLOCKS = [rng.normal(size=300_000) * 10.0 ** rng.integers(-9, 9, 300_000) for _ in range(SIZE)]


def make(**settings):
    return create_communicator(MpiConfig(**settings))


def in_rank_order(blocks):
    total = blocks[0].copy()
    for block in blocks[1:]:
        total += block
    return total


def run_checks(names):
    """Run the checks of a program in the order in which they stand; say that it has come so far."""
    for name, check in list(names.items()):
        if name.startswith("check_"):
            check()
            WORLD.Barrier()
    if RANK == 0:
        print("done")
