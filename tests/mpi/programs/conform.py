"""Every check of the conformance suite. Arguments: how the ranks talk."""

import functools
import sys

from mpi4py import MPI

from cobre_shm import MpiConfig, create_communicator
from cobre_shm.testing.conformance import CHECKS, run_all
from cobre_shm.testing.conformance.sequences import check_mixed_collectives_random_order

RANK, SIZE = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
WAYS = {
    # By the short road, on which nothing compares the ranks' calls.
    "plain": {"hierarchical": False},
    "flat": {"hierarchical": False, "check": True},
    "node": {"hierarchical": True},
    # As if the machine were two: the first half of the ranks, and the others. The suite takes the
    # number of ranks of a node as that of every node.
    "two": {"hierarchical": True, "check": True, "node": 2 * RANK // SIZE},
}
# Libraries that spin need milliseconds for a collective when ranks share a core.
OPERATIONS = 10_000 if SIZE <= 2 else 400

name = check_mixed_collectives_random_order.__name__
shorter = functools.partial(check_mixed_collectives_random_order, operations=OPERATIONS)
object.__setattr__(CHECKS[name], "function", shorter)
if sys.argv[1] == "plain":
    for check in [check for check in CHECKS.values() if check.topic == "mismatch"]:
        del CHECKS[check.name]
names = run_all(lambda: create_communicator(MpiConfig(**WAYS[sys.argv[1]])))
if RANK == 0:
    print("checked", len(names), "checks")
