"""A system call of the launcher fails: the run goes on, or a line says why, and nothing is left."""

import errno
import os
import random
import sys

import pytest

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)

# Runs the launcher in which the n-th of these calls fails; tells how many there were.
FAILING = """
import fcntl, os, resource, selectors, socket, sys
n, code = int(sys.argv[1]), int(sys.argv[2])
calls = 0

def failing(real):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == n:
            raise OSError(code, os.strerror(code))
        return real(*args, **options)
    return call

for owner, name in (
    (os, "fork"), (os, "pidfd_open"), (os, "pipe"), (os, "pipe2"), (os, "posix_fallocate"),
    (os, "set_blocking"), (fcntl, "fcntl"), (resource, "getrlimit"), (resource, "setrlimit"),
    (socket, "socketpair"), (socket, "send_fds"),
    (selectors.PollSelector, "select"),
):
    setattr(owner, name, failing(getattr(owner, name)))
from cobre_shm.spawn.__main__ import main
ended = main(sys.argv[3:])
print("calls:", calls, flush=True)
sys.exit(ended)
"""
PROGRAM = "import cobre_shm\nwith cobre_shm.create_communicator() as comm:\n    comm.barrier()"


def run_failing(spawn, n, code):
    """Return the exit code, the number of calls that were made, and standard error."""
    command = [sys.executable, "-c", FAILING, n, code, "-n", 2, "-c", PROGRAM]
    done = spawn.run(command=[str(word) for word in command])
    # A rank that had not been handed over ends by itself, perhaps a little after its launcher.
    spawn.wait_for(lambda: not spawn.processes())
    assert done.stdout.startswith(b"calls: "), done.stderr
    return done.returncode, int(done.stdout.split()[1]), done.stderr.decode()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("sample", [4, pytest.param(10**9, marks=pytest.mark.slow)])
def test_call_that_fails_is_done_without_or_told_in_one_line(spawn, code, sample):
    ended, calls, errors = run_failing(spawn, 0, code)
    assert (ended, errors) == (0, "")
    assert calls > 20
    told = 0
    for n in random.sample(range(1, calls + 1), min(sample, calls)):
        ended, _, errors = run_failing(spawn, n, code)
        assert "Traceback" not in errors, (n, errors)
        if ended != 0:
            last = errors.splitlines()[-1]
            assert last.startswith("cobre_shm.spawn: "), (n, errors)
            assert os.strerror(code) in last, (n, errors)
            told += 1
    assert told or sample < calls
