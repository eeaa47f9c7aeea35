"""Joining over tcp: who comes late, who does not come, and who does not fit."""

import contextlib
import errno
import os
import socket
import struct
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cobre_net.tcp import TcpCommunicator, handshake, joining, listening, reception
from cobre_net.tcp.joining import join
from cobre_net.tcp.link import Ended
from cobre_net.tcp.reception import _Reception, gather
from cobre_net.tcp.secret import read_secret
from cobre_shm.errors import InitializationFailed, InvalidCommunicator
from tests.support.backends import free_port
from tests.support.ranks import results_of, run_ranks
from tests.tcp.joiners import SECRET, Group, config, introduce, is_closed


def test_workers_may_come_long_before_the_coordinator():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        workers = [
            pool.submit(join, config(port, rank, 3), SECRET.encode(), 0.1) for rank in (1, 2)
        ]
        time.sleep(1.0)
        links = gather(config(port, 0, 3), SECRET.encode(), 0.1)
        for link in [*links, *(worker.result() for worker in workers)]:
            link.close()
    assert [link.rank for link in links] == [1, 2]


def test_lock_that_the_sentinel_gives_back_between_two_looks_is_taken():
    class Lock:
        tries = 0

        def acquire(self, blocking=True, timeout=-1):
            self.tries += 1
            if self.tries == 1:
                comm._looks_ended += 1
            return self.tries > 1

        def release(self):
            pass

    comm = TcpCommunicator(config(free_port(), 0, 1))
    comm._lock, comm._looks_begun = Lock(), 1
    comm.close()
    assert comm._lock.tries == 2


def test_lock_that_is_held_is_not_waited_for_because_the_sentinel_wants_it():
    """As of a signal handler that closes, below a collective of its own thread."""
    comm = TcpCommunicator(config(free_port(), 0, 1))
    with comm._lock:
        comm._looks_begun = 1
        with pytest.raises(InvalidCommunicator, match="must wait"):
            comm.close()
    comm._looks_begun = 0
    comm.close()


