"""Times the collectives of one library in one launch; ``bench/peers.py`` runs it for each.

    python bench/collectives.py --library shm|shm-plan|shm-shared|mpi|gloo --out FILE
        [--operations barrier,allreduce] [--payloads 8,1048576] [--seconds 0.02]

Every rank runs it. Rank 0 writes one JSON object: the library's version, and for each operation and
payload the microseconds per turn of every batch, and quantiles of single calls.

A batch is a loop of "change the send buffer, call", then a barrier (``whole``); taken in turns with
the same without the call (``work``). The difference of their medians is the time of a call. The
traps, and what is done about each:

- *Zero pages.* Memory that nobody wrote is one page of zeros, and reading it costs nothing. Sources
  are filled with numbers, destinations are touched, before anything is timed.
- *Unchanged sources.* A send buffer that stays as it is stays in the caches of who has read it.
  Here it is changed before each call (all of it, from 16 KiB on), and the change is not charged.
- *Shared cores.* Four ranks on a core change four buffers before any of them can go on. So the loop
  without the call is run by all ranks at once too, and ends with a barrier.
- *Broadcast measures throughput.* A root that runs ahead looks fast; the barrier at the end of a
  batch is inside the time, so that all data have arrived, but the calls of a batch overlap.
  ``broadcast_once`` is a broadcast and a barrier, which tells what one of them takes.
- *Reading.* Not charged: what a program pays to read a result that another core has written. It is
  more with ``shm-shared``, whose result is not copied to its readers.
- *Clocks.* Quantiles come from calls that are timed one by one, in a loop of their own, less the
  cost of looking at the clock; batches tell the averages, which are what ratios are made of.

The payload of an allgatherv is that of all ranks together, as it arrives. Each rank is bound to one
core, rank r to core r modulo their number, whatever the library would have done.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

PAYLOADS = (8, 48, 1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20, 3_200_000, 16 << 20)
LARGE_PAYLOADS = (64 << 20, 206_000_000)
OPERATIONS = ("barrier", "allreduce", "allgatherv", "broadcast")
MORE_OPERATIONS = ("broadcast_once",)
BATCHES = 5
MOST_TURNS = 20_000
SINGLE_CALLS = 2000
# From here on the whole send buffer is changed, below one element.
WHOLE_BYTES = 16 << 10


class Shm:
    """This library: its methods, its plans, or shared arrays and the shared result."""

    def __init__(self, kind):
        import cobre_shm

        self.comm = cobre_shm.create_communicator()
        self.rank, self.size, self.kind = self.comm.rank, self.comm.size, kind
        self.version = f"cobre-shm {cobre_shm.__version__}, {self.comm.backend}"

    def array(self, count):
        array = self.comm.empty(count) if self.kind == "shm-shared" else np.empty(count)
        array[:] = self.rank + 1.5
        return array

    def calls(self, send, recv, counts, displs):
        comm, block = self.comm, send[: counts[self.rank]]
        if self.kind == "shm-plan":
            return {
                "allreduce": (comm.allreduce_init(send, recv[: send.size]), ()),
                "allgatherv": (comm.allgatherv_init(block, recv, counts, displs), ()),
                "broadcast": (comm.broadcast_init(send), ()),
                "barrier": (comm.barrier_init(), ()),
            }
        reduce, more = comm.allreduce, (recv[: send.size],)
        if self.kind == "shm-shared":
            reduce, more = comm.allreduce_shared, ()
        return {
            "allreduce": (reduce, (send, *more)),
            "allgatherv": (comm.allgatherv, (block, recv, counts, displs)),
            "broadcast": (comm.broadcast, (send,)),
            "barrier": (comm.barrier, ()),
        }

    def close(self):
        self.comm.close()


class Mpi:
    """Any MPI, through mpi4py."""

    def __init__(self, _):
        from mpi4py import MPI

        self.mpi = MPI
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        first_line = MPI.Get_library_version().splitlines()[0]
        self.version = " ".join(first_line.split(",")[0].split())

    def array(self, count):
        return np.full(count, self.rank + 1.5)

    def calls(self, send, recv, counts, displs):
        comm = self.comm
        # As tuples: mpi4py converts arrays of int64 first, which takes it up to 0.5 us.
        gathered = [recv, (tuple(counts.tolist()), tuple(displs.tolist())), self.mpi.DOUBLE]
        block = send[: counts[self.rank]]
        return {
            "allreduce": (comm.Allreduce, (send, recv[: send.size])),
            "allgatherv": (comm.Allgatherv, (block, gathered)),
            "broadcast": (comm.Bcast, (send,)),
            "barrier": (comm.Barrier, ()),
        }

    def close(self):
        self.mpi.Finalize()


class Gloo:
    """torch.distributed over Gloo; it reduces in place."""

    def __init__(self, _):
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        self.torch, self.dist = torch, torch.distributed
        self.dist.init_process_group("gloo")
        self.rank, self.size = self.dist.get_rank(), self.dist.get_world_size()
        self.version = f"torch {torch.__version__}"

    def array(self, count):
        return np.full(count, self.rank + 1.5)

    def calls(self, send, recv, counts, displs):
        tensor = self.torch.from_numpy(send)
        blocks = list(self.torch.from_numpy(recv[: counts.sum()]).chunk(self.size))
        return {
            "allreduce": (self.dist.all_reduce, (tensor,)),
            "allgatherv": (self.dist.all_gather, (blocks, tensor[: counts[self.rank]])),
            "broadcast": (self.dist.broadcast, (tensor, 0)),
            "barrier": (self.dist.barrier, ()),
        }

    def close(self):
        self.dist.destroy_process_group()


LIBRARIES = {"shm": Shm, "shm-plan": Shm, "shm-shared": Shm, "mpi": Mpi, "gloo": Gloo}


def changer(send):
    """Return what changes the send buffer before each call."""
    if send.nbytes > WHOLE_BYTES:
        # Small steps, so that sums over many calls stay finite.
        return lambda: np.multiply(send, 1.0000001, out=send)

    def change():
        send[0] = 1.25

    return change


def nothing():
    """Change nothing; a barrier has no buffer."""


class Meter:
    """Times calls on all ranks of a library at once."""

    def __init__(self, library, seconds):
        self._seconds = seconds
        one = np.zeros(1), np.zeros(library.size), *packed(library.size, 1)
        calls = library.calls(*one)
        self._turns = one[0]
        self._barrier, self._none = calls["barrier"]
        self._broadcast, self._buffer = calls["broadcast"]

    def measure(self, change, call, args):
        """Return microseconds per turn of each batch, with and without the call, and quantiles."""
        first = self._with_call(change, call, args, 3)
        turns = self._agree(max(2, min(MOST_TURNS, int(self._seconds * 1e6 / max(first, 0.05)))))
        self._with_call(change, call, args, turns)
        whole, work = [], []
        for _ in range(BATCHES):
            whole.append(self._with_call(change, call, args, turns))
            work.append(self._without_call(change, turns))
        return {"whole": whole, "work": work, **self._single_calls(change, call, args, turns)}

    def _agree(self, turns):
        """Return what rank 0 says: all ranks must do the same number of turns."""
        self._turns[0] = turns
        self._broadcast(*self._buffer)
        return int(self._turns[0])

    def _with_call(self, change, call, args, turns):
        self._barrier(*self._none)
        begun = time.perf_counter_ns()
        for _ in range(turns):
            change()
            call(*args)
        self._barrier(*self._none)
        return (time.perf_counter_ns() - begun) / turns / 1000

    def _without_call(self, change, turns):
        self._barrier(*self._none)
        begun = time.perf_counter_ns()
        for _ in range(turns):
            change()
        self._barrier(*self._none)
        return (time.perf_counter_ns() - begun) / turns / 1000

    def _single_calls(self, change, call, args, turns):
        clock = time.perf_counter_ns
        looks = sorted(-clock() + clock() for _ in range(200))
        times = []
        self._barrier(*self._none)
        for _ in range(min(SINGLE_CALLS, turns)):
            change()
            begun = clock()
            call(*args)
            times.append(clock() - begun)
        times.sort()
        look = looks[len(looks) // 2]
        chosen = {"min": 0, "median": len(times) // 2, "p99": len(times) * 99 // 100}
        return {name: max(0, times[at] - look) / 1000 for name, at in chosen.items()}


def packed(size, total):
    """Counts and displacements of ``total`` elements over ``size`` ranks."""
    counts = np.full(size, max(1, total // size), dtype=np.int64)
    return counts, np.arange(size, dtype=np.int64) * counts[0]


def with_barrier(calls):
    """Return a call of a broadcast and a barrier."""
    broadcast, buffer = calls["broadcast"]
    barrier, none = calls["barrier"]

    def both():
        broadcast(*buffer)
        barrier(*none)

    return both, ()


def bind_to_core(rank):
    """Bind this process, with its threads to come, to one core."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[rank % len(cpus)]})


