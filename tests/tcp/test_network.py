"""Real networks: two hosts as namespaces with a link between them, slow, lossy, and cut.

Needs root and ``ip``; skipped with the reason otherwise. The link is a pair of virtual interfaces,
or, where packets are to come to harm, a wire of our own (``bad_wire.py``); what the kernel's netem
does to packets is tried beside it, on kernels that have netem.
"""

import os
import subprocess

import pytest

from tests.tcp.hosts import Run, bad_wire, ip, namespaces, set_up_device


@pytest.fixture
def hosts():
    """Two namespaces joined by a pair of virtual interfaces: names of both, with the interface."""
    with namespaces() as names:
        links = [f"cb{os.getpid() % 10**7}{letter}" for letter in "ab"]
        made = ip(
            *("link", "add", links[0], "netns", names[0], "type", "veth"),
            *("peer", "name", links[1], "netns", names[1]),
        )
        if made.returncode:
            pytest.skip(f"no virtual interfaces here: {made.stderr.strip()}")
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            set_up_device(name, link, number)
        yield list(zip(names, links, strict=True))


def names_of(hosts):
    return [name for name, _ in hosts]


def in_host(host, *words):
    return subprocess.run(
        ["ip", "netns", "exec", host, *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def assert_each_side_blames_the_other(results):
    for rank, result in enumerate(results):
        assert result["error"] == "RankFailed", results
        # Each side knows only that the other does not answer: nobody blames its own.
        if rank % 2:
            assert result["rank"] == 0, results
        else:
            assert result["rank"] in (1, 3), results


@pytest.mark.parametrize("elements", [1, 200_000])
def test_ranks_on_two_hosts_work_together(hosts, elements):
    with Run(names_of(hosts), 4, 1, elements) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 4
    assert len({result["turns"] for result in results}) == 1


@pytest.mark.parametrize("elements", [1, 2_000_000])
def test_cut_link_fails_every_rank_on_both_sides(hosts, elements):
    with Run(names_of(hosts), 4, 60, elements) as run:
        run.wait_for_a_turn()
        name, link = hosts[1]
        assert ip("-n", name, "link", "set", link, "down").returncode == 0
        assert_each_side_blames_the_other(run.results())


@pytest.mark.parametrize("mute", [0, 1])
@pytest.mark.parametrize("elements", [1, 100_000])
def test_host_that_hears_and_is_not_heard_fails_every_rank(mute, elements):
    with bad_wire() as (names, cut), Run(names, 4, 60, elements) as run:
        run.wait_for_a_turn()
        cut(names[mute])
        assert_each_side_blames_the_other(run.results())


@pytest.mark.parametrize(
    "harm",
    [
        {"delay_ms": 200},
        {"loss": 0.2},
        {"delay_ms": 20, "jitter_ms": 15, "swap": 0.25},
        {"double": 0.1},
    ],
    ids=lambda harm: next(iter(harm)),
)
def test_harmed_packets_make_it_slow_and_never_wrong(harm):
    with bad_wire(**harm) as (names, _), Run(names, 3, 3, 20_000) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 3
    assert results[0]["turns"] > 0


@pytest.mark.parametrize(
    "disturbance",
    ["delay 100ms", "loss 20%", "delay 20ms 15ms reorder 25%", "duplicate 10%"],
)
def test_netem_makes_it_slow_and_never_wrong(hosts, disturbance):
    name, link = hosts[0]
    set_up = in_host(name, "tc", "qdisc", "add", "dev", link, "root", "netem", *disturbance.split())
    if set_up.returncode:
        pytest.skip(f"no netem in this kernel: {set_up.stderr.strip()}")
    with Run(names_of(hosts), 3, 3, 20_000) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 3


def test_small_packets_are_enough(hosts):
    for name, link in hosts:
        done = ip("-n", name, "link", "set", link, "mtu", "576")
        assert done.returncode == 0, done.stderr
    with Run(names_of(hosts), 3, 1, 50_000) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 3


def test_narrow_link_is_slow_and_never_wrong(hosts):
    name, link = hosts[0]
    limit = ["rate", "20mbit", "burst", "16kb", "latency", "200ms"]
    set_up = in_host(name, "tc", "qdisc", "add", "dev", link, "root", "tbf", *limit)
    if set_up.returncode:
        pytest.skip(f"no token bucket filter here: {set_up.stderr.strip()}")
    with Run(names_of(hosts), 3, 2, 100_000) as run:
        results = run.results()
    assert [result["error"] for result in results] == [None] * 3
