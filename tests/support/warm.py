"""Imported by the server that ranks are forked from: what all of them need, done once."""

from __future__ import annotations

import numpy as np

from cobre_shm.testing.conformance.payloads import reductions
from tests.support.backends import BACKENDS, why_missing

if why_missing("shm") is None:
    # Loads the compiled kernels, or compiles them.
    (connect,) = BACKENDS["shm"].make_group(1, 10.0)
    with connect() as comm:
        comm.barrier()
        comm.broadcast(np.zeros(2))
        comm.allgatherv(np.zeros(2))
        for dtype, op in reductions():
            comm.allreduce(np.zeros(2, dtype), op=op)
