"""The table of exit codes, each by a command line that ends with it."""

import json
import shutil
import signal

import pytest

from cobre_shm.sddp import shipped_case_path

pytestmark = pytest.mark.parametrize("spawn", ["zygote", "spawn"], indirect=True)

STUCK = "import time; print('up', flush=True); time.sleep(3600)"


def edit(case, **changes):
    content = json.loads((case / "config.json").read_text())
    content["training"].update(changes)
    (case / "config.json").write_text(json.dumps(content))


@pytest.fixture
def case(tmp_path):
    return shutil.copytree(shipped_case_path(), tmp_path / "case")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-c", "pass"], 0),
        (["--grace", "soon", "-c", "pass"], 1),
        (["-c", "raise SystemExit(77)"], 77),
        (["-c", "raise ValueError"], 1),
        (["--timeout", "0.5", "-c", STUCK], 124),
        (["/dev/null"], 126),
        (["--no-python", "/dev/null"], 126),
        (["absent.py"], 127),
        (["-m", "absent"], 127),
        (["-c", "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"], 138),
        (["-c", "import os; os.kill(os.getpid(), 9)"], 137),
    ],
)
def test_program_and_launcher(spawn, arguments, code):
    assert spawn.run("-n", 2, *arguments).returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_launcher(spawn, number):
    process = spawn.start("-n", 2, "-c", STUCK)
    assert [process.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number


def test_trainer_tells_configuration_data_backend_and_checkpoint_apart(spawn, case):
    pytest.importorskip("highspy")
    train = ("-n", 2, "-m", "cobre_shm.sddp", case, "--quiet")

    def code(*arguments, **env):
        done = spawn.run(*train, *arguments, env=env)
        assert b"Traceback" not in done.stderr
        return done.returncode

    assert code(COBRE_SHM_TIMEOUT_SECS="soon") == 4
    assert code("--warm-start", "absent") == 5
    edit(case, forward_passes="many")
    assert code() == 2
    (case / "stages.json").write_text("{}")
    edit(case, forward_passes=1)
    assert code() == 3


def test_error_of_a_peer_never_decides(spawn):
    pytest.importorskip("posix_ipc")
    spawn.write(
        "program.py",
        "import signal, sys, cobre_shm\n"
        # A survivor may need longer to speak than the launcher waits before it asks.
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "comm = cobre_shm.create_communicator()\n"
        "comm.barrier()\n"
        "if comm.rank == 2: sys.exit(33)\n"
        "comm.barrier()",
    )
    done = spawn.run("-n", 4, "--grace", 60, "program.py")
    assert done.returncode == 33
    assert done.stderr.count(b"RankFailed: Rank 2 ") >= 3
