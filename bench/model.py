"""How a training iteration scales beyond the machines at hand: a model of LogGP's kind.

    python bench/model.py                              the production case, to 4,096 ranks
    scripts/mpi openmpi 4 bench/model.py --measure     predicted against measured, here

LogGP (Alexandrov, Ionescu, Schauser, Scheiman 1995) describes a message of n bytes by latency L,
overhead o and gap per byte G: it takes L + 2 o + n G. Here alpha = L + 2 o and beta = G, once
between nodes and once within a node. A collective of p partners:

    barrier, small allreduce   ceil(log2 p) alpha
    broadcast                  ceil(log2 p) alpha + 2 n beta       (scatter and all-gather)
    allgatherv, n in all       ceil(log2 p) alpha + n (p-1)/p beta (Bruck; ring where large)

Flat: all ranks are partners, and the ranks of a node share its link, so each gets 1/r of its
bandwidth. Hierarchical: within the node, between leaders, within the node.

An iteration has one cut exchange a stage (forward passes x cut bytes), one exchange of trial
points, one small allreduce and one barrier. Its arithmetic, forward passes x stages solves in the
forward sweep and as many times the openings in the backward sweep, is divided among the ranks.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial


@dataclass(frozen=True)
class Link:
    """alpha: seconds of an empty message; beta: seconds per byte."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class Machine:
    """Links between and within nodes, and ranks per node."""

    network: Link
    memory: Link
    ranks_per_node: int


@dataclass(frozen=True)
class Case:
    """What an iteration exchanges and solves. Sizes in bytes, times in seconds."""

    stages: int
    forward_passes: int
    cut_bytes: int
    trial_bytes: int
    openings: int
    solve_secs: float


# The specification's production case. Openings and the time of a solve are not in it: assumed.
PRODUCTION = Case(120, 192, 16_660, 206_000_000, 20, 2e-3)
# Assumed, not measured: 100 Gbit/s and 2 us between nodes, 10 GB/s and 0.5 us within one.
CLUSTER = Machine(Link(2e-6, 1 / 12.5e9), Link(0.5e-6, 1 / 10e9), 4)
# Seconds: cut exchange, trial points, bound, barrier, for 16 ranks.
SPECIFICATION = (2.7e-3, 17e-3, 0.1e-3, 0.5e-3)


def _rounds(partners: int) -> int:
    return math.ceil(math.log2(partners)) if partners > 1 else 0


def _gather(link: Link, partners: int, nbytes: float) -> float:
    if partners == 1:
        return 0.0
    return _rounds(partners) * link.alpha + nbytes * (partners - 1) / partners * link.beta


def _spread(link: Link, partners: int, nbytes: float) -> float:
    return 0.0 if partners == 1 else _rounds(partners) * link.alpha + nbytes * link.beta


def allgather_secs(machine: Machine, ranks: int, nbytes: float, *, hierarchical: bool) -> float:
    """Time of an allgatherv after which everybody has ``nbytes``."""
    local = min(ranks, machine.ranks_per_node)
    nodes = ranks // local
    if not hierarchical or nodes == 1:
        if nodes == 1:
            return _gather(machine.memory, ranks, nbytes)
        # What comes from other nodes comes once for each rank of the node, over one link.
        shared = Link(machine.network.alpha, machine.network.beta * local)
        return _gather(shared, ranks, nbytes)
    own = nbytes / nodes
    return (
        _gather(machine.memory, local, own)
        + _gather(machine.network, nodes, nbytes)
        + _spread(machine.memory, local, nbytes - own)
    )


def meeting_secs(machine: Machine, ranks: int, *, hierarchical: bool) -> float:
    """Time of a barrier or a small allreduce."""
    local = min(ranks, machine.ranks_per_node)
    nodes = ranks // local
    between = _rounds(nodes) * machine.network.alpha
    within = _rounds(local) * machine.memory.alpha
    return between + within * (2 if hierarchical and nodes > 1 else 1)


def iteration_secs(
    case: Case, machine: Machine, ranks: int, *, hierarchical: bool
) -> tuple[float, float]:
    """Return the times of arithmetic and of communication of an iteration."""
    # The rank with the most trajectories decides; more ranks than trajectories gain nothing.
    passes = math.ceil(case.forward_passes / ranks)
    solves = passes * case.stages * (1 + case.openings) * case.solve_secs
    cuts = case.forward_passes * case.cut_bytes
    exchanged = case.stages * allgather_secs(machine, ranks, cuts, hierarchical=hierarchical)
    exchanged += allgather_secs(machine, ranks, case.trial_bytes, hierarchical=hierarchical)
    exchanged += 2 * meeting_secs(machine, ranks, hierarchical=hierarchical)
    return solves, exchanged


