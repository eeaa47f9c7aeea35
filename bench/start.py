"""What starting costs, beside ``mpiexec`` and ``import numba``, as a table in Markdown.

    python bench/start.py [--rounds 7]

Eight ranks, beside three MPIs. Ours does one barrier; theirs imports mpi4py and numpy and does one
barrier, which is what a program of theirs would begin with. Measured are the wall time from the
start of the launcher to its end, alternating from one to the next, and the memory of all processes
of the run while all ranks stand behind the barrier, as the sum of their proportional set sizes
(PSS, shared pages counted once; nobody's memory counts that is reserved and not mapped yet, as are
17 MB of our segment).

Each limit is on the ratio to the fastest, or the smallest, of the MPIs within the same rounds, so
it holds on slow and on busy machines (``bench/test_start.py``).

One rank without a launcher: ``import cobre_shm``, a communicator of size 1 over shared memory and
an allreduce, beside ``import numpy`` and ``import numba``.

Everything runs as if it were installed: caches are warm, those of byte code too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZE = 8
ROUNDS = 7
WATCHDOG_SECS = 120.0
_GRACE_SECS = 10.0
_MARK = "START_RUN"

_OURS = "import cobre_shm; comm = cobre_shm.create_communicator(); comm.barrier()"
_FIRST = """
import os, numpy, cobre_shm
from cobre_shm.selection.kinds import ShmConfig
config = ShmConfig(name=f"/cobre-start-{os.getpid()}", rank=0, size=1)
with cobre_shm.create_communicator(config) as comm:
    comm.allreduce(numpy.zeros(1))
"""
_THEIRS = "from mpi4py import MPI; import numpy; MPI.COMM_WORLD.Barrier()"
# Behind the barrier: say so, and wait to be measured.
_STAND = """
import os, time
open(f"at-{os.getpid()}", "w").close()
while not os.path.exists("go"): time.sleep(0.01)
"""


@dataclass(frozen=True)
class System:
    """How ranks are started, and their program."""

    name: str
    launcher: list[str]
    program: str
    variables: dict[str, str]

    @contextlib.contextmanager
    def start(self, folder: Path, more: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """Start the ranks in a folder of their own; an error within ends them."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **self.variables}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        with subprocess.Popen(
            [*self.launcher, "-c", self.program + more],
            env=variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as process:
            try:
                yield process
            except BaseException:
                # The ranks may wait for us; a launcher that is asked to ends them too.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECS)
                process.kill()
                raise

    def seconds(self, folder: Path) -> float:
        """Wall time of one run."""
        begun = time.perf_counter()
        with self.start(folder) as process:
            assert process.wait(WATCHDOG_SECS) == 0, self.name
        return time.perf_counter() - begun

    def mebibytes(self, folder: Path) -> float:
        """Memory of all processes of one run, while its ranks stand behind the barrier."""
        own = folder / secrets.token_hex(4)
        own.mkdir()
        marked = System(self.name, self.launcher, self.program, {**self.variables, _MARK: own.name})
        with marked.start(own, _STAND) as process:
            deadline = time.monotonic() + WATCHDOG_SECS
            while len(list(own.glob("at-*"))) < SIZE:
                assert process.poll() is None, self.name
                assert time.monotonic() < deadline, self.name
                time.sleep(0.01)
            found = sum(_pss_kib(own.name).values()) / 1024
            (own / "go").touch()
            assert process.wait(WATCHDOG_SECS) == 0, self.name
        return found


def _pss_kib(mark: str) -> dict[int, int]:
    """The proportional set size of every process with a mark in its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                rollup = (folder / "smaps_rollup").read_text()
                found[int(folder.name)] = int(rollup.split("\nPss:")[1].split()[0])
        except OSError:
            # It has ended, or is another user's.
            continue
    return found


def ours(method: str = "zygote") -> System:
    """Our launcher."""
    words = ["-m", "cobre_shm.spawn", "--start-method", method, "-n", str(SIZE)]
    return System(f"cobre-shm, {method}", [sys.executable, *words], _OURS, {})


def theirs(home: Path) -> list[System]:
    """The MPIs, each in an environment that is made if need be."""
    is_crowded = len(os.sched_getaffinity(0)) < SIZE
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    # As in scripts/mpi: what lets each of them do its best with more ranks than cores.
    heavy_yield = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
    settings: dict[str, tuple[list[str], dict[str, str]]] = {
        "mpich": ([], heavy_yield if is_crowded else {}),
        "openmpi": (
            ["--oversubscribe", *root],
            {
                "OMPI_MCA_osc": "^ucx",
                "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            },
        ),
        "impi": (
            [],
            {"I_MPI_FABRICS": "shm", **({"I_MPI_THREAD_YIELD": "2"} if is_crowded else {})},
        ),
    }
    systems = []
    for name, (flags, variables) in settings.items():
        folder = home / name
        script = ROOT / "scripts" / "mpi-environment"
        subprocess.run([script, name, folder, sys.executable], check=True)
        programs = folder / "bin"
        launcher = [str(programs / "mpiexec"), *flags, "-n", str(SIZE), str(programs / "python")]
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        systems.append(System(name, launcher, _THEIRS, {"PATH": path, **variables}))
    return systems


def single() -> list[System]:
    """One rank of ours, and imports alone."""
    imports = {f"import {module}": f"import {module}" for module in ("numpy", "numba")}
    programs = {"first shm communicator": _FIRST, **imports}
    return [System(name, [sys.executable], text, {}) for name, text in programs.items()]


def times(systems: list[System], folder: Path, rounds: int) -> dict[str, float]:
    """Median wall times, measured in turn."""
    for system in systems:
        system.seconds(folder)
    seen = [[system.seconds(folder) for system in systems] for _ in range(rounds)]
    columns = zip(*seen, strict=True)
    return {s.name: statistics.median(c) for s, c in zip(systems, columns, strict=True)}


def memories(systems: list[System], folder: Path) -> dict[str, float]:
    """Memory of each, in MiB."""
    return {system.name: system.mebibytes(folder) for system in systems}


def ratio(found: dict[str, float]) -> float:
    """Of the first to the smallest of the others."""
    first, *others = found.values()
    return first / min(others)


def environments() -> Path:
    """Where the environments of the MPIs are, or are made."""
    return Path(os.environ.get("MPI_ENVIRONMENTS", Path(sys.prefix) / "mpi"))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    systems = [ours(), *theirs(environments()), ours("spawn")]
    with tempfile.TemporaryDirectory() as folder:
        seconds = times(systems, Path(folder), rounds)
        mebibytes = memories(systems, Path(folder))
        alone = times(single(), Path(folder), rounds)
    print(f"Load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} CPUs, {rounds} rounds\n")
    print("| | seconds | MiB (PSS) |\n| --- | --- | --- |")
    for name in seconds:
        print(f"| {name} | {seconds[name]:.2f} | {mebibytes[name]:.0f} |")
    spawn = ours("spawn").name
    for found, what in ((seconds, "time"), (mebibytes, "memory")):
        compared = {name: value for name, value in found.items() if name != spawn}
        print(f"\nRatio of {what} to the best MPI: {ratio(compared):.2f}")
    print("\n| | seconds |\n| --- | --- |")
    for name in alone:
        print(f"| {name} | {alone[name]:.3f} |")


if __name__ == "__main__":
    main()
