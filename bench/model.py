"""How a training iteration scales beyond the machines at hand: a model of LogGP's kind.

    python bench/model.py [--alpha-us US --gbit GBIT]     the production case, to 4,096 ranks
    scripts/mpi openmpi 2 bench/model.py --measure FILE   takes the parameters, here
    scripts/mpi openmpi 16 bench/model.py --measure FILE  predicted against measured

LogGP (Alexandrov, Ionescu, Schauser, Scheiman 1995) describes a message of n bytes by latency L,
overhead o and gap per byte G: it takes L + 2 o + n G. Here alpha = L + 2 o and beta = G, once
between nodes and once within a node. Within a node, where messages that fit a cache are several
times faster per byte, n beta may be a measured function of n instead, as in the parameterised LogP
of Kielmann, Bal and Verstoep (2000). A collective of p partners:

    barrier, small allreduce   ceil(log2 p) alpha
    broadcast                  ceil(log2 p) alpha + n beta         (a pipeline)
    allgatherv, n in all       ceil(log2 p) alpha + n (p-1)/p beta (Bruck; ring where large)

Flat: all ranks are partners, and the ranks of a node share its link, so each gets 1/r of its
bandwidth. Hierarchical: within the node, between leaders, within the node.

More ranks than cores: a core serves its w = ceil(p / cores) ranks in turn. Bytes take w times as
long, and who waits for all waits until every core has been handed on: w sigma, where sigma is half
of what the same takes two ranks on one core. In MPI that is so in every round. In shared memory all
wait once for all; but a rank that looks just before the last one of another core has come, looks
again only after another turn of its own core, so on several cores it is two turns. LogGP knows no
such thing; without it nothing could be compared on a machine of two cores.

An iteration has one cut exchange a stage (forward passes x cut bytes), one exchange of trial
points, one small allreduce and one barrier. Most of its arithmetic, forward passes x stages solves
in the forward sweep and as many times the openings in the backward sweep, is divided among the
ranks; but every rank adds the cuts of all, one for each pass and stage, to problems of its own.

``--measure`` takes alpha, beta and sigma from two ranks, and the times of a trajectory and of a cut
from the training with one rank and with two; what it says of 4, 8 and 16 ranks is prediction. Ranks
must wait in the same way in all of these runs: for Open MPI, which would not give a core away while
there are enough of them, export OMPI_MCA_mpi_yield_when_idle=1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Link:
    """What a message takes.

    Attributes:
        alpha: Seconds of an empty one.
        beta: Seconds per byte; beyond the last of ``points``, where there are any.
        points: Bytes, and the seconds that they add; ascending. Straight lines are between them.
    """

    alpha: float
    beta: float
    points: tuple[tuple[float, float], ...] = ()

    def gap(self, nbytes: float) -> float:
        """Return the seconds that ``nbytes`` add to an empty message."""
        before = (0.0, 0.0)
        for point in self.points:
            if nbytes <= point[0]:
                share = (nbytes - before[0]) / (point[0] - before[0])
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1] + (nbytes - before[0]) * self.beta


@dataclass(frozen=True)
class Machine:
    """Links between and within nodes, ranks per node.

    Attributes:
        cores: Of a node, where it has fewer of them than ranks.
        sigma: Seconds until a core is handed on to the next of its ranks.
    """

    network: Link
    memory: Link
    ranks_per_node: int
    cores: int | None = None
    sigma: float = 0.0

    def turns(self, ranks: int) -> int:
        """Ranks that a core serves, of ``ranks`` on a node."""
        return 1 if self.cores is None else math.ceil(ranks / self.cores)


@dataclass(frozen=True)
class Case:
    """What an iteration exchanges and solves. Sizes in bytes, times in seconds.

    Attributes:
        pass_secs: The solves of a trajectory, forward and backward.
        cut_secs: A rank's work on one cut, its own or that of a peer.
    """

    stages: int
    forward_passes: int
    cut_bytes: int
    trial_bytes: int
    pass_secs: float
    cut_secs: float = 0.0

    def own_secs(self) -> float:
        """Return the time in which a rank adds the cuts of all to its problems."""
        return self.forward_passes * self.stages * self.cut_secs


# The production case of the specification that this was built to. Openings and times are not in
# it: assumed are 20 openings, so that a trajectory takes 120 x (1 + 20) solves, of 2 ms each, and
# 50 us for the work on a cut (the shipped case: 14 us for a cut of 40 bytes).
PRODUCTION = Case(120, 192, 16_660, 206_000_000, 120 * 21 * 2e-3, 50e-6)
# Assumed, not measured: 100 Gbit/s and 2 us between nodes, 10 GB/s and 0.5 us within one.
CLUSTER = Machine(Link(2e-6, 1 / 12.5e9), Link(0.5e-6, 1 / 10e9), 4)
# Seconds: cut exchange, trial points, bound, barrier, for 16 ranks.
REQUIRED = (2.7e-3, 17e-3, 0.1e-3, 0.5e-3)


def _rounds(partners: int) -> int:
    return math.ceil(math.log2(partners)) if partners > 1 else 0


def _meet(machine: Machine, ranks: int, *, hierarchical: bool) -> float:
    """Time until all ranks of a node know of each other."""
    turns, rounds = machine.turns(ranks), _rounds(ranks)
    if turns == 1:
        return rounds * machine.memory.alpha
    # MPI's ranks wait in every round, those of a shared memory group once for all others.
    waits = (1 if machine.cores == 1 else 2) if hierarchical else rounds
    return turns * machine.sigma * waits


def _gather(link: Link, partners: int, nbytes: float) -> float:
    if partners == 1:
        return 0.0
    return _rounds(partners) * link.alpha + link.gap(nbytes * (partners - 1) / partners)


def _gather_within(machine: Machine, ranks: int, nbytes: float, *, hierarchical: bool) -> float:
    if ranks == 1:
        return 0.0
    gap = machine.memory.gap(nbytes * (ranks - 1) / ranks)
    return _meet(machine, ranks, hierarchical=hierarchical) + machine.turns(ranks) * gap


def _spread(link: Link, partners: int, nbytes: float) -> float:
    return 0.0 if partners == 1 else _rounds(partners) * link.alpha + link.gap(nbytes)


def allgather_secs(machine: Machine, ranks: int, nbytes: float, *, hierarchical: bool) -> float:
    """Time of an allgatherv after which everybody has ``nbytes``."""
    local = min(ranks, machine.ranks_per_node)
    nodes = ranks // local
    if not hierarchical or nodes == 1:
        if nodes == 1:
            return _gather_within(machine, ranks, nbytes, hierarchical=hierarchical)
        # What comes from other nodes comes once for each rank of the node, over one link.
        shared = Link(machine.network.alpha, machine.network.beta * local)
        return _gather(shared, ranks, nbytes)
    own = nbytes / nodes
    return (
        _gather_within(machine, local, own, hierarchical=True)
        + _gather(machine.network, nodes, nbytes)
        + _spread(machine.memory, local, nbytes - own)
    )


def meeting_secs(machine: Machine, ranks: int, *, hierarchical: bool) -> float:
    """Time of a barrier or a small allreduce."""
    local = min(ranks, machine.ranks_per_node)
    nodes = ranks // local
    between = _rounds(nodes) * machine.network.alpha
    within = _meet(machine, local, hierarchical=hierarchical)
    return between + within * (2 if hierarchical and nodes > 1 else 1)


def iteration_secs(
    case: Case, machine: Machine, ranks: int, *, hierarchical: bool
) -> tuple[float, float]:
    """Return the times of arithmetic and of communication of an iteration."""
    # The rank with the most trajectories decides; more ranks than trajectories gain nothing.
    passes = math.ceil(case.forward_passes / ranks)
    local = min(ranks, machine.ranks_per_node)
    solves = machine.turns(local) * (passes * case.pass_secs + case.own_secs())
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
    given = " | ".join(f"{1e3 * value:.2f}" for value in REQUIRED)
    print(f"| required | {given} |")
    ways = (
        ("one rank a node", replace(machine, ranks_per_node=1), False),
        (f"{machine.ranks_per_node} ranks a node, flat", machine, False),
        (f"{machine.ranks_per_node} ranks a node, hierarchical", machine, True),
    )
    for name, placed, hierarchical in ways:
        times = [
            allgather_secs(placed, 16, nbytes, hierarchical=hierarchical)
            for nbytes in (cuts, case.trial_bytes)
        ] + [meeting_secs(placed, 16, hierarchical=hierarchical)] * 2
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


def least_secs(world, call: Callable[[], object], loop_secs: float = 0.02) -> float:
    """Time of one call on the slowest rank, the least of nine loops.

    The parameters are those of a machine that nobody else uses, and others may use this one.
    """
    from mpi4py import MPI

    times = []
    repeat = 1
    for _ in range(10):
        world.Barrier()
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        times.append(world.allreduce(time.perf_counter() - begin, MPI.MAX) / repeat)
        repeat = max(1, min(500, int(loop_secs / times[-1])))
    return min(times[1:])


SIZES = tuple(1 << shift for shift in range(8, 24, 5))


def measure_collectives(world, comm) -> dict[int, float]:
    """Return the time of an allgatherv by the bytes that everybody has in the end."""
    import numpy as np

    found = {}
    for nbytes in SIZES:
        count = nbytes // 8 // comm.size
        send, recv = np.ones(count), np.ones(count * comm.size)
        layout = np.full(comm.size, count), count * np.arange(comm.size)
        found[nbytes] = least_secs(world, partial(comm.allgatherv, send, recv, *layout))
    return found


def fit(found: dict[int, float], alone: dict[int, float], cores: int) -> Machine:
    """Take the parameters from two ranks on two cores, and on one."""
    # Each of the two takes half of what both have in the end from the other.
    small, large = SIZES[0], SIZES[-1]
    beta = (found[large] - found[SIZES[-2]]) / ((large - SIZES[-2]) / 2)
    alpha = found[small]
    points = tuple((nbytes / 2, max(0.0, found[nbytes] - alpha)) for nbytes in SIZES)
    memory = Link(alpha, beta, points)
    return Machine(CLUSTER.network, memory, 1 << 30, cores, alone[small] / 2)


def measure_training(comm) -> tuple[Case, float]:
    """Return what an iteration of the shipped case consists of, and the least time of one.

    All of it is charged to the trajectories.
    """
    from cobre_shm.sddp import shipped_case_path, train

    result = train(shipped_case_path(), comm, iterations=5)
    passes, stages = result.case.config.forward_passes, result.case.stages
    state = result.case.state_size
    # The first one also meets every array for the first time; later ones have more cuts.
    secs = min(iteration.total_seconds for iteration in result.history[1:])
    trial_bytes = passes * (stages * state + 1) * 8
    return Case(stages, passes, (1 + state) * 8, trial_bytes, secs / passes), secs


def divide(case: Case, machine: Machine, secs: float) -> Case:
    """Take from the trajectories, with which one rank was charged, what two ranks do twice.

    Args:
        case: As one rank has measured it.
        machine: On which two ranks had a core each, flat.
        secs: Of an iteration of two ranks.
    """
    exchanged = iteration_secs(case, machine, 2, hierarchical=False)[1]
    passes = case.forward_passes
    # What the rank with the larger half is spared is the other half of the passes.
    spared = passes * case.pass_secs - (secs - exchanged)
    pass_secs = max(0.0, min(case.pass_secs, spared / (passes - math.ceil(passes / 2))))
    return replace(case, pass_secs=pass_secs, cut_secs=(case.pass_secs - pass_secs) / case.stages)


def measure(path: Path) -> None:
    """Compare the model with this machine, for the ranks that were started.

    Args:
        path: Two ranks write the parameters there, any other number reads them.
    """
    from mpi4py import MPI

    from cobre_shm import LocalConfig, MpiConfig, create_communicator

    world = MPI.COMM_WORLD
    rank, ranks = world.Get_rank(), world.Get_size()
    saved = {}
    if ranks > 2:
        saved = json.loads(path.read_text())
    elif rank == 0:
        with create_communicator(LocalConfig()) as comm:
            saved["case"] = asdict(measure_training(comm)[0])
    case = Case(**world.bcast(saved.get("case")))
    ratios = []
    for name, hierarchical in (("flat", False), ("hierarchical", True)):
        comm = create_communicator(MpiConfig(hierarchical=hierarchical))
        cores = sorted(os.sched_getaffinity(0))
        if ranks == 2:
            os.sched_setaffinity(0, cores[rank : rank + 1])
        found = measure_collectives(world, comm)
        if ranks == 2:
            os.sched_setaffinity(0, cores[:1])
            saved[name] = asdict(fit(found, measure_collectives(world, comm), len(cores)))
            os.sched_setaffinity(0, cores)
        # Measured are those of one rank, for all.
        machine = read_machine(world.bcast(saved[name]))
        _show_parameters(name, machine, rank)
        lines = [
            (
                f"allgatherv {nbytes}",
                measured,
                allgather_secs(machine, ranks, nbytes, hierarchical=hierarchical),
            )
            for nbytes, measured in found.items()
        ]
        _, secs = measure_training(comm)
        if ranks == 2 and not hierarchical:
            case = divide(case, machine, world.bcast(secs))
            saved["case"] = asdict(case)
        guess = sum(iteration_secs(case, machine, ranks, hierarchical=hierarchical))
        ratios += _show_comparison(ranks, [*lines, ("iteration", secs, guess)], rank)
        comm.close()
    if rank == 0:
        spread = math.exp(statistics.mean(abs(math.log(ratio)) for ratio in ratios))
        print(f"\nTypical factor between the two: {spread:.2f}", flush=True)
        if ranks == 2:
            path.write_text(json.dumps(saved))


def read_machine(saved: dict[str, Any]) -> Machine:
    """Return what ``asdict`` made a dictionary of."""
    links = {name: Link(**saved[name]) for name in ("network", "memory")}
    return Machine(**(saved | links))


def _show_parameters(name: str, machine: Machine, rank: int) -> None:
    if rank == 0:
        memory = machine.memory
        rates = (f"{nbytes * 1e-9 / secs:.2f}" for nbytes, secs in memory.points if secs)
        print(
            f"\n{name}: alpha {memory.alpha * 1e6:.2f} us, {', '.join(rates)} GB/s, "
            f"sigma {machine.sigma * 1e6:.2f} us, {machine.cores} cores\n"
        )
        print("| ranks | | measured us | predicted us | predicted / measured |")
        print("| --- | --- | --- | --- | --- |", flush=True)


def _show_comparison(ranks: int, lines: list[tuple[str, float, float]], rank: int) -> list[float]:
    ratios = [guess / measured for _, measured, guess in lines]
    for (what, measured, guess), ratio in zip(lines, ratios, strict=True):
        if rank == 0:
            print(
                f"| {ranks} | {what} | {measured * 1e6:.1f} | {guess * 1e6:.1f} | {ratio:.2f} |",
                flush=True,
            )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="A LogGP-style model of a training iteration.")
    parser.add_argument(
        "--measure", metavar="FILE", type=Path, help="under mpiexec: validate it here"
    )
    parser.add_argument("--alpha-us", type=float, default=2.0, help="of the network (default: 2)")
    parser.add_argument("--gbit", type=float, default=100.0, help="of the network (default: 100)")
    parser.add_argument(
        "--memory-alpha-us", type=float, default=0.5, help="within a node (default: 0.5)"
    )
    parser.add_argument(
        "--memory-gbs", type=float, default=10.0, help="GB/s within a node (default: 10)"
    )
    parser.add_argument("--ranks-per-node", type=int, default=4, help="(default: 4)")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    network = Link(options.alpha_us * 1e-6, 8 / (options.gbit * 1e9))
    memory = Link(options.memory_alpha_us * 1e-6, 1e-9 / options.memory_gbs)
    machine = Machine(network, memory, options.ranks_per_node)
    show_prediction(PRODUCTION, machine)


if __name__ == "__main__":
    main()
