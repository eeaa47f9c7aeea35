"""Death under the launcher: survivors also learn the signal, and the run ends with its code."""

import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cobre_shm.segment.attach import segments_open_in
from tests.support.processes import processes_with, started

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


def launch(size, *args, program=PROGRAM, env=None):
    return started(
        [
            *(sys.executable, "-m", "cobre_shm.spawn", "-n", str(size), "--grace", "60"),
            *("-c", program, *args),
        ],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("elements", ["1", "300000"])
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (3, 2), (8, 5)])
def test_killed_rank_is_named_with_pid_and_signal_by_every_survivor(size, victim, elements):
    with launch(size, elements) as process:
        pids, are_there = {}, False
        # What the ranks wrote comes through a pipe each: in which order is the launcher's.
        while not are_there or len(pids) < size:
            line = process.stdout.readline()
            assert line, process.communicate()
            are_there |= line == "all there\n"
            if found := re.match(r"rank (\d+) is (\d+)", line):
                pids[int(found[1])] = int(found[2])
        time.sleep(0.1)
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=180)
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


REGIONS = """
import cobre_shm

with cobre_shm.create_communicator() as comm:
    print("joined", flush=True)
    while True:
        comm.create_shared_region(100).close()
"""


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_launcher_guard_and_ranks_killed_at_once_leave_what_the_next_launcher_removes(times):
    seed = random.randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    names = []
    for _ in range(times):
        mark = f"COBRE_TEST_MARK={secrets.token_hex(8)}"
        with launch(3, program=REGIONS, env=dict([mark.split("=")])) as process:
            (segment,) = wait_for_segment(process.pid)
            names += [segment.name, segment.region_prefix]
            segment.close()
            if moments.random() < 0.8:
                process.stdout.readline()
            time.sleep(moments.random() * 0.05)
            pids = processes_with(mark)
            moments.shuffle(pids)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=180)
        deadline = time.monotonic() + 60
        while processes_with(mark):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    command = [sys.executable, "-m", "cobre_shm.spawn", "-n", "1", "-c", "pass"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert done.stderr == ""
    left = [path.name for path in Path("/dev/shm").iterdir()]
    assert not [file for file in left if f"/{file}".startswith(tuple(names))]


def wait_for_segment(pid):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := segments_open_in([pid]):
            return found
        time.sleep(0.005)
    raise AssertionError("the launcher made no segment")
