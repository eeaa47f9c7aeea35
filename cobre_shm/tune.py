"""Measure this machine's switch points: ``python -m cobre_shm.tune [-n RANKS] [--output FILE]``.

Without ``--output`` the file goes where ``COBRE_SHM_TUNING=auto`` finds it. It takes less than a
minute; the machine should have nothing else to do.

The ranks of one group change the words that choose the algorithm, all to the same values between
two barriers, and time a collective with each candidate in turn, several times over; the candidate
with the smallest median is kept. A threshold is looked for payload by payload, until the algorithm
beyond it loses. A file holds for about as many ranks as it was measured with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cobre_shm.command_line import Parser
from cobre_shm.communicator import Communicator
from cobre_shm.cpus import count_cpus
from cobre_shm.tuning import NAMES, NEVER, tuned_file

__all__ = ["main"]

_KIB, _MIB = 1 << 10, 1 << 20
_ROUNDS = 5
_SECONDS = 0.02  # of one candidate in one round
_TIE = 0.03  # of a ratio: no answer, the next payload may give one
# Given to the ranks, which are this same program.
_INSIDE = "--inside"


class Trial(NamedTuple):
    """One question to the machine.

    Attributes:
        operation: Collective that is timed.
        nbytes: Its payload.
        candidates: Values to try of one switch point, which each names first; what it names
            besides holds while it is tried. Of a threshold there are two, and that which is
            ``nbytes`` has the algorithm beyond it used.
        shared_cores: Whether it matters only with more ranks than processors.
        shared_arrays: Whether it is asked of shared arrays; else of private ones.
    """

    operation: str
    nbytes: int
    candidates: list[dict[str, int]]
    shared_cores: bool = False
    shared_arrays: bool = False


def _each(name: str, *values: int) -> list[dict[str, int]]:
    return [{name: value} for value in values]


_CHUNKS = (64 * _KIB, 128 * _KIB, 256 * _KIB)
TRIALS = (
    Trial("allreduce", _MIB, _each("scatter_chunk", *_CHUNKS)),
    *(
        Trial("allreduce", nbytes, _each("direct_bytes", nbytes // 2, nbytes))
        for nbytes in (4 * _KIB, 8 * _KIB, 16 * _KIB, 32 * _KIB, 64 * _KIB, 128 * _KIB, 256 * _KIB)
    ),
    Trial("allreduce", 16 * _MIB, _each("direct_chunk", *_CHUNKS)),
    Trial("allreduce", 16 * _MIB, _each("scatter_stream_chunk", *_CHUNKS)),
    Trial(
        "allreduce",
        _MIB,
        [
            {"chain_chunk": chunk, "chain_min_bytes": 0}
            for chunk in (16 * _KIB, 32 * _KIB, *_CHUNKS)
        ],
        shared_cores=True,
    ),
    *(
        Trial("allreduce", nbytes, _each("chain_min_bytes", nbytes, NEVER), shared_cores=True)
        for nbytes in (16 * _MIB, _MIB, 256 * _KIB, 128 * _KIB, 96 * _KIB, 64 * _KIB)
    ),
    *(
        Trial("allgatherv", nbytes, _each("stream_bytes", nbytes, NEVER))
        for nbytes in (32 * _MIB, 16 * _MIB, 8 * _MIB, 4 * _MIB)
    ),
    Trial("allgatherv", _MIB, _each("gather_chunk", *_CHUNKS)),
    Trial("allgatherv", 16 * _MIB, _each("gather_stream_chunk", *_CHUNKS)),
    Trial("broadcast", 256 * _KIB, _each("broadcast_small_chunk", 16 * _KIB, 32 * _KIB, *_CHUNKS)),
    Trial("broadcast", 4 * _MIB, _each("broadcast_chunk", *_CHUNKS)),
    *(
        Trial("allreduce", nbytes, _each("read_bytes", nbytes, NEVER))
        for nbytes in (16 * _MIB, 8 * _MIB, 4 * _MIB, 2 * _MIB, _MIB, 512 * _KIB)
    ),
    *(
        Trial("allgatherv", nbytes, _each("share_bytes", nbytes, NEVER), shared_arrays=True)
        for nbytes in (4 * _MIB, 2 * _MIB, _MIB, 512 * _KIB, *_CHUNKS[::-1], 32 * _KIB)
    ),
    *(
        Trial("allreduce_shared", nbytes, _each("common_bytes", nbytes, NEVER))
        for nbytes in (_MIB, 512 * _KIB, 256 * _KIB, 128 * _KIB, 64 * _KIB, 32 * _KIB)
    ),
)


def _call_of(comm: Communicator, trial: Trial) -> Callable[[], Any]:
    count = trial.nbytes // 8
    make = comm.empty if trial.shared_arrays else np.empty
    send, recv = make(count), make(count)
    recv.fill(0.0)
    share = count // comm.size
    plan: Callable[[], Any]
    if trial.operation == "allgatherv":
        send = send[:share]
        plan = comm.allgatherv_init(send, recv, [share] * comm.size)
    elif trial.operation == "allreduce_shared":
        plan = partial(comm.allreduce_shared, send)
    else:
        is_reduced = trial.operation == "allreduce"
        plan = comm.allreduce_init(send, recv) if is_reduced else comm.broadcast_init(send)

    def call() -> None:
        # As in a program: what peers fetch lies in the cache of the core that has made it.
        send.fill(comm.rank + 1.5)
        plan()

    return call


def _measure(comm: Any, trial: Trial, chosen: dict[str, int]) -> list[float]:
    """Return the seconds that each candidate takes, the same on all ranks."""
    call = _call_of(comm, trial)
    times: list[list[float]] = [[] for _ in trial.candidates]
    for round_ in range(_ROUNDS + 1):
        for index, candidate in enumerate(trial.candidates):
            comm.use_switch_points({**chosen, **candidate})
            turns = 3 if round_ == 0 else _agreed_turns(comm, times[index][0])
            begun = time.perf_counter()
            for _ in range(turns):
                call()
            comm.barrier()
            times[index].append((time.perf_counter() - begun) / turns)
    medians = comm.broadcast(np.array([statistics.median(found[1:]) for found in times]))
    if comm.rank == 0:
        shown = "  ".join(
            f"{next(iter(candidate.values()))}: {median * 1e6:.1f} us"
            for candidate, median in zip(trial.candidates, medians, strict=True)
        )
        print(f"{trial.operation} {trial.nbytes}  {next(iter(trial.candidates[0]))}  {shown}")
    return [float(median) for median in medians]


def _agreed_turns(comm: Communicator, seconds: float) -> int:
    turns = np.array([max(2, min(5000, int(_SECONDS / max(seconds, 1e-7))))])
    return int(comm.broadcast(turns)[0])


def _chosen_by(comm: Any) -> dict[str, int]:
    """Ask all questions; a switch point that was settled stays for the later ones."""
    # Until their own questions, so that those of other algorithms are asked of these.
    chosen: dict[str, int] = {"read_bytes": NEVER, "chain_min_bytes": NEVER}
    settled: set[str] = set()
    for trial in TRIALS:
        name = next(iter(trial.candidates[0]))
        if name in settled or (trial.shared_cores and comm.size <= count_cpus()):
            continue
        medians = _measure(comm, trial, chosen)
        values = [candidate[name] for candidate in trial.candidates]
        # More than two are chunks, of which one may be as large as the payload.
        if len(values) > 2:
            chosen[name] = values[int(np.argmin(medians))]
            continue
        beyond = values.index(trial.nbytes)
        ratio = medians[beyond] / medians[1 - beyond]
        if ratio < 1 - _TIE:
            # Stores of all ranks leave the caches together.
            chosen[name] = trial.nbytes * (comm.size if name == "stream_bytes" else 1)
        elif ratio > 1 + _TIE:
            chosen.setdefault(name, values[1 - beyond])
            settled.add(name)
    return chosen


def _run_inside(output: Path) -> None:
    from cobre_shm import create_communicator

    with create_communicator() as comm:
        chosen = _chosen_by(comm)
        if comm.rank == 0:
            text = json.dumps({name: chosen[name] for name in NAMES if name in chosen}, indent=1)
            unfinished = output.with_name(f".{output.name}.{os.getpid()}")
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(output)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python -m cobre_shm.tune",
        description="Measure the switch points of the shm algorithms on this machine.",
    )
    parser.add_argument(
        "-n",
        "--nprocs",
        type=int,
        default=max(2, count_cpus()),
        metavar="RANKS",
        help="ranks of the group that is measured (default: as many as CPUs, at least 2)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FILE",
        help="where the result goes (default: where COBRE_SHM_TUNING=auto finds it, "
        "~/.cache/cobre-shm/tuning-HOST.json)",
    )
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        _run_inside(args.output)
        return 0
    if args.nprocs < 2:
        parser.error("argument -n: at least 2 ranks have something to measure")
    try:
        output = (args.output or tuned_file()).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        parser.error(f"there is no place for the result: {error}; give another --output")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        parser.error(f"{output.parent} cannot be written; give another --output")
    # What is measured does not depend on what was measured before.
    launched = [sys.executable, "-m", "cobre_shm.spawn", "--unset-env", "COBRE_SHM_TUNING"]
    launched += ["-n", str(args.nprocs)]
    code = subprocess.call([*launched, "-m", "cobre_shm.tune", _INSIDE, "--output", str(output)])
    if code == 0:
        print(f"Written to {output}; use it with COBRE_SHM_TUNING={args.output or 'auto'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
