"""Rank 3 of two nodes raises in its block; prints what rank 2 of the same node hears, twice."""

import numpy as np
from mpi4py import MPI

from cobre_net.mpi.ending import flush
from cobre_shm import MpiConfig, RankFailed, create_communicator

world = MPI.COMM_WORLD
me = world.Get_rank()
try:
    with create_communicator(MpiConfig(node=me // 2)) as comm:
        ones = np.ones(4)
        comm.allreduce(ones)
        if me == 3:
            raise LookupError("the cause")
        try:
            while True:
                comm.allreduce(ones)
        except RankFailed as error:
            cause = "raised the cause" if "LookupError: the cause" in str(error) else str(error)
            try:
                comm.barrier()
            except RankFailed:
                print(f"rank {me}: RankFailed of {error.rank}, {cause}, again at once")
                flush()
                world.send(None, 3)
            raise
except LookupError:
    # The job ends with this process: not before rank 2 has said what it heard.
    world.recv(source=2)
    raise
