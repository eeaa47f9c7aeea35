"""Kill a rank at each named place; run as a program, so that the places are compiled in.

python -m tests.faults.failpoints_run TIMES SIZE...

Prints one JSON line per case: the place, and what became of each rank. Failpoints have to be
enabled before the kernels are compiled, that is, in the environment of this process.
"""

import atexit
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cobre_shm import failpoints, layout
from cobre_shm.errors import CobreError
from cobre_shm.segment.process import is_alive
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.support.ranks import RankGroup

# Elements of each payload, and the switch points that lead an allreduce of them that way.
_NEVER = 1 << 62
ALGORITHMS = {
    # Several rounds.
    "scatter": (80_000, {"chain_min_bytes": _NEVER, "stream_bytes": _NEVER, "read_bytes": _NEVER}),
    "chain": (40_000, {"direct_bytes": 0, "chain_min_bytes": 1, "chain_chunk": 65536}),
    "streaming": (40_000, {"chain_min_bytes": _NEVER, "stream_bytes": 0, "stream_ranks": 64}),
    "direct": (500, {"direct_bytes": 4096}),
    "inline": (1, {}),
    "reading": (40_000, {"read_bytes": 64}),
}
# Not adapted to so little that a waiting rank spins no more.
_SPIN_PAUSES = 1 << 16

BEFORE_MEETING = ("begin", "create", "ready", "claimed", "attached")
JOINING = (*BEFORE_MEETING, "joined")
REGIONS = ("region_create", "region_mapped", "region_close")
# Only rank 0 comes to these.
OF_RANK_ZERO = ("create", "ready", "joined", "region_create")
# Sequence numbers of the collectives of `work` in which a rank comes to a place.
IN_COLLECTIVE = {
    "idle": (1, 4),
    "copy_in": (2, 3, 4),
    "publish": (1, 2, 3, 4),
    "sleep": (5,),
    "reduce": (2,),
    "copy_out": (2, 3, 4),
    "done": (4,),
}

# Places in the allreduce, which has sequence 2, of the other algorithms. In a chain rank 0 copies
# in, the others reduce, and all but the last copy out.
IN_ALLREDUCE = {
    "chain": {"first": ("copy_in", "copy_out"), "last": ("reduce",)},
    "streaming": dict.fromkeys(("first", "last"), ("copy_in", "reduce", "copy_out")),
    "direct": dict.fromkeys(("first", "last"), ("copy_in", "reduce")),
    "inline": dict.fromkeys(("first", "last"), ("copy_in", "reduce")),
    # What it has not read yet is gone with the victim.
    "reading": dict.fromkeys(("first", "last"), ("publish", "reduce", "copy_out")),
}


class Join:
    def __init__(self, name, rank, size, place, tuning):
        directive = failpoints.parse(place)
        phase, victim = failpoints.PHASES[directive.phase], directive.rank
        seconds = 30.0
        # Where nobody has met the victim, time alone tells that it does not come.
        if victim == 0 and phase in BEFORE_MEETING:
            seconds = 3.0
        elif phase == "begin":
            # Longer, as who is late then counts as missing too.
            seconds = 8.0
        self.config = ShmConfig(
            name=name, rank=rank, size=size, timeout_secs=seconds, tuning=str(tuning)
        )
        self.place = place

    def __call__(self):
        failpoints.arm(self.place)
        return ShmCommunicator(self.config)


def work(comm, victim, phase, elements):
    """Five collectives and a region; return what ended it, or None."""
    send, recv = np.ones(elements), np.empty(elements)
    try:
        comm.barrier()
        comm.allreduce(send, recv)
        comm.broadcast(recv, comm.size - 1 - victim if comm.size > 1 else 0)
        comm.allgatherv(send, counts=[elements] * comm.size)
        if phase in ("spin", "sleep") and comm.rank != victim:
            wait_until_dead(comm._segment, victim)
        comm.barrier()
        with comm.create_shared_region(10):
            pass
        if phase == "exit" and comm.rank == victim:
            # As at the end of a program that has not closed its communicator.
            atexit._run_exitfuncs()
        comm.barrier()
    except CobreError as error:
        return {**facts(error), "regions": comm._segment.region_prefix}
    return None


def wait_until_dead(segment, rank):
    """So that the victim has somebody to wait for."""
    load = segment.words.load
    pid, start = (load(segment.control(rank) + word) for word in (layout.PID, layout.START))
    deadline = time.monotonic() + 20
    while is_alive(pid, start) and time.monotonic() < deadline:
        time.sleep(0.001)


def facts(error):
    return {"type": type(error).__name__, "message": str(error), **error.context}


def run_case(folder, size, phase, victim, sequence, algorithm="scatter"):
    place = f"{phase}:kill@{victim},{sequence}"
    name = Segment.random_name()
    elements, switch_points = ALGORITHMS[algorithm]
    tuning = folder / algorithm
    tuning.write_text(json.dumps({"spin_pauses": _SPIN_PAUSES, **switch_points}))
    joins = [Join(name, rank, size, place, tuning) for rank in range(size)]
    with RankGroup(joins, work, (victim, phase, elements)) as group:
        outcomes = group.outcomes(40)
    ranks = [
        {
            "pid": outcome.pid,
            "signal": outcome.signal,
            "told": outcome.result
            or (facts(outcome.error) if isinstance(outcome.error, CobreError) else None),
            "traceback": outcome.traceback,
        }
        for outcome in outcomes
    ]
    case = {
        "place": place,
        "algorithm": algorithm,
        "name": name,
        "size": size,
        "victim": victim,
        "ranks": ranks,
    }
    print(json.dumps(case), flush=True)


def cases(sizes):
    for size in sizes:
        for victim in (0, size - 1):
            for phase in (*JOINING, *REGIONS, "close", "exit"):
                if victim == 0 or phase not in OF_RANK_ZERO:
                    yield size, phase, victim, 0
            for phase, sequences in IN_COLLECTIVE.items():
                for sequence in sequences:
                    # In a broadcast the root copies in and the others copy out.
                    if sequence == 3 and (phase == "copy_in") != (size - 1 - victim == victim):
                        continue
                    yield size, phase, victim, sequence
            for algorithm, places in IN_ALLREDUCE.items():
                for phase in places["first" if victim == 0 else "last"]:
                    yield size, phase, victim, 2, algorithm
    yield 2, "spin", 1, 5


if __name__ == "__main__":
    times, *sizes = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times):
            for case in cases(sizes):
                run_case(Path(folder), *case)
