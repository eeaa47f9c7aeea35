"""Jitted collectives beside numba-mpi, with each MPI: ``scripts/bench jitted``.

    python bench/jitted.py [--ranks 2] [--launches 7] [--mpis openmpi,mpich] [--out FOLDER]

Loops inside ``@numba.njit`` functions: change the send buffer's first element, call; less the same
loop without the call; then a barrier, inside the time. The traps of ``bench/collectives.py`` and
``bench/peers.py`` hold here too, with the same remedies: launches of all take turns in an order of
chance, and a ratio is made within a round, over the fastest MPI. The environments, one for each MPI
with numba-mpi beside mpi4py, are made if need be; ``MPI_ENVIRONMENTS`` names their place.

An allgather is ours with counts and displacements and theirs without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numba
import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# numba-mpi 1.3.1 looks for "mpi." in the name of a library less its last suffix; Intel MPI's is
# libmpi.so.
MPIS = ("openmpi", "mpich")
# Elements of 8 bytes, and turns of a batch: the same on all ranks without asking.
TURNS = {1: 20_000, 128: 20_000, 8192: 2_000, 131_072: 200}
BATCHES = 5
TIMEOUT_SECS = 240
# numba-mpi 1.3.1 asks for nothing else that is not there already.
PACKAGES = ("numba-mpi>=1.3,<2", "psutil")


def ours() -> tuple[Any, dict[str, Any], int, int]:
    """Return what closes, the loops, rank and size."""
    from cobre_shm import create_communicator, jit

    comm = create_communicator()
    handle = jit.handle(comm)
    size = comm.size

    @numba.njit
    def barrier(send: Any, recv: Any, turns: int) -> int:
        for _ in range(turns):
            status = jit.barrier(handle)
            if status:
                return status
        return jit.OK

    @numba.njit
    def allreduce(send: Any, recv: Any, turns: int) -> int:
        for turn in range(turns):
            send[0] = turn
            status = jit.allreduce(handle, send, recv[: send.size], jit.SUM)
            if status:
                return status
        return jit.OK

    @numba.njit
    def broadcast(send: Any, recv: Any, turns: int) -> int:
        for turn in range(turns):
            send[0] = turn
            status = jit.broadcast(handle, send, 0)
            if status:
                return status
        return jit.OK

    @numba.njit
    def allgather(send: Any, recv: Any, turns: int) -> int:
        counts = np.full(size, send.size)
        displs = np.arange(size) * send.size
        for turn in range(turns):
            send[0] = turn
            status = jit.allgatherv(handle, send, recv, counts, displs)
            if status:
                return status
        return jit.OK

    loops = {
        "barrier": barrier,
        "allreduce": allreduce,
        "broadcast": broadcast,
        "allgather": allgather,
    }
    return comm.close, loops, comm.rank, comm.size


def theirs() -> tuple[Any, dict[str, Any], int, int]:
    """Return the same with numba-mpi."""
    import numba_mpi
    from mpi4py import MPI

    @numba.njit
    def barrier(send: Any, recv: Any, turns: int) -> int:
        for _ in range(turns):
            status = numba_mpi.barrier()
            if status:
                return status
        return 0

    @numba.njit
    def allreduce(send: Any, recv: Any, turns: int) -> int:
        for turn in range(turns):
            send[0] = turn
            status = numba_mpi.allreduce(send, recv[: send.size], numba_mpi.Operator.SUM)
            if status:
                return status
        return 0

    @numba.njit
    def broadcast(send: Any, recv: Any, turns: int) -> int:
        for turn in range(turns):
            send[0] = turn
            status = numba_mpi.bcast(send, 0)
            if status:
                return status
        return 0

    @numba.njit
    def allgather(send: Any, recv: Any, turns: int) -> int:
        for turn in range(turns):
            send[0] = turn
            status = numba_mpi.allgather(send, recv, send.size)
            if status:
                return status
        return 0

    loops = {
        "barrier": barrier,
        "allreduce": allreduce,
        "broadcast": broadcast,
        "allgather": allgather,
    }
    return MPI.Finalize, loops, numba_mpi.rank(), numba_mpi.size()


@numba.njit
def changes(send: Any, recv: Any, turns: int) -> int:
    """Change the send buffer, as the loops do."""
    for turn in range(turns):
        send[0] = turn
    return 0


def be_rank(kind: str, out: Path) -> None:
    """Be one rank of a launch."""
    close, loops, rank, size = ours() if kind == "ours" else theirs()
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[rank % len(cpus)]})
    one, room = np.ones(1), np.zeros(size)

    def seconds(loop: Any, send: Any, recv: Any, turns: int) -> float:
        loops["barrier"](one, room, 1)
        begun = time.perf_counter()
        status = loop(send, recv, turns) or loops["barrier"](one, room, 1)
        if status:
            raise RuntimeError(f"a collective returned {status}")
        return time.perf_counter() - begun

    found = {}
    for count, turns in TURNS.items():
        if size > len(cpus):
            turns //= 10
        send, recv = np.full(count, rank + 1.5), np.ones(count * size)
        for name, loop in loops.items():
            if name == "barrier" and count > 1:
                continue
            # Compiled, and warm.
            seconds(loop, send, recv, turns // 10)
            seconds(changes, send, recv, 1)
            whole = [seconds(loop, send, recv, turns) for _ in range(BATCHES)]
            work = [seconds(changes, send, recv, turns) for _ in range(BATCHES)]
            call = (statistics.median(whole) - statistics.median(work)) / turns * 1e6
            found[f"{name} {0 if name == 'barrier' else count * 8}"] = max(1e-3, call)
    if rank == 0:
        out.write_text(json.dumps(found))
    close()


def environments() -> Path:
    """Return the folder of the environments."""
    place = os.environ.get("MPI_ENVIRONMENTS", str(Path(sys.prefix) / "mpi"))
    return Path(place).absolute() / "numba"


def make_environment(mpi: str) -> None:
    """Make the environment of an MPI with numba-mpi, if need be."""
    folder = environments() / mpi
    script = str(ROOT / "scripts/mpi-environment")
    subprocess.run([script, mpi, str(folder), sys.executable], check=True)
    if not (folder / "has-numba-mpi").exists():
        # Its numba and mpi4py are those that are there.
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *PACKAGES], check=True)
        (folder / "has-numba-mpi").touch()


def launch(library: str, ranks: int) -> dict[str, float]:
    """Return the microseconds per call of one launch."""
    if library == "ours":
        launcher = [sys.executable, "-m", "cobre_shm.spawn", "-n", str(ranks)]
    else:
        launcher = [str(ROOT / "scripts/mpi"), library, str(ranks)]
    variables = {"MPI_PYTHON": sys.executable, "MPI_ENVIRONMENTS": str(environments())}
    with tempfile.TemporaryDirectory(prefix="cobre-bench-") as folder:
        out = Path(folder) / "out.json"
        inside = [str(HERE / "jitted.py"), "--inside", library, "--out", str(out)]
        done = subprocess.run(
            [*launcher, *inside],
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            cwd=folder,
            timeout=TIMEOUT_SECS,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{library} ended with {done.returncode}\n{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(out.read_text())
        return found


def table(ranks: int, rounds: list[dict[str, dict[str, float]]]) -> str:
    """Return times, and the ratio to the fastest MPI of each round."""
    libraries = list(rounds[0])
    mpis = [name for name in libraries if name != "ours"]
    lines = [
        f"### Jitted, {ranks} ranks, {len(rounds)} rounds; microseconds per call",
        "",
        f"| | ours / fastest | {' | '.join(libraries)} |",
        "| --- " * (len(libraries) + 2) + "|",
    ]
    for key in rounds[0]["ours"]:
        ratio = statistics.median(r["ours"][key] / min(r[m][key] for m in mpis) for r in rounds)
        times = [f"{statistics.median(r[name][key] for r in rounds):.3g}" for name in libraries]
        operation, nbytes = key.split()
        title = operation if nbytes == "0" else f"{operation} {nbytes} B"
        lines.append(f"| {title} | {ratio:.2f} | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write ``jitted.json`` and ``jitted.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--mpis", default=",".join(MPIS))
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        be_rank(args.inside, args.out)
        return
    mpis = [name for name in args.mpis.split(",") if name]
    for mpi in mpis:
        make_environment(mpi)
    args.out.mkdir(parents=True, exist_ok=True)
    rounds = []
    for number in range(args.launches):
        order = random.sample(["ours", *mpis], len(mpis) + 1)
        found = {library: launch(library, args.ranks) for library in order}
        rounds.append({library: found[library] for library in ("ours", *mpis)})
        print(f"round {number + 1} of {args.launches}", file=sys.stderr)
    text = table(args.ranks, rounds) + "\n"
    report = {"ranks": args.ranks, "load": os.getloadavg()[0], "rounds": rounds}
    (args.out / "jitted.json").write_text(json.dumps(report, indent=1))
    (args.out / "jitted.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
