"""What the mpi backend adds to mpi4py, and where its reductions change their way.

    scripts/mpi openmpi 2 bench/mpi_cost.py [switch]

Every line compares two things in one run, in rounds that alternate; shown are the medians over
the rounds of the slowest rank's time, and the median of the rounds' ratios.

Without an argument: our call against the bare call of mpi4py that does the same, and the price of
determinism: our reduction in rank order against MPI's own. With ``switch``: a reduction in one
step against one in three, which tells SMALL_BYTES.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from cobre_shm import MpiConfig, create_communicator

WORLD = MPI.COMM_WORLD
ROUNDS = 9
SIZES = (8, 1 << 10, 1 << 16, 1 << 20, 1 << 24)


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Time of one call on the slowest rank."""
    WORLD.Barrier()
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return WORLD.allreduce((time.perf_counter() - begin) / repeat, MPI.MAX)


def compare(name: str, nbytes: int, ours: Callable[[], object], bare: Callable[[], object]) -> None:
    """Print one line."""
    repeat = max(1, WORLD.bcast(int(0.02 / max(seconds(bare, 3), 1e-6))))
    pairs = []
    for turn in range(ROUNDS):
        if turn % 2:
            first = seconds(ours, repeat)
            pairs.append((first, seconds(bare, repeat)))
        else:
            first = seconds(bare, repeat)
            pairs.append((seconds(ours, repeat), first))
    if WORLD.Get_rank() == 0:
        left, right = (statistics.median(times) * 1e6 for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        more = statistics.median(a - b for a, b in pairs) * 1e6
        print(
            f"| {name} | {nbytes} | {left:.2f} | {right:.2f} | {ratio:.3f} | {more:+.2f} |",
            flush=True,
        )


def heading(left: str, right: str) -> None:
    if WORLD.Get_rank() == 0:
        print(MPI.Get_library_version().split("\n")[0], f"{WORLD.Get_size()} ranks")
        print(f"| | bytes | {left} us | {right} us | ratio | difference us |")
        print("| --- | --- | --- | --- | --- | --- |")


def cost_of_layer() -> None:
    size = WORLD.Get_size()
    bare = WORLD.Dup()
    exact = create_communicator(MpiConfig(hierarchical=False))
    fast = create_communicator(MpiConfig(hierarchical=False, deterministic=False))
    heading("ours", "mpi4py")
    compare("barrier", 0, exact.barrier, bare.Barrier)
    for nbytes in SIZES:
        a = np.ones(nbytes // 8)
        b = np.empty_like(a)
        counts = [nbytes // 8] * size
        displs = [rank * (nbytes // 8) for rank in range(size)]
        every = np.ones(size * (nbytes // 8))
        message = [every, (counts, displs), MPI.DOUBLE]
        compare("broadcast", nbytes, lambda a=a: exact.broadcast(a), lambda a=a: bare.Bcast(a))
        compare(
            "allgatherv",
            nbytes,
            lambda a=a, every=every, c=counts, d=displs: exact.allgatherv(a, every, c, d),
            lambda a=a, message=message: bare.Allgatherv(a, message),
        )
        compare(
            "allreduce, MPI's own",
            nbytes,
            lambda a=a, b=b: fast.allreduce(a, b),
            lambda a=a, b=b: bare.Allreduce(a, b),
        )
    heading("in rank order", "MPI's own")
    for nbytes in SIZES:
        a = np.ones(nbytes // 8)
        b = np.empty_like(a)
        compare(
            "allreduce",
            nbytes,
            lambda a=a, b=b: exact.allreduce(a, b),
            lambda a=a, b=b: fast.allreduce(a, b),
        )


def switch_point() -> None:
    one = create_communicator(MpiConfig(hierarchical=False))
    three = create_communicator(MpiConfig(hierarchical=False))
    one._flat.small_bytes, three._flat.small_bytes = 1 << 62, 0
    one._direct = three._direct = None
    heading("one step", "three steps")
    for shift in range(10, 21):
        a = np.ones(1 << (shift - 3))
        b = np.empty_like(a)
        compare(
            "allreduce",
            a.nbytes,
            lambda a=a, b=b: one.allreduce(a, b),
            lambda a=a, b=b: three.allreduce(a, b),
        )


if __name__ == "__main__":
    switch_point() if "switch" in sys.argv else cost_of_layer()
