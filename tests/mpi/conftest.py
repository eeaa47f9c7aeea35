"""Programs under real MPIs, each in an environment of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cobre_shm.selection.launchers import LAUNCHER_VARIABLES
from tests.sddp.results import values
from tests.support.processes import processes_with

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).with_name("programs")
SHARED = Path("/dev/shm")
NO_NETWORK = 69
# Ends what hangs; a busy machine needs tens of seconds.
WATCHDOG_SECS = 810.0
RANKS_END_SECS = 10.0
NAMES = ("mpich", "openmpi", pytest.param("impi", marks=pytest.mark.slow))


@dataclass(frozen=True)
class Ended:
    """What became of a job."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Mpi:
    """One MPI.

    Attributes:
        name: As ``scripts/mpi`` knows it.
        folder: Its virtual environment.
    """

    name: str
    folder: Path

    def run(self, size: int, *arguments: str | Path, **variables: str) -> Ended:
        """Run Python with these arguments on ``size`` ranks."""
        return run([ROOT / "scripts/mpi", self.name, str(size), *arguments], **variables)

    def program(self, size: int, name: str, *arguments: str, **variables: str) -> Ended:
        """Run ``programs/NAME.py``."""
        return self.run(size, PROGRAMS / f"{name}.py", *arguments, **variables)


def run(command: list[str | Path], **variables: str) -> Ended:
    """Run a command in a process group of its own, which is gone afterwards."""
    unwanted = (*LAUNCHER_VARIABLES, "COBRE_COMM_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= {"MPI_PYTHON": sys.executable, "MPI_ENVIRONMENTS": str(_folder()), **variables}
    env["PYTHONPATH"] = str(ROOT)
    env["TEST_JOB"] = job = uuid.uuid4().hex
    before = _segments()
    with subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=WATCHDOG_SECS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{command} did not end in {WATCHDOG_SECS} s\n{out}\n{err}")
    _remove_left(_segments() - before, f"TEST_JOB={job}")
    return Ended(process.returncode, out, err)


def _segments() -> set[Path]:
    """Return those of this user: nobody may remove another's."""
    found = set()
    for path in (path for name in ("mpich_shm_*", "sm_segment.*") for path in SHARED.glob(name)):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_uid == os.geteuid():
                found.add(path)
    return found


def _remove_left(segments: set[Path], mark: str) -> None:
    """Remove what a library leaves behind when a job is aborted; not what a process still maps.

    A rank may end after its launcher.
    """
    deadline = time.monotonic() + RANKS_END_SECS
    while segments:
        mapped = ""
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError):
                mapped += maps.read_text()
        for path in {path for path in segments if str(path) not in mapped}:
            path.unlink(missing_ok=True)
            segments.remove(path)
        if segments and time.monotonic() > deadline:
            # What only others map belongs to a run beside this one.
            assert not processes_with(mark), f"ranks have not ended, and map some of {segments}"
            return
        time.sleep(0.05 if segments else 0)


def _folder() -> Path:
    return Path(os.environ.get("MPI_ENVIRONMENTS") or Path(sys.prefix) / "mpi")


@functools.cache
def _make(name: str) -> tuple[int, str]:
    script = ROOT / "scripts/mpi-environment"
    made = run([script, name, _folder() / name, sys.executable])
    return made.code, made.stderr


def get_mpi(name: str) -> Mpi:
    """Return an MPI; without a network, which alone may bring it, the test is skipped."""
    code, said = _make(name)
    if code == NO_NETWORK:
        reason = (re.findall(r"^.*connect.*$", said, re.MULTILINE | re.IGNORECASE) or [said])[0]
        pytest.skip(f"no {name}: the package index cannot be reached: {reason[-300:]}")
    assert code == 0, said
    return Mpi(name, _folder() / name)


@pytest.fixture(params=NAMES)
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Every MPI in turn."""
    return get_mpi(request.param)


@pytest.fixture
def all_of_them() -> Callable[[str], Mpi]:
    """To have two in one test."""
    return get_mpi


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], bytes]:
    """Files of a training in one process, without MPI."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "cobre_shm.sddp", "--iterations", "2", "--output-dir", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=720, cwd=ROOT)
    return values(folder)
