"""Every fenced block of README is run, and every command in its text; none may be left out.

Blocks run in the order of the page and in one folder, as a reader would, by ``bash -eu``. What
cannot be run as it stands is given a stand-in, or is named with the test that runs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.local import LocalCommunicator
from tests.mpi.conftest import get_mpi, run
from tests.support.backends import free_port
from tests.support.processes import started

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SHELL = [body for kind, body in BLOCKS if kind == "bash"]
PROGRAMS = {
    body.split("\n")[0].removeprefix("# "): body for kind, body in BLOCKS if kind == "python"
}


@dataclass(frozen=True)
class Runs:
    """The block is run here; each text is somewhere in its output."""

    said: tuple[str, ...]
    needs: str | None = None


@dataclass(frozen=True)
class Elsewhere:
    """A test in another file runs it, or what it starts."""

    file: str
    mark: str


# By first line.
SHELL_BLOCKS = {
    "scripts/train": Elsewhere("tests/spawn/test_scripts.py", '"train"'),
    "scripts/test": Elsewhere("tests/spawn/test_scripts.py", '"test"'),
    "python mean.py": Runs(("1 rank(s) over local", "4 rank(s) over shm", "4 rank(s) over tcp")),
    "python -m cobre_shm.spawn -n 2 jitted.py": Runs(("rank 0:", "rank 1:")),
    'pip install "cobre-shm[sddp]"': Runs(("results",), needs="sddp"),
    "(umask 077; head -c 32 /dev/urandom | base64 > run.secret)": Runs(("8 rank(s) over tcp",)),
    "export COBRE_COMM_BACKEND=tcp COBRE_TCP_COORDINATOR=$(scontrol show hostnames | head -n1)"
    ":29500": Runs(("2 rank(s) over tcp",)),
    'pip install "cobre-shm[mpi,sddp]" mpich': Elsewhere("tests/mpi/test_behaviour.py", "sddp"),
    "python -m cobre_shm.sddp CASE --output-dir results --checkpoint-every 10 --resume": Runs(
        ("results",), needs="sddp"
    ),
    'pip install "cobre-shm[mcp,sddp]"': Elsewhere("tests/mcp_server/test_process.py", "--allow"),
}
# In the text: what is asked of a program to see that the command line is one.
HELP, UNDER_MPI = "asked for its help", "asked for its help, where there is an MPI"
TEXT_COMMANDS = {
    "scripts/train -n 4 -m cobre_shm.sddp CASE": Elsewhere("tests/spawn/test_scripts.py", "train"),
    "scripts/mpi mpich 4 -m cobre_shm.sddp": Elsewhere("tests/mpi/conftest.py", "scripts/mpi"),
    "scripts/slurm FOLDER COMMAND...": Elsewhere("tests/mpi/test_slurm.py", "scripts/slurm"),
    "scripts/bench peers": Elsewhere("tests/spawn/test_scripts.py", '["peers", "--ranks"'),
    "scripts/bench gates": Elsewhere("tests/spawn/test_scripts.py", '["gates"'),
    "scripts/bench safety": Elsewhere("tests/spawn/test_scripts.py", '["safety"]'),
    "scripts/bench jitted": Elsewhere("tests/spawn/test_scripts.py", '["jitted"]'),
    "python -m cobre_shm.spawn -n N [options] PROGRAM [arguments]": HELP,
    "python -m cobre_shm.spawn -n 4 x.py": HELP,
    "python -m cobre_shm.spawn --nproc-per-node 4 x.py": HELP,
    "python -m cobre_shm.spawn -n 8 --doctor": Elsewhere("tests/spawn/test_doctor.py", "--doctor"),
    "python -m cobre_shm.info": HELP,
    "python -m cobre_shm.top": HELP,
    "python -m cobre_shm.tune": HELP,
    "python bench/faults.py": HELP,
    "python bench/chaos.py --kills 10000": HELP,
    "python bench/memory.py": HELP,
    "python bench/hugepages.py --mb 128 --rounds 25": HELP,
    "python bench/readme.py": HELP,
    "bench/mpi_cost.py": UNDER_MPI,
    "bench/model.py": HELP,
    "bench/sddp_vs_cobre.py": HELP,
}
# Of others: not ours to run.
FOREIGN = ("mpiexec", "torchrun", "srun", "python -m mpi4py")


def commands_in_text():
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    words = r"python|scripts/(?!\w*[\]/)])|pip|mpiexec|srun|torchrun|bench/\w+\.py|pytest"
    return set(re.findall(rf"`((?:{words})\b[^`]*)`", prose)) - {"bench/"}


def is_known(command):
    return command in TEXT_COMMANDS or command.startswith((*FOREIGN, "pip install "))


def test_nothing_is_left_out():
    assert [first_line(body) for body in SHELL] == list(SHELL_BLOCKS)
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "text"}
    assert [kind for kind, _ in BLOCKS].count("text") == 1
    assert set(PROGRAMS) == {"mean.py", "jitted.py", "planning.py", "under_torchrun.py"}
    commands = commands_in_text()
    assert [command for command in commands if not is_known(command)] == []
    assert [command for command in TEXT_COMMANDS if command not in commands] == []


@pytest.mark.parametrize(
    "place",
    [
        place
        for place in (*SHELL_BLOCKS.values(), *TEXT_COMMANDS.values())
        if isinstance(place, Elsewhere)
    ],
    ids=lambda place: place.file,
)
def test_tests_elsewhere_are_there(place):
    assert place.mark in (ROOT / place.file).read_text()


def test_extras_that_are_installed_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"cobre-shm\[([\w,]+)\]", TEXT)
    assert named
    assert {extra for names in named for extra in names.split(",")} <= set(
        project["optional-dependencies"]
    )


@pytest.mark.parametrize("command", [c for c, how in TEXT_COMMANDS.items() if how == HELP])
def test_command_in_the_text_is_one(command):
    words = command.removeprefix("python ").split()
    words = words[:2] if words[0] == "-m" else [str(ROOT / words[0])]
    done = subprocess.run(
        [sys.executable, *words, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
    for option in re.findall(r" (--?[a-z][\w-]*)", command.removeprefix("python -m ")):
        assert re.search(rf"{option}\b", done.stdout), option


@pytest.mark.parametrize("command", [c for c, how in TEXT_COMMANDS.items() if how == UNDER_MPI])
def test_command_for_mpi_is_one(command):
    done = get_mpi("mpich").run(1, ROOT / command, "--help")
    assert done.code == 0, done.stderr
    assert "usage" in done.stdout


def first_line(body):
    return without_comment(body.split("\n")[0])


def without_comment(line):
    return re.sub(r"\s+# .*$", "", line)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of a reader who follows the page, with a PATH that has what the page assumes."""
    folder = tmp_path_factory.mktemp("reader")
    for name, body in PROGRAMS.items():
        (folder / name).write_text(body)
    tools = folder / "bin"
    tools.mkdir()
    write_tool(tools / "python", f'exec "{sys.executable}" "$@"')
    write_tool(tools / "scontrol", "echo 127.0.0.1; echo other-node")
    # Two tasks, as srun would start them.
    task = 'SLURM_NTASKS=2 SLURM_PROCID=$number "$@" &'
    write_tool(tools / "srun", f"for number in 0 1; do {task} done; wait")
    if is_there("highspy", "pyarrow"):
        from cobre_shm.sddp import shipped_case_path

        shutil.copytree(shipped_case_path(), folder / "CASE")
    return folder


