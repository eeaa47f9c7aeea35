"""The collectives against MPI and Gloo on one machine: ``scripts/bench peers``.

    scripts/bench peers [--ranks 2,8] [--launches 7] [--minutes M] [--out FOLDER]
        [--peers openmpi,openmpi-sm,mpich,impi,gloo] [--ours shm,shm-plan,shm-shared]
        [--operations barrier,allreduce,allgatherv,broadcast,broadcast_once]
        [--payloads 8,1024,1048576] [--fresh]

A round launches every library once, in an order of chance, and measures the machine's limits
beside it. A round's ratio is our median over the best peer's median of that round; reported is the
median over the rounds. Launches are repeated and not only iterations, because where a launch's
pages lie and how its processes are placed stays for its whole life.

Traps of the comparison (those of a single launch are named in ``bench/collectives.py``):

- *A virtual machine's cores move.* The round trip of a cache line changes by a factor of twenty,
  memory bandwidth by two, from one minute to the next. Ratios are made within a round, never
  between rounds, and the round trip is published beside each table.
- *One launch may be twice as slow as the next*, for reasons fixed when it started: seven rounds at
  least for a figure that is quoted.
- *The order matters*: a machine gets slower when it has worked for long. So it is left to chance.
- *A peer that is missing makes us look better*: a ratio counts only in rounds in which every peer
  that ever ran has run, and the table names those that never did, with the reason.
- *Load.* Somebody else's work is in every figure; the load at each round is in the JSON.

The peers: Open MPI as it is and with its shared-memory collectives (``coll_sm_priority=90``),
MPICH, Intel MPI, each in an environment that is made if need be (``MPI_ENVIRONMENTS`` names the
place), and Gloo where there is torch: in this interpreter, or in that which ``GLOO_PYTHON`` names.

What is measured is saved after each launch. A run that was stopped, or ended after ``--minutes``,
is continued by the next with the same ``--out``, and whatever is there gives tables and plots:
``python bench/report.py FOLDER``. More than 16 MiB is measured only where every rank has a core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from collectives import LARGE_PAYLOADS, MORE_OPERATIONS, OPERATIONS, PAYLOADS, words
from report import write_report
from rounds import OURS, PEERS, is_complete, load, save

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIMEOUT_SECS = 240
VAIN_ROUNDS = 3


def command(library: str, ranks: int, options: list[str]) -> list[str]:
    """Return the command line that runs the worker with a library."""
    kind = library if library in (*OURS, "gloo") else "mpi"
    worker = [str(HERE / "collectives.py"), "--library", kind, *options]
    if library in OURS:
        return [sys.executable, "-m", "cobre_shm.spawn", "-n", str(ranks), *worker]
    if library == "gloo":
        python = os.environ.get("GLOO_PYTHON", sys.executable)
        torchrun = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        return [*torchrun, "--standalone", *worker]
    return [str(ROOT / "scripts/mpi"), library.partition("-")[0], str(ranks), *worker]


def environment(library: str) -> dict[str, str]:
    """Return the variables with which a library runs."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.setdefault("MPI_PYTHON", sys.executable)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    if library == "openmpi-sm":
        env["OMPI_MCA_coll_sm_priority"] = "90"
    return env


