"""Ways in which a rank ends. Arguments: which one, and whether flat or with shared memory."""

import os
import sys

import numpy as np

from cobre_net.mpi import ending
from cobre_shm import CobreError, MpiConfig, create_communicator

way, hierarchical = sys.argv[1], sys.argv[2] != "flat"
comm = create_communicator(MpiConfig(hierarchical=hierarchical))
comm.barrier()
print("started", flush=True)
odd = comm.rank == 1
# On a busy machine ranks are seconds apart. Longer where that may not decide, and nobody waits.
ending._ORIGIN_SECS = 60.0
if way == "all_refuse":
    ending._AGREE_SECS = 60.0

if way == "raise" and odd:
    raise LookupError("of rank 1")
if way == "interrupt" and odd:
    raise KeyboardInterrupt
if way == "abort" and odd:
    comm.abort(7)
if way == "kill" and odd:
    os.kill(os.getpid(), 9)
if way == "exit_in_block":
    with comm:
        if odd:
            raise SystemExit(5)
        comm.barrier()
if way in ("caught", "caught_unheard") and odd:
    if way == "caught_unheard":
        sys.stderr.close()
    try:
        with comm:
            raise LookupError("caught further out")
    except LookupError:
        sys.exit(3)
if way == "all_refuse":
    # As when all ranks refuse the same input.
    try:
        with comm:
            raise CobreError("on every rank")
    except CobreError:
        sys.exit(2)
if way == "closed_inside":
    try:
        with comm:
            comm.close()
            raise LookupError("after the end")
    except LookupError:
        sys.exit(0)
if way == "untidy":
    # Nothing is closed, views are held, one rank is far ahead of the others.
    region = comm.create_shared_region(1000)
    view = region.array[3:]
    dropped = comm.create_shared_region(10)
    del dropped
    other = create_communicator(MpiConfig(hierarchical=hierarchical))
    if odd:
        other.close()
    if comm.rank == 0:
        region.close()
    assert (view == 0).all()
    sys.exit(0)
for _ in range(10**9):
    comm.allreduce(np.ones(3))
