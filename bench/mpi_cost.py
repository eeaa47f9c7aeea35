"""What the mpi backend adds to mpi4py, what determinism costs, and what shared memory gains.

    scripts/mpi openmpi 2 bench/mpi_cost.py layer|determinism|levels|switch [--rounds N]

Every line compares two things in one run, in rounds that alternate; shown are the medians over
the rounds of the slowest rank's time, the median of the rounds' ratios with its interval (95 %, by
order statistics, so nothing is assumed of the noise), and the median of their differences.

layer        our call, flat, against the bare call of mpi4py that does the same. Ends with 1 if it
             costs more than 0.5 us at 8 bytes, or more than 1 % from 1 MiB on: if the whole
             interval lies beyond, three times.
determinism  our reduction in rank order against MPI's own
levels       ranks of one node in shared memory (hierarchical="auto") against mpi4py, on private
             arrays and on those of comm.empty
switch       a reduction in one step against one in three, which tells SMALL_BYTES
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from mpi4py import MPI
from remeasure import first_within

from cobre_net.mpi import communicator
from cobre_shm import MpiConfig, create_communicator

WORLD = MPI.COMM_WORLD
SIZE = WORLD.Get_size()
SIZES = (8, 1 << 10, 1 << 16, 1 << 20, 1 << 24)
# Of one loop, and of one round of the large ones, whose single call takes longer. Ranks that share
# a core begin a loop milliseconds apart.
LOOP_SECS = 0.01 if len(os.sched_getaffinity(0)) >= SIZE else 0.1
LIMIT_US, LIMIT_RATIO = 0.5, 1.01
SMALL, LARGE = 8, 1 << 20


@dataclass(frozen=True)
class Compared:
    """Medians and intervals of one line; times in microseconds."""

    ours: float
    other: float
    ratio: tuple[float, float, float]
    difference: tuple[float, float, float]


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Time of one call on the slowest rank."""
    WORLD.Barrier()
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return WORLD.allreduce((time.perf_counter() - begin) / repeat, MPI.MAX)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the lower end, the median and the upper end of its interval."""
    ordered = sorted(values)
    # Normal approximation of the binomial distribution of the number of values below the median.
    reach = round(0.98 * len(ordered) ** 0.5)
    middle = len(ordered) // 2
    low, high = max(0, middle - reach), min(len(ordered) - 1, middle + reach)
    return ordered[low], statistics.median(ordered), ordered[high]


def compare(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> Compared:
    """Time two calls in turn."""
    repeat = 3
    for _ in range(2):
        longer = max(seconds(ours, repeat), seconds(other, repeat))
        repeat = max(1, WORLD.bcast(int(LOOP_SECS / max(longer, 1e-6))))
    pairs = []
    for turn in range(rounds):
        first, second = (ours, other) if turn % 2 else (other, ours)
        before, after = seconds(first, repeat), seconds(second, repeat)
        pairs.append((before, after) if turn % 2 else (after, before))
    left, right = (statistics.median(times) * 1e6 for times in zip(*pairs, strict=True))
    return Compared(
        left,
        right,
        interval([a / b for a, b in pairs]),
        interval([(a - b) * 1e6 for a, b in pairs]),
    )


def heading(left: str, right: str) -> None:
    if WORLD.Get_rank() == 0:
        library = " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].split())
        print(f"\n{library}, {SIZE} ranks\n")
        print(f"| | bytes | {left} us | {right} us | ratio (95 %) | difference us |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)


def show(name: str, nbytes: int, found: Compared) -> None:
    if WORLD.Get_rank() == 0:
        low, ratio, high = found.ratio
        print(
            f"| {name} | {nbytes} | {found.ours:.2f} | {found.other:.2f} "
            f"| {ratio:.3f} ({low:.3f}-{high:.3f}) | {found.difference[1]:+.2f} |",
            flush=True,
        )


def mpi4py_allgatherv(
    comm: MPI.Comm, send: np.ndarray, recv: np.ndarray, counts: np.ndarray, displs: np.ndarray
) -> Callable[[], object]:
    # As tuples: mpi4py converts arrays of int64 first, which takes it up to 0.5 us.
    layout = (tuple(counts.tolist()), tuple(displs.tolist()))
    return partial(comm.Allgatherv, send, [recv, layout, MPI.DOUBLE])


def pairs_of_calls(ours, reducing, sizes, new=np.empty):
    """Yield name, bytes, our call and that of mpi4py.

    ``reducing`` is the communicator for allreduce, ``new`` makes the arrays for all of them.
    """
    bare = WORLD.Dup()
    yield "barrier", 0, ours.barrier, bare.Barrier
    for nbytes in sizes:
        count = nbytes // 8
        send, recv, every = new(count), new(count), new(SIZE * count)
        send.fill(1.0)
        every.fill(1.0)
        # Vectors, which the roads of both backends take; shm's takes no lists.
        layout = np.full(SIZE, count), np.arange(SIZE) * count
        yield "broadcast", nbytes, partial(ours.broadcast, send), partial(bare.Bcast, send)
        yield (
            "allgatherv",
            nbytes,
            partial(ours.allgatherv, send, every, *layout),
            mpi4py_allgatherv(bare, send, every, *layout),
        )
        yield (
            "allreduce",
            nbytes,
            partial(reducing.allreduce, send, recv),
            partial(bare.Allreduce, send, recv),
        )


def is_within(nbytes: int, found: Compared) -> bool:
    """Whether a part of the interval is within the limit; rank 0 decides for all."""
    if nbytes <= SMALL:
        is_beyond = found.difference[0] > LIMIT_US
    else:
        is_beyond = nbytes >= LARGE and found.ratio[0] > LIMIT_RATIO
    return not WORLD.bcast(is_beyond)


def compare_and_show(
    name: str, nbytes: int, ours: Callable[[], object], bare: Callable[[], object], rounds: int
) -> Compared:
    """Compare, and print the line."""
    found = compare(ours, bare, rounds)
    show(name, nbytes, found)
    return found


def cost_of_layer(sizes: list[int], rounds: int) -> int:
    exact = create_communicator(MpiConfig(hierarchical=False))
    fast = create_communicator(MpiConfig(hierarchical=False, deterministic=False))
    heading("ours", "mpi4py")
    failures = []
    for name, nbytes, ours, bare in pairs_of_calls(exact, fast, sizes):
        measure = partial(compare_and_show, name, nbytes, ours, bare, rounds)
        is_fine = partial(is_within, nbytes)
        if not is_fine(first_within(measure, is_fine)[-1]):
            failures.append(f"{name} {nbytes}")
    if failures and WORLD.Get_rank() == 0:
        print("Beyond the limit:", ", ".join(failures))
    return int(bool(failures))


def price_of_determinism(sizes: list[int], rounds: int) -> int:
    exact = create_communicator(MpiConfig(hierarchical=False))
    fast = create_communicator(MpiConfig(hierarchical=False, deterministic=False))
    heading("in rank order", "MPI's own")
    for nbytes in sizes:
        send, recv = np.ones(nbytes // 8), np.empty(nbytes // 8)
        calls = partial(exact.allreduce, send, recv), partial(fast.allreduce, send, recv)
        show("allreduce", nbytes, compare(*calls, rounds))
    return 0


def gain_of_levels(sizes: list[int], rounds: int) -> int:
    ours = create_communicator(MpiConfig(hierarchical="auto"))
    assert SIZE == 1 or ours.levels == "one node", ours.levels
    heading("shared memory", "mpi4py")
    for name, nbytes, mine, bare in pairs_of_calls(ours, ours, sizes):
        show(name, nbytes, compare(mine, bare, rounds))
    large = [nbytes for nbytes in sizes if nbytes >= 1 << 16]
    for name, nbytes, mine, bare in pairs_of_calls(ours, ours, large, ours.empty):
        if nbytes:
            show(f"{name}, shared arrays", nbytes, compare(mine, bare, rounds))
    return 0


def switch_point(sizes: list[int], rounds: int) -> int:
    one = create_communicator(MpiConfig(hierarchical=False))
    three = create_communicator(MpiConfig(hierarchical=False))
    one._flat.small_bytes, three._flat.small_bytes = 1 << 62, 0
    for comm in (one, three):
        # The Python methods, which know nothing of a fast road's limit.
        comm._context = communicator._closed
    heading("one step", "three steps")
    for nbytes in (1 << shift for shift in range(10, 21)):
        send, recv = np.ones(nbytes // 8), np.empty(nbytes // 8)
        calls = partial(one.allreduce, send, recv), partial(three.allreduce, send, recv)
        show("allreduce", nbytes, compare(*calls, rounds))
    return 0


MODES = {
    "layer": cost_of_layer,
    "determinism": price_of_determinism,
    "levels": gain_of_levels,
    "switch": switch_point,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of the mpi backend, beside mpi4py.")
    parser.add_argument("modes", nargs="*", choices=[*MODES, []], help="(default: layer)")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes (default: 16 MiB)")
    parser.add_argument("--rounds", type=int, default=31, help="(default: 31)")
    options = parser.parse_args()
    sizes = [nbytes for nbytes in SIZES if nbytes <= options.largest]
    return max(MODES[mode](sizes, options.rounds) for mode in options.modes or ["layer"])


if __name__ == "__main__":
    raise SystemExit(main())
