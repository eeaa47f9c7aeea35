"""Ranks that give up the processor at random places of the protocol; run as a program.

COBRE_FAIL=on python -m tests.stress.yielding_run SIZE TURNS SEED

Prints how often each rank did. In a process of its own, for the places must be compiled in.
"""

import sys

from cobre_shm import failpoints
from cobre_shm.kernels import context
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.stress.test_exchange import same_turns, sums_of_turns
from tests.support.ranks import RankGroup, results_of


class Join:
    def __init__(self, name, rank, size, seed):
        self.config = ShmConfig(name=name, rank=rank, size=size, timeout_secs=60.0)
        self.place = f"anywhere:yield@{rank},{seed + rank}"

    def __call__(self):
        failpoints.arm(self.place)
        return ShmCommunicator(self.config)


def work(comm, turns, seed):
    sums_of_turns(comm, turns, seed)
    same_turns(comm, turns, seed)
    return int(comm._context[context.FAIL_YIELDS])


if __name__ == "__main__":
    size, turns, seed = map(int, sys.argv[1:])
    name = Segment.random_name()
    joins = [Join(name, rank, size, seed) for rank in range(size)]
    with RankGroup(joins, work, (turns, seed)) as group:
        print(*results_of(group.outcomes(900.0)))