@pytest.mark.parametrize(
    ("coordinator", "settings", "expected"),
    [
        ("localhost", {"secret": "s"}, "127.0.0.1"),
        ("127.0.0.1", {"secret": "s"}, "127.0.0.1"),
        ("node-0", {"secret": "s"}, "0.0.0.0"),
        ("node-0", {"secret": None, "insecure": True}, "0.0.0.0"),
        ("LOCALHOST", {"secret": "s"}, "127.0.0.1"),
        ("127.1", {"secret": "s"}, "127.0.0.1"),
        ("node-6", {"secret": "s"}, "::"),
        ("2001:db8::1", {"secret": "s"}, "::"),
        # Nobody else may come.
        ("node-0", {"secret": None}, "127.0.1.1"),
    ],
)
def test_name_of_a_debian_host_narrows_nothing_where_others_may_come(
    monkeypatch, coordinator, settings, expected
):
    own = {"node-0": "127.0.1.1", "node-6": "2001:db8::6", "2001:db8::1": "2001:db8::1"}

    def resolve(host, port, **_):
        # Only the address counts.
        return [(0, socket.SOCK_STREAM, 6, "", (own.get(host, "127.0.0.1"), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = config(29500, 0, 2, coordinator=coordinator, **settings)
    assert listening._narrowed(found, "0.0.0.0") == expected


def gather_and_let_go(comm):
    recv = np.zeros(comm.size << 17)
    comm.allgatherv(np.ones(1 << 17), recv)
    kept = weakref.ref(recv)
    del recv
    return kept() is None


def test_buffers_of_a_large_gather_are_let_go():
    assert results_of(run_ranks(gather_and_let_go, 2, "tcp")) == [True, True]


def test_coordinator_that_never_comes_is_named_when_the_time_is_up():
    port = free_port()
    with pytest.raises(InitializationFailed) as caught:
        TcpCommunicator(config(port, 1, 2, connect_timeout_ms=300))
    error = caught.value
    assert error.message.startswith(
        f"TCP backend failed to connect to coordinator at 127.0.0.1:{port}"
    )
    assert error.context["operation"] == "connect"
    assert error.context["coordinator"] == f"127.0.0.1:{port}"
    assert error.context["error_code"] == errno.ECONNREFUSED
    assert f"{port}" in error.suggestion


def test_missing_ranks_are_listed_on_the_coordinator_and_on_those_that_came():
    with Group(4, connect_timeout_ms=1000) as group:
        two = group.start(2)
        error = group.coordinator.exception(20)
        assert type(error) is InitializationFailed
        assert error.context["missing_ranks"] == [1, 3]
        told = two.exception(20)
        assert type(told) is InitializationFailed
        assert "Ranks 1, 3 did not join" in str(told)


def test_host_that_cannot_be_resolved_is_named(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    # Nobody's name server is asked.
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(InitializationFailed, match=r"no-such-host\.invalid"):
        TcpCommunicator(
            config(29500, 1, 2, coordinator="no-such-host.invalid", connect_timeout_ms=200)
        )


def test_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InitializationFailed, match=f"127.0.0.1:{port}") as caught:
            TcpCommunicator(config(port, 0, 2))
    assert caught.value.context["error_code"] == errno.EADDRINUSE
    assert "COBRE_TCP_PORT" in caught.value.suggestion


def test_address_of_another_host_cannot_be_listened_on():
    with pytest.raises(InitializationFailed) as caught:
        TcpCommunicator(config(free_port(), 0, 2, bind_addr="192.0.2.1"))
    assert caught.value.context["error_code"] == errno.EADDRNOTAVAIL


def has_ipv6():
    # An address may be missing where the protocol is there.
    with (
        contextlib.suppress(OSError),
        socket.create_server(("::1", 0), family=socket.AF_INET6),
    ):
        return True
    return False


@pytest.mark.parametrize("coordinator", ["::1", "localhost"])
def test_ranks_meet_by_name_and_over_ipv6(coordinator):
    if coordinator == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with Group(3, coordinator=coordinator) as group:
        group.join_all()


def test_wildcard_is_narrowed_to_loopback_where_all_come_that_way():
    with Group(2) as group:
        with group.knock():
            pass
        listening = [
            line.split()[1]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{group.port:04X}")
        ]
        assert listening == [f"0100007F:{group.port:04X}"]
        group.join_all()


def test_inherited_listening_socket_serves():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(join, config(port, 1, 2), SECRET.encode(), 0.1)
            settings = config(port, 0, 2, bind_addr=f"fd:{listener.fileno()}")
            links = gather(settings, SECRET.encode(), 0.1)
            for link in [*links, early.result()]:
                link.close()


def test_descriptor_that_is_no_listening_socket_is_refused():
    with open(os.devnull) as file, pytest.raises(InitializationFailed, match="cannot be listened"):
        TcpCommunicator(config(29500, 0, 2, bind_addr=f"fd:{file.fileno()}"))


# Who does not fit


@pytest.mark.parametrize(
    ("rank", "settings", "reason"),
    [
        (1, {"size": 4}, "was started with size 4, the coordinator with 3"),
        (1, {"secret": "another"}, "the secrets differ"),
        (1, {"secret": None}, "the secrets differ"),
    ],
)
def test_newcomer_that_does_not_fit_is_told_why_and_the_others_join(rank, settings, reason):
    with Group(3) as group:
        odd = group.start(rank, **settings)
        error = odd.exception(20)
        assert type(error) is InitializationFailed
        assert reason in str(error)
        assert SECRET not in str(error)
        del group._futures[rank]
        group.join_all()


@pytest.fixture
def known(monkeypatch):
    """The ranks that have come to the coordinator until now."""
    ranks, ready = set(), _Reception._ready

    def note(reception):
        found = ready(reception)
        ranks.update(found)
        return found

    monkeypatch.setattr(_Reception, "_ready", note)
    return ranks


def wait_until_known(known, ranks):
    deadline = time.monotonic() + 20
    while known != ranks:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_second_process_of_a_rank_is_told_who_has_it_and_the_first_stays(known):
    with Group(3) as group:
        group.start(1)
        wait_until_known(known, {1})
        second = group._pool.submit(join, config(group.port, 1, 3), SECRET.encode(), 0.1)
        error = second.exception(20)
        assert type(error) is InitializationFailed
        assert "rank 1 is taken by pid" in str(error)
        group.join_all()


def test_rank_0_cannot_be_claimed():
    with Group(2) as group:
        client = handshake.Applicant(SECRET.encode(), 0, 2, handshake.Identity(1, "x"))
        with (
            group.knock() as sock,
            pytest.raises(handshake.Refused, match=r"rank 0 is not in 1\.\.1"),
        ):
            introduce(sock, client)
        group.join_all()


def test_rank_that_dies_while_others_join_fails_them_at_once(known):
    with Group(4) as group:
        two = group.start(2)
        client = handshake.Applicant(SECRET.encode(), 1, 4, handshake.Identity(77, "node-9"))
        with group.knock() as sock:
            introduce(sock, client)
            wait_until_known(known, {1, 2})
        for error in (group.coordinator.exception(10), two.exception(10)):
            assert type(error) is InitializationFailed
            assert "Rank 1 (pid 77 on node-9) was lost" in str(error)


def check_refusal(error, port):
    assert type(error) is InitializationFailed
    context = {"code": "JoinRefused", "coordinator": f"127.0.0.1:{port}", "rank": 1}
    assert error.to_dict()["context"].items() >= context.items()
    assert "COBRE_TCP_SIZE" in error.suggestion


@pytest.mark.parametrize("wrong", [{"size": 4}, {"secret": "another"}, {}])
def test_refusal_has_a_code_a_place_and_a_rank(known, wrong):
    with Group(3) as group:
        group.start(1)
        wait_until_known(known, {1})
        odd = config(group.port, 1, **{"size": 3, **wrong})
        check_refusal(
            group._pool.submit(join, odd, read_secret(odd), 0.1).exception(20), group.port
        )
        group.join_all()


def test_coordinator_that_ends_before_all_are_there_is_a_refusal():
    server = handshake.Greeter(SECRET.encode(), 2, lambda rank: None)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        newcomer = pool.submit(join, config(port, 1, 2), SECRET.encode(), 0.1)
        accepted, _ = listener.accept()
        with accepted:
            while server.rank is None:
                byte = accepted.recv(1)
                assert byte
                accepted.sendall(server.feed(byte))
        error = newcomer.exception(20)
    check_refusal(error, port)
    assert "before the group was complete" in error.message


# What happens at the wrong moment


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_attempt_that_ends_otherwise_does_not_carry_the_error_of_an_earlier_one():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        settings = config(port, 1, 2, connect_timeout_ms=1000)
        worker = pool.submit(join, settings, SECRET.encode(), 0.1)
        time.sleep(0.3)  # it was refused
        with socket.create_server(("127.0.0.1", port)) as listener:
            listener.settimeout(0.1)
            while not worker.done():
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    continue
                with sock:
                    sock.recv(1000)
        error = worker.exception()
    assert "1000 ms: it closed the connection" in error.message
    assert error.context["error_code"] == 0
    assert error.__cause__ is None


def test_connection_that_was_reset_at_once_is_tried_again(monkeypatch):
    connect, dead = joining._connect, []

    def reset_the_first(*args):
        if dead:
            return connect(*args)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            dead.append(socket.create_connection(listener.getsockname()))
            reset(listener.accept()[0])
        return dead[0]

    monkeypatch.setattr(joining, "_connect", reset_the_first)
    with Group(2) as group:
        group.join_all()
    assert dead[0].fileno() < 0


def test_rank_that_dies_when_all_have_come_is_found_by_who_uses_its_connection(monkeypatch):
    go = reception.go

    def go_after_its_death(identity):
        reset(sock)
        return go(identity)

    monkeypatch.setattr(reception, "go", go_after_its_death)
    with Group(2) as group:
        client = handshake.Applicant(SECRET.encode(), 1, 2, handshake.Identity(77, "node-9"))
        sock = group.knock()
        introduce(sock, client)
        (link,) = group.coordinator.result(20)
        assert (link.rank, link.peer.pid) == (1, 77)
        with pytest.raises(Ended):
            link.take(memoryview(bytearray(8)))


def test_coordinator_that_cannot_keep_a_connection_closes_all(monkeypatch):
    make = reception.Link

    def fail_for_the_second(sock, rank, *args):
        if rank == 2:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return make(sock, rank, *args)

    monkeypatch.setattr(reception, "Link", fail_for_the_second)
    with Group(3) as group:
        socks = []
        for rank in (1, 2):
            client = handshake.Applicant(SECRET.encode(), rank, 3, handshake.Identity(77, "x"))
            socks.append(group.knock())
            introduce(socks[-1], client)
        error = group.coordinator.exception(20)
        assert isinstance(error, InitializationFailed)
        assert error.source.errno == errno.ENOBUFS
        for sock in socks:
            assert is_closed(sock, 2)
            sock.close()


@pytest.mark.parametrize("name", ["a..b", "a" * 64 + ".example"])
def test_name_that_no_host_can_have_is_refused_as_any_other_address(name):
    with pytest.raises(InitializationFailed, match="no name of a host"):
        TcpCommunicator(config(free_port(), 1, 2, coordinator=name))
    # The others may come by another way.
    with pytest.raises(InitializationFailed, match="did not join"):
        TcpCommunicator(
            config(free_port(), 0, 2, coordinator=name, bind_addr="0.0.0.0", connect_timeout_ms=50)
        )


def test_wildcard_on_a_kernel_without_ipv6_is_refused(monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with pytest.raises(InitializationFailed, match="cannot listen on"):
        TcpCommunicator(config(free_port(), 0, 2, coordinator="a.invalid", bind_addr="::"))