def show_prediction(case: Case, machine: Machine) -> None:
    """Print the tables for the production case."""
    cuts = case.forward_passes * case.cut_bytes
    print("| 16 ranks, ms | cut exchange | trial points | bound | barrier |")
    print("| --- | --- | --- | --- | --- |")
    given = " | ".join(f"{1e3 * value:.2f}" for value in SPECIFICATION)
    print(f"| specification | {given} |")
    for name, hierarchical in (("flat", False), ("hierarchical", True)):
        times = [
            allgather_secs(machine, 16, nbytes, hierarchical=hierarchical)
            for nbytes in (cuts, case.trial_bytes)
        ] + [meeting_secs(machine, 16, hierarchical=hierarchical)] * 2
        print(f"| {name} | {' | '.join(f'{1e3 * value:.3f}' for value in times)} |")
    print()
    print("| ranks | flat s | of it communication | hierarchical s | of it communication |")
    print("| --- | --- | --- | --- | --- |")
    for ranks in (4, 16, 64, 192, 256, 1024, 4096):
        cells = []
        for hierarchical in (False, True):
            solves, exchanged = iteration_secs(case, machine, ranks, hierarchical=hierarchical)
            cells += [
                f"{solves + exchanged:.2f}",
                f"{100 * exchanged / (solves + exchanged):.1f} %",
            ]
        print(f"| {ranks} | {' | '.join(cells)} |")


def measure() -> None:
    """Fit alpha and beta to the smallest and the largest allgatherv; predict those between."""
    import numpy as np
    from mpi4py import MPI

    from cobre_shm import MpiConfig, create_communicator

    world = MPI.COMM_WORLD
    size = world.Get_size()

    def median_secs(call: Callable[[], object]) -> float:
        times = []
        for _ in range(15):
            world.Barrier()
            begin = time.perf_counter()
            call()
            times.append(world.allreduce(time.perf_counter() - begin, MPI.MAX))
        return statistics.median(times)

    for name, hierarchical in (("flat", False), ("hierarchical", True)):
        comm = create_communicator(MpiConfig(hierarchical=hierarchical))
        found = {}
        for shift in range(6, 27, 4):
            count = max(1, (1 << shift) // 8 // size)
            send, recv = np.ones(count), np.ones(count * size)
            layout = [count] * size, [count * rank for rank in range(size)]
            found[recv.nbytes] = median_secs(partial(comm.allgatherv, send, recv, *layout))
        sizes = sorted(found)
        alpha = found[sizes[0]] / max(1, _rounds(size))
        share = (size - 1) / size or 1.0
        beta = (found[sizes[-1]] - found[sizes[0]]) / (sizes[-1] * share)
        here = replace(CLUSTER, memory=Link(alpha, beta), ranks_per_node=size)
        if world.Get_rank() == 0:
            print(f"{name}, {size} ranks: alpha {alpha * 1e6:.2f} us, {1e-9 / beta:.2f} GB/s")
            print("| bytes | measured us | predicted us | predicted / measured |")
            print("| --- | --- | --- | --- |")
            for nbytes, secs in found.items():
                guess = allgather_secs(here, size, nbytes, hierarchical=hierarchical)
                print(f"| {nbytes} | {secs * 1e6:.1f} | {guess * 1e6:.1f} | {guess / secs:.2f} |")
        comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A LogGP-style model of a training iteration.")
    parser.add_argument("--measure", action="store_true", help="under mpiexec: validate it here")
    parser.add_argument("--alpha-us", type=float, default=2.0, help="of the network (default: 2)")
    parser.add_argument("--gbit", type=float, default=100.0, help="of the network (default: 100)")
    parser.add_argument("--ranks-per-node", type=int, default=4, help="(default: 4)")
    options = parser.parse_args()
    if options.measure:
        measure()
        return
    network = Link(options.alpha_us * 1e-6, 8 / (options.gbit * 1e9))
    machine = replace(CLUSTER, network=network, ranks_per_node=options.ranks_per_node)
    show_prediction(PRODUCTION, machine)


if __name__ == "__main__":
    main()
