"""Measure this machine's switch points: ``python -m cobre_shm.tune [-n RANKS] [--output FILE]``.

Without ``--output`` the file goes where ``COBRE_SHM_TUNING=auto`` finds it. It takes less than a
minute; the machine should have nothing else to do.

The ranks of one group change the words that choose the algorithm, all to the same values between
two barriers, and time a collective with each candidate in turn, several times over; the candidate
with the smallest median is kept. A file holds for about as many ranks as it was measured with.
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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.cpus import count_cpus
from cobre_shm.tuning import NAMES, tuned_file

__all__ = ["main"]

_KIB, _MIB = 1 << 10, 1 << 20
_NEVER = 1 << 62
_ROUNDS = 5
_SECONDS = 0.02  # of one candidate in one round
# Given to the ranks, which are this same program.
_INSIDE = "--inside"


class Trial(NamedTuple):
    """One question to the machine.

    Attributes:
        operation: Collective that is timed.
        nbytes: Its payload.
        candidates: Switch points to try; the names are the same in each.
        shared_cores: Whether it matters only with more ranks than processors.
    """

    operation: str
    nbytes: int
    candidates: list[dict[str, int]]
    shared_cores: bool = False


def _each(name: str, *values: int) -> list[dict[str, int]]:
    return [{name: value} for value in values]


_CHUNKS = (64 * _KIB, 128 * _KIB, 256 * _KIB)
TRIALS = (
    Trial("allreduce", _MIB, _each("scatter_chunk", *_CHUNKS)),
    *(
        Trial("allreduce", nbytes, _each("direct_bytes", nbytes // 2, nbytes))
        for nbytes in (4 * _KIB, 8 * _KIB, 16 * _KIB, 32 * _KIB, 64 * _KIB, 128 * _KIB, 256 * _KIB)
    ),
    Trial("allreduce", _MIB, _each("chain_chunk", *_CHUNKS), shared_cores=True),
    *(
        Trial("allreduce", nbytes, _each("chain_min_bytes", nbytes, _NEVER), shared_cores=True)
        for nbytes in (512 * _KIB, 256 * _KIB, 128 * _KIB)
    ),
    Trial("allreduce", 16 * _MIB, _each("direct_chunk", *_CHUNKS)),
    Trial("allreduce", 16 * _MIB, _each("scatter_stream_chunk", *_CHUNKS)),
    *(
        Trial("allgatherv", nbytes, _each("stream_bytes", nbytes, _NEVER))
        for nbytes in (32 * _MIB, 16 * _MIB, 8 * _MIB, 4 * _MIB)
    ),
    Trial("allgatherv", _MIB, _each("gather_chunk", *_CHUNKS)),
    Trial("allgatherv", 16 * _MIB, _each("gather_stream_chunk", *_CHUNKS)),
    Trial("broadcast", 256 * _KIB, _each("broadcast_small_chunk", 16 * _KIB, 32 * _KIB, *_CHUNKS)),
    Trial("broadcast", 4 * _MIB, _each("broadcast_chunk", *_CHUNKS)),
)


def _call_of(comm: Communicator, operation: str, nbytes: int) -> Callable[[], Any]:
    count = nbytes // 8
    send, recv = np.full(count, comm.rank + 1.5), np.zeros(count)
    if operation == "allreduce":
        return comm.allreduce_init(send, recv)
    if operation == "broadcast":
        return comm.broadcast_init(send)
    share = count // comm.size
    return comm.allgatherv_init(send[:share], recv, [share] * comm.size)


def _measure(comm: Any, trial: Trial, chosen: dict[str, int]) -> dict[str, int]:
    """Return the best candidate, the same on all ranks."""
    call = _call_of(comm, trial.operation, trial.nbytes)
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
    medians = np.array([statistics.median(found[1:]) for found in times])
    best = int(np.argmin(comm.broadcast(medians)))
    if comm.rank == 0:
        shown = "  ".join(
            f"{next(iter(candidate.values()))}: {median * 1e6:.1f} us"
            for candidate, median in zip(trial.candidates, medians, strict=True)
        )
        print(f"{trial.operation} {trial.nbytes}  {next(iter(trial.candidates[0]))}  {shown}")
    return trial.candidates[best]


def _agreed_turns(comm: Communicator, seconds: float) -> int:
    turns = np.array([max(2, min(5000, int(_SECONDS / max(seconds, 1e-7))))])
    return int(comm.broadcast(turns)[0])


def _chosen_by(comm: Any) -> dict[str, int]:
    """Ask all questions; a switch point that was settled stays for the later ones."""
    chosen: dict[str, int] = {}
    settled: set[str] = set()
    for trial in TRIALS:
        name = next(iter(trial.candidates[0]))
        if name in settled or (trial.shared_cores and comm.size <= count_cpus()):
            continue
        best = _measure(comm, trial, chosen)
        if name in ("direct_bytes", "chain_min_bytes", "stream_bytes"):
            # A threshold moves as long as the algorithm beyond it wins at the next payload.
            is_beyond = best[name] == trial.nbytes
            if not is_beyond:
                settled.add(name)
                if name in chosen or name == "direct_bytes":
                    best = {name: chosen.get(name, best[name])}
        chosen.update(best)
    return chosen


def _run_inside(output: Path) -> None:
    from cobre_shm import create_communicator

    with create_communicator() as comm:
        chosen = _chosen_by(comm)
        if comm.rank == 0:
            output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({name: chosen[name] for name in NAMES if name in chosen}, indent=1)
            partial = output.with_name(f".{output.name}.{os.getpid()}")
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(output)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cobre_shm.tune",
        description="Measure the switch points of the shm algorithms on this machine.",
    )
    parser.add_argument("-n", "--nprocs", type=int, default=max(2, count_cpus()), metavar="RANKS")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE")
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    output = (args.output or tuned_file()).absolute()
    if args.inside:
        _run_inside(output)
        return 0
    if args.nprocs < 2:
        parser.error("argument -n: at least 2 ranks have something to measure")
    launched = [sys.executable, "-m", "cobre_shm.spawn", "-n", str(args.nprocs)]
    code = subprocess.call([*launched, "-m", "cobre_shm.tune", _INSIDE, "--output", str(output)])
    if code == 0:
        print(f"Written to {output}; use it with COBRE_SHM_TUNING={args.output or 'auto'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
