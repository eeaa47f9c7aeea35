"""Times the collectives of one library in one launch; ``bench/peers.py`` runs it for each.

    python bench/collectives.py --peer shm|shm-shared|mpi|gloo --seconds 0.03 --out FILE

Every rank runs it. Rank 0 writes one JSON object: for each operation and payload the microseconds
per call of every batch. What is measured is a loop of "change the send buffer, call", minus the
same loop without the call; so caches see what they see in a program, and the cost of the change is
not charged to anybody. Sources are written before they are sent (pages that nobody wrote are all
the same zero page), destinations are touched before they are received into.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

KIB, MIB = 1 << 10, 1 << 20
PAYLOADS = (8, 48, KIB, 8 * KIB, 64 * KIB, 256 * KIB, MIB, 3_200_000, 16 * MIB, 64 * MIB)
BATCHES = 5
# Above this the whole send buffer is changed, below one element.
WHOLE_BYTES = 16 * KIB


class Shm:
    """This library; ``shared`` takes shared arrays, and the shared result for allreduce."""

    def __init__(self, shared):
        from cobre_shm import create_communicator

        self.comm = create_communicator()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.shared = shared

    def array(self, count):
        array = self.comm.empty(count) if self.shared else np.empty(count)
        array[:] = self.rank + 1.5
        return array

    def calls(self, send, recv, counts, displs):
        comm = self.comm
        reduce = comm.allreduce_shared if self.shared else comm.allreduce
        args = (send,) if self.shared else (send, recv[: send.size])
        block = send[: counts[self.rank]]
        return {
            "allreduce": (reduce, args),
            "allgatherv": (comm.allgatherv, (block, recv, counts, displs)),
            "broadcast": (comm.broadcast, (send,)),
            "barrier": (comm.barrier, ()),
        }

    def close(self):
        self.comm.close()


class Mpi:
    """Any MPI, through mpi4py."""

    def __init__(self):
        from mpi4py import MPI

        self.mpi = MPI
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()

    def array(self, count):
        return np.full(count, self.rank + 1.5)

    def calls(self, send, recv, counts, displs):
        comm = self.comm
        gathered = [recv, (counts, displs), self.mpi.DOUBLE]
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

    def __init__(self):
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        self.torch, self.dist = torch, torch.distributed
        self.dist.init_process_group("gloo")
        self.rank, self.size = self.dist.get_rank(), self.dist.get_world_size()

    def array(self, count):
        return np.full(count, self.rank + 1.5)

    def calls(self, send, recv, counts, displs):
        tensor = self.torch.from_numpy(send)
        blocks = list(self.torch.from_numpy(recv[: counts.sum()]).chunk(self.size))
        block = tensor[: counts[self.rank]]
        return {
            "allreduce": (self.dist.all_reduce, (tensor,)),
            "allgatherv": (self.dist.all_gather, (blocks, block)),
            "broadcast": (self.dist.broadcast, (tensor, 0)),
            "barrier": (self.dist.barrier, ()),
        }

    def close(self):
        self.dist.destroy_process_group()


def changer(send):
    """Return what changes the send buffer before each call."""
    if send.nbytes > WHOLE_BYTES:
        # Small steps, so that sums over many calls stay finite.
        return lambda: np.multiply(send, 1.0000001, out=send)

    def change():
        send[0] = 1.25

    return change


def loop(change, call, args, turns):
    begun = time.perf_counter_ns()
    for _ in range(turns):
        change()
        call(*args)
    return (time.perf_counter_ns() - begun) / turns / 1000


def nothing(*_):
    pass


def measure(library, change, call, args, seconds):
    """Return the microseconds per call of each batch, on this rank."""
    barrier, none = library.calls_barrier
    barrier(*none)
    first = loop(change, call, args, 3)
    # All ranks must do the same number of turns: rank 0 says how many.
    turns = library.agree(max(3, min(20_000, int(seconds * 1e6 / max(first, 0.05)))))
    loop(change, call, args, turns)
    found = []
    for _ in range(BATCHES):
        barrier(*none)
        with_call = loop(change, call, args, turns)
        barrier(*none)
        found.append(with_call - loop(change, nothing, args, turns))
    return found


def agreement(library):
    value = np.zeros(1)
    broadcast, args = library.calls(value, np.zeros(library.size), *packed(library.size, 1))[
        "broadcast"
    ]

    def agree(number):
        value[0] = number
        broadcast(*args)
        return int(value[0])

    return agree


def packed(size, total):
    """Counts and displacements of ``total`` elements over ``size`` ranks."""
    counts = np.full(size, max(1, total // size), dtype=np.int64)
    return counts, np.arange(size, dtype=np.int64) * counts[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=("shm", "shm-shared", "mpi", "gloo"), required=True)
    parser.add_argument("--seconds", type=float, default=0.03, help="of each batch")
    parser.add_argument("--largest", type=int, default=PAYLOADS[-1], help="payload in bytes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    library = {"mpi": Mpi, "gloo": Gloo}.get(args.peer, lambda: Shm(args.peer == "shm-shared"))()
    # A core for each rank where there are enough, as every MPI here binds by default.
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[library.rank % len(cpus)]})
    library.agree = agreement(library)
    library.calls_barrier = library.calls(
        np.ones(1), np.ones(library.size), *packed(library.size, 1)
    )["barrier"]
    results = {}
    barrier, none = library.calls_barrier
    results["barrier 0"] = measure(library, nothing, barrier, none, args.seconds)
    for payload in PAYLOADS:
        if payload > args.largest:
            continue
        count = payload // 8
        send = library.array(count)
        recv = library.array(max(count, library.size))
        for operation, (call, arguments) in library.calls(
            send, recv, *packed(library.size, count)
        ).items():
            if operation != "barrier":
                key = f"{operation} {payload}"
                results[key] = measure(library, changer(send), call, arguments, args.seconds)
        del send, recv
    if library.rank == 0:
        args.out.write_text(json.dumps(results))
    library.close()


if __name__ == "__main__":
    main()
