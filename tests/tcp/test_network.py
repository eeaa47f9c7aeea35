"""Real networks: two hosts as namespaces with a link between them, slow, lossy, and cut.

Needs root, ``ip`` and, for delay and loss, a kernel with netem; skipped with the reason otherwise.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.backends import free_port

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


def in_host(host, *words):
    return subprocess.run(
        ["ip", "netns", "exec", host, *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def hosts():
    """Two namespaces joined by a pair of virtual interfaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"cobre-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        links = [f"cb{os.getpid() % 10**7}{letter}" for letter in "ab"]
        made = ip(
            *("link", "add", links[0], "netns", names[0], "type", "veth"),
            *("peer", "name", links[1], "netns", names[1]),
        )
        if made.returncode:
            pytest.skip(f"no virtual interfaces here: {made.stderr.strip()}")
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            for words in (
                ["address", "add", f"{NETWORK}.{number}/24", "dev", link],
                ["link", "set", link, "up"],
                ["link", "set", "lo", "up"],
            ):
                done = ip("-n", name, *words)
                assert done.returncode == 0, done.stderr
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


class Run:
    """Ranks on both hosts: even ones on the first, odd ones on the second."""

    def __init__(self, hosts, size, seconds, elements):
        port = free_port()
        self.processes = []
        for rank in range(size):
            words = [rank, size, port, seconds, elements, f"{NETWORK}.1"]
            self.processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", hosts[rank % 2][0], sys.executable, "-c", RANK]
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


@pytest.mark.parametrize("elements", [1, 200_000])
def test_ranks_on_two_hosts_work_together(hosts, elements):
    with Run(hosts, 4, 1, elements) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 4
    assert len({result["turns"] for result in results}) == 1


@pytest.mark.parametrize("elements", [1, 2_000_000])
def test_cut_link_fails_every_rank_on_both_sides(hosts, elements):
    with Run(hosts, 4, 60, elements) as run:
        run.wait_for_a_turn()
        cut = time.monotonic()
        name, link = hosts[1]
        assert ip("-n", name, "link", "set", link, "down").returncode == 0
        results = run.results()
    for rank, result in enumerate(results):
        assert result["error"] == "RankFailed", results
        # Each side knows only that the other does not answer: nobody blames its own.
        if rank % 2:
            assert result["rank"] == 0
        else:
            assert result["rank"] in (1, 3)
        # Ten seconds of silence are promised, and the machine may do other things.
        assert result["at"] - cut < 20, results


@pytest.mark.parametrize(
    "disturbance",
    ["delay 100ms", "loss 20%", "delay 20ms 15ms reorder 25%", "duplicate 10%"],
)
def test_bad_network_is_slow_and_never_wrong(hosts, disturbance):
    name, link = hosts[0]
    set_up = in_host(name, "tc", "qdisc", "add", "dev", link, "root", "netem", *disturbance.split())
    if set_up.returncode:
        pytest.skip(f"no netem in this kernel: {set_up.stderr.strip()}")
    with Run(hosts, 3, 3, 20_000) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 3


def test_small_packets_are_enough(hosts):
    for name, link in hosts:
        done = ip("-n", name, "link", "set", link, "mtu", "576")
        assert done.returncode == 0, done.stderr
    with Run(hosts, 3, 1, 50_000) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 3


def test_narrow_link_is_slow_and_never_wrong(hosts):
    name, link = hosts[0]
    limit = ["rate", "20mbit", "burst", "16kb", "latency", "200ms"]
    set_up = in_host(name, "tc", "qdisc", "add", "dev", link, "root", "tbf", *limit)
    if set_up.returncode:
        pytest.skip(f"no token bucket filter here: {set_up.stderr.strip()}")
    with Run(hosts, 3, 2, 100_000) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 3