def measure_all(library, operations, payloads, seconds):
    """Return what was measured, by "operation payload"."""
    meter, results = Meter(library, seconds), {}
    if "barrier" in operations:
        one = np.zeros(1), np.zeros(library.size), *packed(library.size, 1)
        results["barrier 0"] = meter.measure(nothing, *library.calls(*one)["barrier"])
    for payload in payloads:
        count = payload // 8
        send, recv = library.array(count), library.array(max(count, library.size))
        calls = library.calls(send, recv, *packed(library.size, count))
        calls["broadcast_once"] = with_barrier(calls)
        for operation in operations:
            if operation != "barrier":
                found = meter.measure(changer(send), *calls[operation])
                results[f"{operation} {payload}"] = found
        del send, recv, calls
    return results


def words(text):
    """Split a list of the command line."""
    return [word for word in text.split(",") if word]


def main():
    """Measure, and let rank 0 write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--operations", type=words, default=list(OPERATIONS))
    parser.add_argument("--payloads", type=words, default=[str(p) for p in PAYLOADS])
    parser.add_argument("--seconds", type=float, default=0.02, help="of each batch")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    library = LIBRARIES[args.library](args.library)
    bind_to_core(library.rank)
    results = measure_all(library, args.operations, list(map(int, args.payloads)), args.seconds)
    if library.rank == 0:
        report = {"version": library.version, "measured": results}
        args.out.write_text(json.dumps(report))
    library.close()


if __name__ == "__main__":
    main()
