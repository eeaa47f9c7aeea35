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
    # Only the checks that need gigabytes, on one level and on two.
    "huge flat": {"hierarchical": False},
    "huge two": {"hierarchical": True, "node": min(RANK, 1)},
}
# Libraries that spin need milliseconds for a collective when ranks share a core.
OPERATIONS = 10_000 if SIZE <= 2 else 400

name = check_mixed_collectives_random_order.__name__
shorter = functools.partial(check_mixed_collectives_random_order, operations=OPERATIONS)
object.__setattr__(CHECKS[name], "function", shorter)
way = sys.argv[1]
is_huge = way.startswith("huge")
for check in list(CHECKS.values()):
    if (way == "plain" and check.topic == "mismatch") or (is_huge and not check.huge):
        del CHECKS[check.name]
names = run_all(lambda: create_communicator(MpiConfig(**WAYS[way])), huge=is_huge)
if RANK == 0:
    print("checked", len(names), "checks")
