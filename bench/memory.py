"""How much memory the ranks of a run take together, with a large opening tree.

    python bench/memory.py [--ranks 8] [--tree-mb 200] [--backends shm,tcp,mpi] [--mpi mpich]

The case is the shipped one with sixteen copies of its cascade and so many openings that the tree
has the given size. Every rank reads the case and simulates two trajectories, which needs the tree
and the bounds made from it, and few problems. The output is a table in Markdown.

What is measured is PSS, the resident memory with each page divided by the number of processes
that have it mapped (``/proc/PID/smaps_rollup``), summed over the ranks, and of that the largest sum
seen in a run. The same run with a tree of one opening a stage gives the *interpreters*. One rank
with the large tree, less one rank with the small one, is *the data*.

    shm      the ranks share one copy: at most 1.15 x the data + the interpreters, or exit code 1
    tcp      each rank has its own copy, as on several machines
    mpi      started by ``scripts/mpi``: the ranks of one machine share as those of shm do

The ranks hold everything at one time, because the simulation ends with a collective.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from remeasure import first_within

from cobre_shm.selection.registry import read_registry

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ("shm", "tcp", "mpi")
CASCADES = 16
LIMIT = 1.15
_TRAJECTORIES = 2
_LOOK_SECS = 0.2
_GRACE_SECS = 10.0
_MB = 1e6
RANK_FLAG = "--rank-of"


def rank_program(path: str) -> None:
    """Be one rank: hold the case, its tree and its bounds, and use them."""
    from cobre_shm import create_communicator
    from cobre_shm.sddp import share_case, simulate
    from cobre_shm.sddp.cuts import StageCuts

    with create_communicator() as comm:
        case = share_case(path, comm)
        none = np.zeros(0, dtype=np.int64)
        cuts = StageCuts(np.zeros(0), np.zeros((0, case.state_size)), none, none)
        result = simulate(case, [cuts] * case.stages, comm, _TRAJECTORIES)
        if comm.rank == 0:
            print(json.dumps(result.total_cost.tolist()), flush=True)


def make_case(path: Path, tree_bytes: int) -> int:
    """Write the case; return the size of its tree in bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cobre_shm.sddp import shipped_case_path

    shutil.copytree(shipped_case_path(), path)

    def edit(name, change):
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))

    def copies(items, *keys):
        count = 1 + max(item[keys[0]] for item in items)
        for turn in range(CASCADES):
            for item in items:
                moved = {key: item[key] + turn * count for key in keys if item.get(key) is not None}
                yield item | moved

    stages = json.loads((path / "stages.json").read_text())["stages"]
    name = path / "scenarios" / "inflow_seasonal_stats.parquet"
    table = pq.read_table(name)
    rows = list(copies(table.to_pylist(), "hydro_id"))
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), name)
    hydros = len({row["hydro_id"] for row in rows})
    row_bytes = 8 * hydros
    openings = max(1, tree_bytes // (len(stages) * row_bytes))

    def grow(content):
        for stage in content["stages"]:
            stage["num_scenarios"] = openings

    edit("stages.json", grow)
    edit(
        "system/hydros.json",
        lambda content: content.update(
            hydros=list(copies(content["hydros"], "id", "downstream_id"))
        ),
    )
    edit(
        "initial_conditions.json",
        lambda content: content.update(storage=list(copies(content["storage"], "hydro_id"))),
    )
    return len(stages) * openings * row_bytes


def start_under_mpi(name: str, size: int, case: Path) -> subprocess.Popen[str]:
    """Start the ranks of a run as a user with an MPI would."""
    return subprocess.Popen(
        [
            ROOT / "scripts/mpi",
            name,
            str(size),
            str(Path(__file__).resolve()),
            RANK_FLAG,
            str(case),
        ],
        env={**os.environ, "MPI_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def ranks_below(pid: int) -> list[int]:
    """Return the pids of ranks among a launcher's descendants."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                # The launcher's command line has the flag as well.
                is_rank = RANK_FLAG.encode() in words[:3]
                found += [child] if is_rank else ranks_below(child)
    return found


def start_ranks(backend: str, size: int, case: Path) -> list[subprocess.Popen[str]]:
    """Start the ranks of a run as a user without a launcher would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "shm": {"COBRE_SHM_NAME": f"/cobre-bench-{secrets.token_hex(8)}"},
        "tcp": {"COBRE_TCP_COORDINATOR": "127.0.0.1", "COBRE_TCP_PORT": str(port)},
    }[backend]
    prefix = f"COBRE_{backend.upper()}_"
    processes = []
    for rank in range(size):
        env = {
            **os.environ,
            **shared,
            "COBRE_COMM_BACKEND": backend,
            f"{prefix}RANK": str(rank),
            f"{prefix}SIZE": str(size),
            # Drawing the tree is no collective, and takes as long as it takes.
            f"{prefix}TIMEOUT_SECS": "inf",
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, RANK_FLAG, str(case)],
                env=env,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def pss_bytes(pid: int) -> int:
    """Return a process's proportional set size; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(
        (1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0
    )


def measure(backend: str, size: int, case: Path, mpi: str = "") -> tuple[float, set[str]]:
    """Return the largest sum of PSS over the ranks in MB, and what they found out."""
    if backend == "mpi":
        processes = [start_under_mpi(mpi, size, case)]
    else:
        processes = start_ranks(backend, size, case)
    largest = 0
    try:
        while any(process.poll() is None for process in processes):
            pids = [process.pid for process in processes]
            if backend == "mpi":
                pids = ranks_below(pids[0])
            largest = max(largest, sum(map(pss_bytes, pids)))
            time.sleep(_LOOK_SECS)
        results = {process.communicate()[0] for process in processes} - {""}
        if any(process.returncode for process in processes) or len(results) != 1:
            raise SystemExit(f"memory: a run of {size} ranks on {backend} failed")
    finally:
        for process in processes:
            if process.poll() is None:
                # A launcher that is asked to ends its ranks too.
                process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECS)
            process.kill()
            process.wait()
    return largest / _MB, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tree-mb", type=float, default=200.0)
    parser.add_argument("--backends", default="shm,tcp")
    parser.add_argument("--mpi", choices=("mpich", "openmpi", "impi"), default="mpich")
    parser.add_argument(RANK_FLAG, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_program(options.rank_of)
        return 0
    backends = options.backends.split(",")
    if unknown := set(backends) - set(KNOWN):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(KNOWN)}")
    with tempfile.TemporaryDirectory(prefix="cobre-memory-") as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        make_case(small, 0)
        tree = make_case(large, int(options.tree_mb * _MB)) / _MB
        alone, expected = measure("shm", 1, large)
        data = alone - measure("shm", 1, small)[0]
        print(
            f"{datetime.now(UTC):%Y-%m-%d}, Linux {platform.release()}, Python "
            f"{platform.python_version()}: a tree of {tree:.0f} MB, {data:.0f} MB of data in one "
            f"rank; {options.ranks} ranks, PSS of all in MB:\n"
        )
        print("| Backend | interpreters | with the data | (with - interpreters) / data |")
        print("| --- | --- | --- | --- |")
        failed = False
        for backend in backends:
            spec = read_registry().find(backend)
            if spec is None or spec.missing():
                print(f"| `{backend}` | not installed | | |", flush=True)
                continue

            def compared(backend: str = backend) -> tuple[float, float, float]:
                interpreters, _ = measure(backend, options.ranks, small, options.mpi)
                everything, results = measure(backend, options.ranks, large, options.mpi)
                if results != expected:
                    raise SystemExit(f"memory: {backend} gives other results")
                return interpreters, everything, (everything - interpreters) / data

            limit = LIMIT if backend == "shm" else math.inf
            found = first_within(compared, lambda found, limit=limit: found[2] <= limit)
            interpreters, everything, ratio = found[-1]
            failed |= ratio > limit
            name = f"`{backend}` ({options.mpi})" if backend == "mpi" else f"`{backend}`"
            print(f"| {name} | {interpreters:.0f} | {everything:.0f} | {ratio:.2f} |", flush=True)
    if failed:
        print(f"\nmemory: more than {LIMIT} x the data", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