def write_tool(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def is_there(*modules):
    return all(map(importlib.util.find_spec, modules))


@pytest.mark.parametrize(
    "first", [first for first, how in SHELL_BLOCKS.items() if isinstance(how, Runs)]
)
def test_block_runs_as_it_stands(reader, first):
    how = SHELL_BLOCKS[first]
    lines = SHELL[list(SHELL_BLOCKS).index(first)].splitlines()
    if how.needs == "sddp" and not is_there("highspy", "pyarrow"):
        pytest.skip('needs the extra "sddp"')
    if not is_there("matplotlib"):
        lines = [line for line in lines if " report " not in line]
    lines = [line for line in lines if not line.startswith("pip install")]
    script = "\n".join(map(without_comment, lines)).replace("29500", str(free_port()))
    if "--node-rank" in script:
        # The lines of two machines, one after the other here: the first must not wait.
        script = script.replace("node-0:", "127.0.0.1:")
        script = re.sub(r"(--node-rank 0 .*)", r"\1 &", script) + "\nwait"
    path = os.pathsep.join([str(reader / "bin"), "/usr/local/bin", "/usr/bin", "/bin"])
    done = run_here(["bash", "-eu", "-c", script], reader, PATH=path, PYTHONPATH=str(ROOT))
    for text in how.said:
        assert text in done.stdout


def run_here(command, folder, **env):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COBRE_")}
    done = subprocess.run(
        command,
        env={**kept, **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=720,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_planning_program(reader):
    if not is_there("highspy", "pyarrow", "pandas"):
        pytest.skip('needs the extra "sddp", and pandas')
    run_here([sys.executable, "planning.py"], reader, PYTHONPATH=str(ROOT))


def test_program_under_torchrun(reader):
    """With the variables that torchrun sets, in as many processes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                started(
                    [sys.executable, "under_torchrun.py"],
                    env={**env, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
                    cwd=reader,
                )
            )
            for rank in range(2)
        ]
        assert [rank.wait(timeout=360) for rank in ranks] == [0, 0]


def test_mpiexec_line_of_the_page():
    mpi = get_mpi("mpich")
    script = next(body for body in SHELL if "mpiexec" in body)
    line = next(line for line in script.splitlines() if line.startswith("mpiexec"))
    if not is_there("highspy", "pyarrow"):
        pytest.skip('needs the extra "sddp"')
    path = os.pathsep.join([str(mpi.folder / "bin"), "/usr/bin", "/bin"])
    # More ranks than cores: see scripts/mpi.
    yielding = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
    done = run(["bash", "-c", line], PATH=path, **yielding)
    assert done.code == 0, done.stderr
    assert "4 ranks, backend mpi" in done.stdout


def test_equivalents_of_mpi4py_are_calls_that_exist():
    table = TEXT.split("<!-- mpi4py-table -->")[1].split("<!-- /mpi4py-table -->")[0]
    ours = [line.split("|")[2] for line in table.splitlines()[3:]]
    with LocalCommunicator() as comm:
        values = {
            "comm": comm,
            "send": np.ones(4),
            "recv": np.zeros(4),
            "buf": np.ones(4),
            "counts": [4],
            "displs": [0],
        }
        seen = 0
        for call in re.findall(r"`((?:plan = )?comm\.[^`]*|plan\(\))`", "".join(ours)):
            if call.startswith("comm.abort"):
                with pytest.raises(SystemExit):
                    exec(call, {}, values)
            else:
                exec(call, {}, values)
            seen += 1
    assert seen >= 12


def test_failure_shown_is_the_failure_seen():
    shown = re.search(r"```text\n\$ (python .*?)\n\.\.\.\n(.*?)```", TEXT, re.DOTALL)
    code = re.search(r"-c '(.*)'", shown[1], re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-m", "cobre_shm.spawn", "-n", "2", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    pattern = re.escape(shown[2].strip()).replace("4242", r"\d+")
    assert re.search(pattern, done.stderr), done.stderr
