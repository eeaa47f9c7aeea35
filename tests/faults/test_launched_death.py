"""Death under the launcher: survivors also learn the signal, and the run ends with its code."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, signal, sys
import numpy as np
import cobre_shm

# On a busy machine a survivor may need longer to speak than the launcher waits before it asks.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

with cobre_shm.create_communicator() as comm:
    send, recv = np.ones(int(sys.argv[1])), np.empty(int(sys.argv[1]))
    print(f"rank {comm.rank} is {os.getpid()}", flush=True)
    comm.barrier()
    if comm.rank == 0:
        print("all there", flush=True)
    while True:
        comm.allreduce(send, recv)
        comm.broadcast(recv, 1)
        comm.allgatherv(send[:3])
"""


def launch(size, *args):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "cobre_shm.spawn", "-n", str(size), "--grace", "60"),
            *("-c", PROGRAM, *args),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("elements", ["1", "300000"])
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (3, 2), (8, 5)])
def test_killed_rank_is_named_with_pid_and_signal_by_every_survivor(size, victim, elements):
    process = launch(size, elements)
    pids, line = {}, ""
    while "all there" not in line:
        line = process.stdout.readline()
        assert line, process.communicate()
        if found := re.match(r"rank (\d+) is (\d+)", line):
            pids[int(found[1])] = int(found[2])
    time.sleep(0.1)
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    print(f"ended {time.monotonic() - killed:.3f} s after the kill")
    assert process.returncode == 128 + signal.SIGKILL
    told = f"RankFailed: Rank {victim} (pid {pids[victim]}) was killed by SIGKILL"
    assert errors.count(told) == size - 1, errors
    assert re.search(
        rf"^cobre_shm.spawn: Rank {victim} .*{pids[victim]}.*SIGKILL", errors, re.MULTILINE
    )
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
