"""What the launcher waits for does not come, or nobody tells of it: it ends nonetheless."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cobre_shm.spawn import rank as rank_module
from cobre_shm.spawn.environment import common_environment
from cobre_shm.spawn.forking import Zygote
from cobre_shm.spawn.loop import Loop
from cobre_shm.spawn.program import resolve_program
from tests.faults import refusing
from tests.spawn import tracer

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)

GROUP = "import cobre_shm\nwith cobre_shm.create_communicator() as comm:\n    comm.barrier()"
# Says which process it is, and ends when told to.
WAIT = """
import os, time
print(os.environ["RANK"], os.getpid(), flush=True)
while not os.path.exists("enough"):
    time.sleep(0.01)
"""


@contextlib.contextmanager
def held(pid):
    """Hold a process by a debugger for the length of the block."""
    command = [sys.executable, tracer.__file__, str(pid)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        if process.stdout.readline() != b"held\n":
            # Nobody else would end what waits to be held.
            os.kill(pid, signal.SIGKILL)
            pytest.skip(process.stderr.read().decode())
        yield
        process.stdin.close()


def pids_of_two(process):
    return dict(map(int, process.stdout.readline().split()) for _ in range(2))


@pytest.mark.parametrize(("call", "code"), [("epoll_ctl", "ENOMEM"), ("shutdown", "EPERM")])
def test_run_ends_where_a_call_that_gives_something_up_is_refused(spawn, call, code):
    command = [sys.executable, refusing.__file__, code, call, *spawn.command("-n", 2, "-c", GROUP)]
    done = spawn.run(command=command)
    if done.returncode == refusing.NOT_PERMITTED:
        pytest.skip(done.stderr.decode())
    assert (done.returncode, done.stderr) == (0, b"")


def test_end_of_a_rank_is_seen_when_its_debugger_lets_it_go(spawn):
    process = spawn.start("-n", 2, "-c", WAIT)
    pids = pids_of_two(process)
    with held(pids[1]):
        spawn.write("enough", "")
        spawn.wait_for(lambda: tracer_sees_end_of(pids[1]))
    assert process.wait() == 0
    assert process.stderr.read() == b""


def tracer_sees_end_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_rank_that_cannot_be_reaped_is_named_and_left(spawn):
    code = (
        "import sys\n"
        "from cobre_shm.spawn import group\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "group.KILLED_SECS = 3.0\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["-n", "2", "--grace", "0.1", "-c", WAIT]
    process = spawn.start(command=[sys.executable, "-c", code, *words])
    pids = pids_of_two(process)
    with held(pids[1]):
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    text = f"cobre_shm.spawn: Rank 1 (pid {pids[1]}) was killed and cannot be reaped: ended\n"
    assert err.decode() == text
    assert process.returncode == 143


def test_stopped_guard_does_not_hold_the_launcher(spawn):
    process = spawn.start("-n", 2, "-c", WAIT)
    pids = pids_of_two(process)
    (guard,) = set(spawn.processes()) - {process.pid, *pids.values()}
    os.kill(guard, signal.SIGSTOP)
    spawn.write("enough", "")
    assert process.wait() == 0


# Starts the launcher with SIGCHLD blocked, or ignored, as other programs may.
WITHOUT_SIGCHLD = """
import os, signal, sys
if sys.argv[1] == "blocked":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
else:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("how", ["blocked", "ignored"])
@pytest.mark.parametrize("calls", ["epoll_ctl", "pidfd_open"])
def test_ends_of_ranks_are_seen_without_sigchld(spawn, how, calls):
    without = [sys.executable, "-c", WITHOUT_SIGCHLD, how]
    refused = [sys.executable, refusing.__file__, "EPERM", calls]
    done = spawn.run(command=[*without, *refused, *spawn.command("-n", 2, "-c", GROUP)])
    if done.returncode == refusing.NOT_PERMITTED:
        pytest.skip(done.stderr.decode())
    assert done.returncode == 0, done.stderr


def test_death_of_the_zygote_is_seen_where_another_process_has_its_socket(spawn):
    spawn.write(
        "dying.py",
        "import os, signal, time\n"
        "if os.path.exists('died'):\n"
        "    raise ImportError\n"
        "open('died', 'w').close()\n"
        "if os.fork() == 0:\n"
        "    os.execvp('sleep', ['sleep', '600'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    paths = {"PYTHONPATH": os.pathsep.join([spawn.environment()["PYTHONPATH"], str(spawn.folder)])}
    done = spawn.run("-n", 1, "--preload", "dying", "-c", "print('up')", env=paths)
    (holder,) = spawn.processes()
    os.kill(holder, signal.SIGKILL)
    assert done.stdout == b"up\n"
    assert b"the zygote has died" in done.stderr


def test_what_comes_with_the_last_event_is_left_to_who_waits_next(spawn):
    # A ^C in the turn in which the last rank was released was taken for one with no ranks.
    loop, called = Loop(), []
    ends = [os.pipe() for _ in range(2)]
    for number, (reader, writer) in enumerate(ends):
        loop.selector.register(reader, selectors.EVENT_READ, partial(called.append, number))
        os.write(writer, b"x")
    loop.turn_until(lambda: bool(called))
    assert called == [0]
    loop.turn_until(lambda: 1 in called)
    loop.close()
    for end in (end for both in ends for end in both):
        os.close(end)


@pytest.fixture
def zygote():
    """A zygote that has imported everything and waits for orders."""
    environment = common_environment(os.environ, backend="shm")
    started = Zygote(resolve_program(["-c", "pass"], environment=environment), environment, "")
    try:
        assert started.receive() == {"ready": True}
        yield started
    finally:
        started.kill()


def test_stopped_zygote_is_ended(spawn, zygote):
    zygote._process.send_signal(signal.SIGSTOP)
    zygote.release(0)
    assert zygote._process.returncode == -signal.SIGKILL


def test_zygote_that_cannot_be_reaped_is_left(spawn, zygote, monkeypatch):
    monkeypatch.setattr(rank_module, "KILLED_SECS", 0.1)
    with held(zygote._process.pid):
        zygote.release(0)
        assert zygote._process.returncode is None
    assert zygote._process.wait() == -signal.SIGKILL


def test_start_that_takes_too_long_says_so(spawn):
    spawn.write("slow.py", "import time\ntime.sleep(600)")
    paths = {"PYTHONPATH": os.pathsep.join([spawn.environment()["PYTHONPATH"], str(spawn.folder)])}
    limits = ("--timeout", 0.05, "--preload", "slow")
    done = spawn.run("-n", 2, *limits, "-c", "pass", env=paths)
    assert done.returncode == 124
    assert b"longer than 0.05 s (--timeout)\n  No rank has been started yet" in done.stderr
