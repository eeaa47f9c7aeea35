"""The launcher and a group of ranks that wait for each other in collectives."""

import os
import signal

import pytest

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)

# Rank 1 does what the test says after a few collectives, while the others go on.
PROGRAM = """
import os, signal, sys, time
import numpy as np
import cobre_shm
# A survivor may need longer to speak than the launcher waits before it asks.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
comm = cobre_shm.create_communicator()
for _ in range(3):
    comm.allreduce(np.ones(1))
if comm.rank == 1:
    {act}
try:
    while True:
        comm.barrier()
except cobre_shm.RankFailed as error:
    # At once, so that the launcher sees the survivors end before the culprit where it can.
    print(error.rank, error.pid, error.signal, flush=True)
    os._exit(40 + comm.rank)
"""


@pytest.mark.parametrize(
    ("act", "code", "number"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, b"9"),
        ("raise ValueError", 1, b"None"),
        ("os._exit(0)", None, b"None"),
        ("sys.exit(3)", 3, b"None"),
        # The others see that it has left long before it ends.
        ("comm.close(); time.sleep(1); os._exit(9)", 9, b"None"),
        ("comm.abort(21)", 21, b"None"),
        ("comm.abort(256)", 1, b"None"),
    ],
)
def test_culprit_decides_and_every_survivor_names_it(spawn, act, code, number):
    spawn.write("program.py", PROGRAM.format(act=act))
    done = spawn.run("-n", 3, "--grace", 60, "program.py")
    reports = [tuple(line.split()) for line in done.stdout.splitlines()]
    assert len(reports) == 2
    (report,) = set(reports)
    assert (report[0], report[2]) == (b"1", number)
    if code is None:
        # The culprit has no code to give, so that one of the survivors does.
        assert done.returncode in (40, 42)
    else:
        assert done.returncode == code
        assert b"Rank 1 of 3 (pid %s)" % report[1] in done.stderr


def test_interrupt_ends_ranks_that_wait_for_each_other(spawn):
    spawn.write(
        "program.py",
        "import time, numpy, cobre_shm\n"
        "comm = cobre_shm.create_communicator()\n"
        "comm.barrier()\n"
        "print('ready', flush=True)\n"
        "if comm.rank == 0: time.sleep(3600)\n"
        "comm.barrier()",
    )
    process = spawn.start("-n", 3, "--grace", 600, "program.py")
    assert [process.stdout.readline() for _ in range(3)] == [b"ready\n"] * 3
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
