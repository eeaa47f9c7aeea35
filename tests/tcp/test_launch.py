"""Ranks started by the launcher, to meet over tcp: on one machine, and as if on several."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from tests.support.backends import free_port
from tests.support.processes import started

PROGRAM = """
import os, sys
import numpy as np
import cobre_shm

def show():
    names = sorted(name for name in os.environ if name.startswith("COBRE_"))
    secret = os.environ.get("COBRE_TCP_SECRET_FILE", "")
    return f"{' '.join(names)} {secret[:3]}"

with cobre_shm.create_communicator() as comm:
    total = comm.allreduce(np.array([comm.rank + 1.0]))
    large = comm.allreduce(np.full(100_000, comm.rank + 1.0))
    assert (large == total[0]).all()
    local = int(os.environ["LOCAL_RANK"])
    sys.stdout.write(f"rank {comm.rank} of {comm.size} over {comm.backend}, "
                     f"here {local}, sum {total[0]:g}\\n")
    if comm.rank == 0:
        sys.stdout.write(show() + "\\n")
    comm.barrier()
    EXTRA
"""


def command(*options, extra="pass"):
    return [
        sys.executable,
        "-m",
        "cobre_shm.spawn",
        "--backend",
        "tcp",
        *options,
        "-c",
        PROGRAM.replace("EXTRA", extra),
    ]


def environment(**extra):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("COBRE_")}
    return {**clean, **extra}


def run(*options, extra="pass", **env):
    return subprocess.run(
        command(*options, extra=extra),
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
        env=environment(**env),
    )


@pytest.mark.parametrize("size", [1, 3, 8])
def test_ranks_on_one_machine_meet_without_any_setting(size):
    done = run("-n", str(size))
    assert done.returncode == 0, done.stderr
    total = size * (size + 1) // 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank")]
    assert sorted(lines) == [
        f"rank {rank} of {size} over tcp, here {rank}, sum {total}" for rank in range(size)
    ]


def test_secret_is_in_no_command_line_and_no_variable_and_always_set():
    done = run("-n", "2", COBRE_TCP_PORT="1", COBRE_TCP_RANK="7", COBRE_SHM_NAME="/x")
    assert done.returncode == 0, done.stderr
    names = next(line for line in done.stdout.splitlines() if "COBRE_TCP_RANK" in line)
    # Rank 0 hears the listening socket; nobody is told the secret itself.
    assert names.split() == [
        "COBRE_COMM_BACKEND",
        "COBRE_TCP_BIND_ADDR",
        "COBRE_TCP_COORDINATOR",
        "COBRE_TCP_RANK",
        "COBRE_TCP_REPORT",
        "COBRE_TCP_SECRET_FILE",
        "COBRE_TCP_SIZE",
        "fd:",
    ]


def test_secret_of_the_user_leaves_the_environment():
    done = run("-n", "2", COBRE_TCP_SECRET="of the user")
    assert done.returncode == 0, done.stderr
    names = next(line for line in done.stdout.splitlines() if "COBRE_TCP_RANK" in line)
    assert "COBRE_TCP_SECRET " not in names


def test_launchers_of_two_nodes_start_one_group(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("shared by both nodes\n")
    secret.chmod(0o600)
    options = ["--nnodes", "2", "--coordinator", f"127.0.0.1:{free_port()}", "-n", "4", "-l"]
    env = environment(COBRE_TCP_SECRET_FILE=str(secret))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                started(command(*options, "--node-rank", str(node)), env=env, **pipes)
            )
            # The second node first: it waits for the coordinator.
            for node in (1, 0)
        ]
        ended = [node.communicate(timeout=360) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    second, first = (
        sorted(line for line in out.splitlines() if "rank" in line) for out, _ in ended
    )
    assert first == [f"[{r}] rank {r} of 8 over tcp, here {r}, sum 36" for r in range(4)]
    assert second == [f"[{r}] rank {r} of 8 over tcp, here {r - 4}, sum 36" for r in range(4, 8)]


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        ("if comm.rank == 2: os._exit(3)", 3, "Rank 2 of 3"),
        ("if comm.rank == 0: os._exit(5)", 5, "Rank 0 of 3"),
        ("if comm.rank == 1: os.kill(os.getpid(), 9)", 137, "Rank 1 of 3"),
        ("if comm.rank == 2: comm.abort(9)", 9, "called abort(9)"),
        ("if comm.rank == 1: raise ArithmeticError('mine')", 1, "ArithmeticError: mine"),
    ],
)
def test_first_failing_rank_decides_the_exit_code(extra, code, words):
    done = run("-n", "3", extra=f"{extra}\n    comm.barrier()")
    assert done.returncode == code, done.stderr
    before, _, report = done.stderr.partition("cobre_shm.spawn: The run has failed:")
    # What the rank wrote is repeated unless it stands directly before.
    assert words in before.rstrip().rpartition("\n")[2] + report


def test_failure_is_reported_as_json_with_the_rank_of_the_whole_run():
    secret = {"COBRE_TCP_SECRET": "x"}
    options = ["--nnodes", "2", "--coordinator", f"127.0.0.1:{free_port()}", "-n", "1"]
    extra = "\n    if comm.rank == 1: os._exit(3)\n    comm.barrier()"
    with started(
        command(*options, "--node-rank", "0", extra=extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**secret),
    ) as first:
        second = run(*options, "--node-rank", "1", "--output-format", "json", extra=extra, **secret)
        _, other = first.communicate(timeout=180)
    assert second.returncode == 3
    told = json.loads(second.stderr.splitlines()[-1])
    assert told["context"]["rank"] == 1
    assert told["context"]["size"] == 2
    # On the other node the rank suffers from it, and says from what.
    assert first.returncode == 1
    assert "Rank 1 (pid" in other
    assert "died" in other


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        (["-n", "2", "--nnodes", "2"], {}, "--coordinator"),
        (["-n", "2", "--nnodes", "2", "--node-rank", "2"], {}, "--node-rank 2"),
        (["-n", "2", "--node-rank", "-1"], {}, "--node-rank -1"),
        (["-n", "2", "--nnodes", "2", "--coordinator", "node-0:29500"], {}, "need a secret"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, env, words):
    done = run(*options, **env)
    assert done.returncode == 1
    assert words in done.stderr


def test_coordinator_that_cannot_be_listened_on_is_a_backend_error():
    options = ["-n", "2", "--nnodes", "2", "--coordinator", "127.0.0.1:99999"]
    done = run(*options, COBRE_TCP_SECRET="x")
    assert done.returncode == 4
    assert "127.0.0.1:99999" in done.stderr


def test_network_options_need_the_tcp_backend():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cobre_shm.spawn", "-n", "2"),
            *("--backend", "shm", "--nnodes", "2", "-c", "pass"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1
    assert "--backend tcp" in done.stderr


def test_late_rank_is_named_after_the_seconds_of_the_option(tmp_path):
    go = tmp_path / "go"
    late = f"import time\n    while comm.rank and not os.path.exists({str(go)!r}): time.sleep(0.01)"
    with subprocess.Popen(
        command("-n", "2", "--stall-warn", "0.3", extra=f"{late}\n    comm.barrier()"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The option counts, where there are both.
        env=environment(COBRE_TCP_STALL_WARN_SECS="600"),
    ) as process:
        try:
            # A slow start may be told of before.
            told = next(line for line in process.stderr if "for rank 1 (pid" in line)
            go.touch()
            out, err = process.communicate(timeout=360)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "ranks have waited" in told
    names = next(line for line in out.splitlines() if "COBRE_TCP_RANK" in line)
    assert "COBRE_TCP_STALL_WARN_SECS" in names
    assert "COBRE_SHM_STALL_WARN_SECS" not in names


@pytest.mark.parametrize(
    ("env", "is_taken"),
    [
        ({"COBRE_TCP_INSECURE": "1"}, True),
        ({"COBRE_TCP_SECRET": "x"}, True),
        ({"COBRE_TCP_INSECURE": "0"}, False),
        ({"COBRE_TCP_INSECURE": ""}, False),
    ],
)
def test_nodes_need_a_secret_unless_it_is_said_that_they_need_none(env, is_taken):
    at = ["-n", "1", "--nnodes", "2", "--coordinator", "node-0:29500"]
    done = run("--dry-run", *at, **env)
    assert (done.returncode == 0) == is_taken, done.stderr
    assert ("need a secret" in done.stderr) != is_taken