def run(line: list[str], env: dict[str, str], folder: str) -> tuple[int, str]:
    """Run a launcher with all it starts; return the exit code and what it said of errors."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            line,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(TIMEOUT_SECS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return 124, f"no end after {TIMEOUT_SECS} s"
        errors.seek(0)
        return code, errors.read()


def launch(library: str, ranks: int, options: list[str]) -> dict[str, Any]:
    """Run one launch; return what rank 0 wrote, or why it wrote nothing, as ``error``."""
    if library == "gloo" and "GLOO_PYTHON" not in os.environ and not has_torch():
        return {"error": "no torch; GLOO_PYTHON names an interpreter that has it"}
    with tempfile.TemporaryDirectory(prefix="cobre-bench-") as folder:
        out = Path(folder) / "out.json"
        line = command(library, ranks, [*options, "--out", str(out)])
        begun = time.monotonic()
        code, errors = run(line, environment(library), folder)
        if code == 0 and out.exists():
            found: dict[str, Any] = json.loads(out.read_text())
            return {**found, "seconds": round(time.monotonic() - begun, 1)}
    print(f"{library} ended with {code}:\n{errors[-1500:]}", file=sys.stderr)
    last = [line for line in errors.splitlines() if line.strip()] or [""]
    return {"error": f"ended with {code}: {last[-1].strip()[:200]}"}


def has_torch() -> bool:
    """Whether this interpreter has torch."""
    return importlib.util.find_spec("torch") is not None


def limits(ranks: int, payloads: list[int]) -> Any:
    """Return the limits of the machine in this minute."""
    line = [sys.executable, str(HERE / "machine.py"), "--ranks", str(ranks)]
    line += ["--payloads", ",".join(map(str, payloads))]
    done = subprocess.run(
        line, env=environment(""), capture_output=True, text=True, timeout=TIMEOUT_SECS, check=True
    )
    return json.loads(done.stdout)


def conditions(ranks: int) -> dict[str, Any]:
    """Return what must be equal for rounds to stand in one table."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    names = {line.partition(":")[2].strip() for line in cpu_lines("model name")}
    return {
        "ranks": ranks,
        "cpus": len(os.sched_getaffinity(0)),
        "processor": " / ".join(sorted(names)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit,
    }


def cpu_lines(name: str) -> list[str]:
    """Return the lines of /proc/cpuinfo that begin with a name."""
    return [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(name)]


def open_run(path: Path, ranks: int, fresh: bool) -> dict[str, Any]:
    """Return the run to go on with, or a new one."""
    now = conditions(ranks)
    if fresh or not path.exists():
        return {"conditions": now, "rounds": []}
    before = load(path)
    if before["conditions"] != now:
        differ = ", ".join(k for k in now if before["conditions"].get(k) != now[k])
        sys.exit(f"{path} was measured with another {differ}: give another --out, or --fresh")
    return before


def wanted_keys(operations: list[str], payloads: list[int]) -> list[str]:
    """Return the names of what is to be measured."""
    barrier = ["barrier 0"] if "barrier" in operations else []
    rest = [operation for operation in operations if operation != "barrier"]
    return barrier + [f"{operation} {payload}" for payload in payloads for operation in rest]


class Column:
    """One column of the comparison: all libraries, with one number of ranks."""

    def __init__(self, args: argparse.Namespace, ranks: int, until: float) -> None:
        self.path = args.out / f"peers-{ranks}.json"
        self.run = open_run(self.path, ranks, args.fresh)
        self._ranks, self._until = ranks, until
        self._libraries = [*args.ours, *args.peers]
        has_cores = ranks <= self.run["conditions"]["cpus"]
        self._payloads = [p for p in args.payloads if has_cores or p <= PAYLOADS[-1]]
        self._keys = wanted_keys(args.operations, self._payloads)
        self._options = ["--operations", ",".join(args.operations)]
        self._options += ["--payloads", ",".join(map(str, self._payloads))]
        self._options += ["--seconds", str(args.seconds)]

    def measure(self, launches: int) -> None:
        """Do rounds until there are enough, or the time is over; the first is always done.

        A library that ran once and fails since then would let no round count any more: after
        ``VAIN_ROUNDS`` of them in a row it ends too.
        """
        longest, vain = 0.0, 0
        while (before := self._rounds()) < launches:
            begun = time.monotonic()
            if longest and begun + longest > self._until:
                print(f"{self._ranks} ranks: the time is over", file=sys.stderr)
                return
            if vain == VAIN_ROUNDS:
                print(
                    f"{self._ranks} ranks: {vain} rounds in a row lacked a library that had run",
                    file=sys.stderr,
                )
                return
            self._round()
            vain = 0 if self._rounds() > before else vain + 1
            longest = max(longest, time.monotonic() - begun)
            print(
                f"{self._ranks} ranks, round {self._rounds()} of {launches}: {longest:.0f} s",
                file=sys.stderr,
            )

    def _rounds(self) -> int:
        return sum(
            is_complete(found, self._libraries, self._keys, self.run)
            for found in self.run["rounds"]
        )

    def _round(self) -> None:
        found: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "limits": limits(self._ranks, self._payloads),
            "libraries": {},
        }
        self.run["rounds"].append(found)
        order = [name for name in self._libraries if not self._failed_twice(name)]
        random.shuffle(order)
        for library in order:
            found["libraries"][library] = launch(library, self._ranks, self._options)
            save(self.path, self.run)

    def _failed_twice(self, library: str) -> bool:
        rounds = [found["libraries"] for found in self.run["rounds"]]
        launches = [found[library] for found in rounds if library in found]
        return len(launches) > 1 and all("error" in found for found in launches)


def size(text: str) -> int:
    """Read a payload: bytes, or with K or M for KiB and MiB."""
    units = {"K": 1 << 10, "M": 1 << 20}
    number = int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
    if number < 8 or number % 8:
        raise argparse.ArgumentTypeError(f"{text}: payloads are multiples of 8 bytes")
    return number


def sizes(text: str) -> list[int]:
    """Read a list of payloads."""
    return [size(word) for word in words(text)]


def chosen_from(known: tuple[str, ...]) -> Any:
    """Return a reader of lists of known names."""

    def read(text: str) -> list[str]:
        for word in words(text):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word}: known are {', '.join(known)}")
        return words(text)

    return read


def main() -> None:
    """Measure, and write tables and plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", default="2,8")
    add("--launches", type=int, default=7, help="rounds to have in the end (%(default)s)")
    add("--minutes", type=float, default=float("inf"), help="begin no round that would end later")
    add("--peers", type=chosen_from(PEERS), default=list(PEERS))
    add("--ours", type=chosen_from(OURS), default=list(OURS))
    add(
        "--operations",
        type=chosen_from((*OPERATIONS, *MORE_OPERATIONS)),
        default=[*OPERATIONS, *MORE_OPERATIONS],
    )
    add("--payloads", type=sizes, default=[*PAYLOADS, *LARGE_PAYLOADS])
    add("--seconds", type=float, default=0.01, help="of each batch (%(default)s)")
    add("--out", type=Path, default=Path("bench-results"))
    add("--fresh", action="store_true", help="forget what FOLDER has")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    columns = [int(word) for word in words(args.ranks)]
    begun = time.monotonic()
    for number, ranks in enumerate(columns):
        share = args.minutes * 60 * (number + 1) / len(columns)
        Column(args, ranks, begun + share).measure(args.launches)
    print(write_report(args.out))


if __name__ == "__main__":
    main()
