"""Communicators that do not come into being, or are lost by this rank's own exception."""

import os
import sys

import numpy as np

from cobre_net.mpi import membership
from cobre_net.mpi.library import MPI
from cobre_shm import CollectiveFailed, InitializationFailed, MpiConfig, create_communicator

way, rank = sys.argv[1], MPI.COMM_WORLD.Get_rank()

if way in ("hierarchical", "check", "deterministic"):
    own = {way: rank != 1}
    if way != "hierarchical":
        own["hierarchical"] = False
    try:
        create_communicator(MpiConfig(**own))
    except InitializationFailed as error:
        print(f"rank {rank}: {error.message}", flush=True)
    create_communicator(MpiConfig(hierarchical=False)).barrier()

if way == "alone":

    def refuse(_):
        raise MemoryError("of rank 1")

    if rank == 1:
        membership.duplicate = refuse
    create_communicator(MpiConfig(hierarchical=False))

if way == "interrupted":
    comm = create_communicator(MpiConfig(hierarchical=False))

    def interrupt(*_):
        raise KeyboardInterrupt

    comm._engine.allreduce = interrupt
    # Longer than what the fast road takes.
    send = np.ones(1 << 20)
    caught = []
    for _ in range(2):
        try:
            comm.allreduce(send)
        except (KeyboardInterrupt, CollectiveFailed) as error:
            caught.append(type(error).__name__)
    try:
        comm.barrier()
    except CollectiveFailed as error:
        caught.append(error.message)
    print(f"rank {rank}: {', '.join(caught)}", flush=True)
    comm.close()

if way == "fork":
    comm = create_communicator(MpiConfig(hierarchical=False))
    child = os.fork()
    if child == 0:
        try:
            comm.abort(5)
        except SystemExit as error:
            os._exit(40 + error.code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    comm.barrier()
    print(f"rank {rank}: {status}", flush=True)
