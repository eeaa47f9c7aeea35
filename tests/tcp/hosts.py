"""Hosts for tests: network namespaces, what joins them, and ranks that run on both."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.backends import free_port
from tests.support.processes import started

ROOT = str(Path(__file__).parents[2])
NETWORK = "10.87.64"

RANK = """
import json, sys, time
import numpy as np
from cobre_net.tcp import TcpCommunicator
from cobre_shm.errors import CollectiveFailed
from cobre_shm.selection.kinds import TcpConfig

rank, size, port, seconds, elements = (int(word) for word in sys.argv[1:6])
host = sys.argv[6]
config = TcpConfig(host, rank, size, port=port, bind_addr="0.0.0.0", secret="of this test")
with TcpCommunicator(config) as comm:
    print("joined", flush=True)
    begun, turns = time.monotonic(), 0
    send = np.arange(elements) + rank
    expected = np.arange(elements) * size + size * (size - 1) // 2
    told = {"error": None}
    try:
        while True:
            done = time.monotonic() - begun > seconds
            # All leave in the same round, when rank 0 says so.
            (stop,) = comm.broadcast(np.array([done]))
            if stop:
                break
            assert (comm.allreduce(send) == expected).all()
            comm.barrier()
            turns += 1
            print("turn", flush=True)
    except CollectiveFailed as error:
        told = {
            "error": type(error).__name__,
            "rank": getattr(error, "rank", None),
            "host": error.context.get("host"),
        }
    print(json.dumps({**told, "turns": turns, "at": time.monotonic()}), flush=True)
"""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)


def set_up_device(namespace, device, number):
    for words in (
        ["address", "add", f"{NETWORK}.{number}/24", "dev", device],
        ["link", "set", device, "up"],
        ["link", "set", "lo", "up"],
    ):
        done = ip("-n", namespace, *words)
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def namespaces():
    """Two of them, with nothing in between."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"cobre-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@contextlib.contextmanager
def bad_wire(loss=0, delay_ms=0, jitter_ms=0, swap=0, double=0, seed=1):
    """Two hosts joined by ``bad_wire.py``: their names, and a function that cuts what one sends."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun here")
    program = Path(__file__).with_name("bad_wire.py")
    options = [loss, delay_ms, jitter_ms, swap, double, seed]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        namespaces() as names,
        started([sys.executable, program, *names, "cbwire", *options], text=True, **pipes) as wire,
    ):
        if wire.stdout.readline() != "ready\n":
            _, said = wire.communicate(timeout=20)
            pytest.skip(f"no TUN devices here: {' '.join(said.splitlines()[-1:])}")
        try:
            for number, name in enumerate(names, 1):
                set_up_device(name, "cbwire", number)

            def cut(name):
                wire.stdin.write(f"cut {name}\n")
                wire.stdin.flush()

            yield names, cut
        finally:
            assert wire.poll() is None, wire.stderr.read()
            wire.communicate(timeout=20)


class Run:
    """Ranks on both hosts: even ones on the first, odd ones on the second."""

    def __init__(self, names, size, seconds, elements):
        port = free_port()
        self.processes = []
        for rank in range(size):
            words = [rank, size, port, seconds, elements, f"{NETWORK}.1"]
            self.processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", names[rank % 2], sys.executable, "-c", RANK]
                    + [str(word) for word in words],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": ROOT},
                )
            )

    def wait_for_a_turn(self):
        """Read until every rank has gone round once."""
        for process in self.processes:
            for line in process.stdout:
                if line.startswith("turn"):
                    break

    def results(self, seconds=90):
        deadline = time.monotonic() + seconds
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            assert process.returncode == 0, err
            found.append(json.loads(out.splitlines()[-1]))
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
