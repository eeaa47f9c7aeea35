"""The scripts for people and for CI, with a stand-in for Python that tells what it is asked."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Notes its arguments, except for the questions that the scripts ask of every interpreter.
STAND_IN = """#!/bin/sh
case "$*" in
    *version_info*) exit {is_old} ;;
    *ensurepip*) exit {has_no_venv} ;;
    *fcntl*|*"pip --version"*) exit 0 ;;
    --version) echo Python 3.x; exit 0 ;;
esac
for word in "$@"; do printf '%s\\n' "$word"; done >>"{log}"
"""


class Checkout:
    def __init__(self, folder):
        self.root = folder / "check out"
        self.venv = folder / "venv"
        self.log = folder / "log"
        self.base = folder / "python"
        (self.root / "scripts").mkdir(parents=True)
        for script in (ROOT / "scripts").iterdir():
            if script.is_file():
                shutil.copy(script, self.root / "scripts")
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.stand_in(self.base)
        self.stand_in(self.venv / "bin" / "python")

    def stand_in(self, path, *, is_old=0, has_no_venv=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.format(is_old=is_old, has_no_venv=has_no_venv, log=self.log))
        path.chmod(0o755)

    def run(self, script, *arguments, **env):
        self.log.unlink(missing_ok=True)
        return subprocess.run(
            [self.root / "scripts" / script, *arguments],
            env={"PATH": "/usr/bin:/bin", "PYTHON": self.base, "VENV_DIR": self.venv, **env},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

    def asked(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize(
    ("script", "extras", "arguments", "last"),
    [
        ("train", "sddp", [], ["-m", "cobre_shm.spawn", "-n", "8"]),
        (
            "train",
            "sddp",
            ["-n", "4", "-m", "m", "a b"],
            ["-m", "cobre_shm.spawn", "-n", "8", "-n", "4", "-m", "m", "a b"],
        ),
        ("test", "report,test", ["-k", "a b"], ["-m", "pytest", "-k", "a b"]),
        (
            "coverage",
            "report,test,check",
            ["-k", "a b"],
            ["-m", "pytest", "--cov", "--cov-report=term-missing:skip-covered", "-k", "a b"],
        ),
        (
            "bench",
            "all,test",
            ["gates", "-k", "a b"],
            ["-m", "pytest", "bench", "--benchmark-only", "-p", "no:cacheprovider", "-k", "a b"],
        ),
        ("bench", "all,test", ["peers", "--ranks", "2"], ["bench/peers.py", "--ranks", "2"]),
        ("bench", "all,test", ["safety"], ["bench/safety.py"]),
        ("bench", "all,test", ["jitted"], ["bench/jitted.py"]),
    ],
)
def test_script_installs_once_and_passes_its_arguments(checkout, script, extras, arguments, last):
    install = f"--editable\n{checkout.root}[{extras}]".splitlines()
    first = checkout.run(script, *arguments)
    assert first.returncode == 0
    assert checkout.asked()[-len(last) - 2 :] == [*install, *last]
    again = checkout.run(script, *arguments)
    assert checkout.asked() == last
    assert (again.stdout, again.stderr) == ("", "")
    (checkout.root / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    checkout.run(script, *arguments)
    assert checkout.asked()[-len(last) - 2 :] == [*install, *last]


def test_failed_installation_is_tried_again(checkout):
    stand_in = checkout.venv / "bin" / "python"
    text = stand_in.read_text()
    stand_in.write_text(
        text.replace("for word", 'case "$*" in *install*) exit 1 ;; esac\nfor word')
    )
    assert checkout.run("train").returncode == 1
    assert checkout.asked() == []
    stand_in.write_text(text)
    assert checkout.run("train").returncode == 0
    assert "install" in checkout.asked()


@pytest.mark.parametrize(
    ("lack", "word"),
    [({"is_old": 1}, "3.11 or newer"), ({"has_no_venv": 1}, "ensurepip")],
)
def test_python_that_will_not_do_is_refused(checkout, lack, word):
    shutil.rmtree(checkout.venv)
    checkout.stand_in(checkout.base, **lack)
    done = checkout.run("train")
    assert done.returncode == 1
    assert word in done.stderr
    assert not checkout.venv.exists()


def test_missing_python_is_named(checkout):
    done = checkout.run("train", PYTHON="/absent/python")
    assert done.returncode == 1
    assert "/absent/python" in done.stderr


def test_environment_with_an_old_python_is_made_again(checkout):
    checkout.stand_in(checkout.venv / "bin" / "python", is_old=1)
    checkout.run("train")
    assert checkout.asked()[:4] == ["-m", "venv", "--clear", str(checkout.venv)]


def test_check_runs_everything_and_fails_if_one_does(checkout):
    stand_in = checkout.venv / "bin" / "python"
    stand_in.write_text(stand_in.read_text() + 'case "$*" in *"ruff check"*) exit 1 ;; esac\n')
    done = checkout.run("check")
    assert done.returncode == 1
    asked = " ".join(checkout.asked())
    for part in ("ruff check .", "ruff format --check .", "-m mypy", "lint_imports"):
        assert part in asked


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("bench", [], "gates|peers|safety|jitted|report"),
        ("bench", ["gate"], "gates|peers|safety|jitted|report"),
        ("bench", ["--help"], "gates|peers|safety|jitted|report"),
        ("mpi", [], "mpich|openmpi|impi N ARGUMENTS OF PYTHON"),
        ("mpi", ["mpich", "2"], "mpich|openmpi|impi N ARGUMENTS OF PYTHON"),
        ("mpi", ["mpick", "2", "x.py"], "mpich|openmpi|impi N ARGUMENTS OF PYTHON"),
        ("mpi-environment", [], "mpich|openmpi|impi FOLDER PYTHON"),
        ("mpi-environment", ["mpich", "folder"], "mpich|openmpi|impi FOLDER PYTHON"),
    ],
)
def test_wrong_use_is_told_before_anything_is_made(checkout, script, arguments, words):
    shutil.rmtree(checkout.venv)
    done = checkout.run(script, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"usage: {checkout.root}/scripts/{script} {words}" + (
        " [OPTIONS]" if script == "bench" else ""
    )
    assert (done.stdout, checkout.asked()) == ("", [])
    assert not checkout.venv.exists()


def test_mpi_that_is_none_of_ours_is_named_before_anything_is_made(checkout, tmp_path):
    folder = tmp_path / "mpi"
    done = checkout.run("mpi-environment", "lam", folder, checkout.base)
    assert (done.returncode, done.stdout, checkout.asked()) == (1, "", [])
    assert done.stderr == "There is no MPI named lam here: mpich, openmpi or impi.\n"
    assert not folder.exists()
