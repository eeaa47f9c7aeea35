"""Joining over tcp: who comes late, who does not fit, and strangers of every kind."""

import contextlib
import errno
import itertools
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cobre_net.tcp import TcpCommunicator, handshake, wire
from cobre_net.tcp.joining import join
from cobre_net.tcp.reception import _MAX_STRANGERS, gather
from cobre_net.tcp.secret import read_secret
from cobre_net.tcp.wire import frame
from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import TcpConfig
from tests.support.backends import free_port

SECRET = "the secret of this test"


def config(port, rank, size, **settings):
    settings = {"secret": SECRET, "connect_timeout_ms": 30_000, **settings}
    return TcpConfig(settings.pop("coordinator", "127.0.0.1"), rank, size, port=port, **settings)


class Group:
    """Ranks as threads of this process, as far as joining goes."""

    def __init__(self, size, **settings):
        self.port, self.size, self._settings = free_port(), size, settings
        self._pool = ThreadPoolExecutor(size + 2)
        self._futures = {}
        self.coordinator = self.start(0)

    def start(self, rank, **settings):
        chosen = config(
            self.port, rank, settings.pop("size", self.size), **self._settings | settings
        )
        call = join if rank else gather
        future = self._pool.submit(call, chosen, read_secret(chosen), 0.1)
        self._futures.setdefault(rank, future)
        return future

    def knock(self):
        deadline = time.monotonic() + 10
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=10)
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def join_all(self):
        """Start the ranks that have not been started, and wait for all."""
        for rank in range(1, self.size):
            if rank not in self._futures:
                self.start(rank)
        links = self.coordinator.result(30)
        assert [link.rank for link in links] == list(range(1, self.size))
        assert {link.peer.pid for link in links} == {os.getpid()}
        return links

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._pool.shutdown(wait=True)
        for future in self._futures.values():
            if future.exception() is None:
                found = future.result()
                for link in found if isinstance(found, list) else [found]:
                    link.close()


def introduce(sock, client):
    """Do a rank's part of the handshake, up to READY."""
    answer = client.hello()
    while not client.is_known:
        sock.sendall(answer)
        answer = b""
        while not answer:
            answer = client.feed(sock.recv(client.limit))
    sock.sendall(answer)


def is_closed(sock, seconds=20):
    """Whether the other side closes the connection in time; what it says is read."""
    sock.settimeout(seconds)
    try:
        while sock.recv(100):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


# In whatever order they come


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


def test_host_that_cannot_be_resolved_is_named():
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


@pytest.mark.parametrize("coordinator", ["::1", "localhost"])
def test_ranks_meet_by_name_and_over_ipv6(coordinator):
    if coordinator == "::1" and not socket.has_dualstack_ipv6():
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


def test_second_process_of_a_rank_is_told_who_has_it_and_the_first_stays():
    with Group(3) as group:
        group.start(1)
        time.sleep(0.2)
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


def test_rank_that_dies_while_others_join_fails_them_at_once():
    with Group(4) as group:
        two = group.start(2)
        client = handshake.Applicant(SECRET.encode(), 1, 4, handshake.Identity(77, "node-9"))
        with group.knock() as sock:
            introduce(sock, client)
            time.sleep(0.5)
        for error in (group.coordinator.exception(10), two.exception(10)):
            assert type(error) is InitializationFailed
            assert "Rank 1 (pid 77 on node-9) was lost" in str(error)


# Strangers


NOISE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "much": bytes(1 << 20),
    "hello and noise": frame(wire.HELLO, b"COBRENET\0\1" + bytes(16)) + bytes(1000),
    "old version": frame(wire.HELLO, b"COBRENET\0\0" + bytes(16)),
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_stranger_is_dropped_and_the_ranks_join(noise, caplog):
    with Group(3) as group:
        strangers = [group.knock() for _ in range(5)]
        for sock in strangers:
            # It may be dropped at the first bytes already.
            with contextlib.suppress(OSError):
                sock.sendall(noise)
            if not noise:
                sock.close()
        if noise:
            assert all(map(is_closed, strangers))
        for sock in strangers:
            sock.close()
        group.join_all()
    assert [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(caplog.records) == 1


def test_one_byte_a_second_is_dropped_after_five_seconds():
    with Group(2) as group, group.knock() as sock:
        begun = time.monotonic()
        hello = frame(wire.HELLO, b"COBRENET\0\1" + bytes(16))
        try:
            for place in itertools.count():
                sock.sendall(hello[place : place + 1])
                time.sleep(0.5)
                assert time.monotonic() - begun < 20
        except OSError:
            pass
        assert time.monotonic() - begun > wire.STRANGER_SECS - 0.1
        group.join_all()


def test_a_thousand_idle_connections_do_not_keep_the_ranks_out():
    with Group(4) as group:
        idle = [group.knock() for _ in range(1000)]
        held = descriptors_beyond(idle)
        assert held <= _MAX_STRANGERS + 40
        group.join_all()
        for sock in idle:
            sock.close()


def descriptors_beyond(own):
    return len(list(Path("/proc/self/fd").iterdir())) - len(own)


def test_port_scan_leaves_nothing():
    with Group(2) as group:
        for _ in range(200):
            group.knock().close()
        group.join_all()


# Where a secret is needed, and how it is kept


@pytest.fixture
def outside():
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: it only asks which address would be used.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network but loopback")
        return probe.getsockname()[0]


def test_network_without_a_secret_is_refused_on_both_sides(outside):
    port = free_port()
    with pytest.raises(InitializationFailed, match="no secret"):
        TcpCommunicator(config(port, 0, 2, coordinator=outside, secret=None))
    with socket.create_server((outside, 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InitializationFailed, match="no secret"):
            TcpCommunicator(config(port, 1, 2, coordinator=outside, secret=None))


def test_network_without_a_secret_is_allowed_when_said_out_loud(outside):
    with Group(2, coordinator=outside, bind_addr=outside, secret=None, insecure=True) as group:
        group.start(1)
        group.coordinator.result(20)


def test_loopback_needs_no_secret():
    with Group(2, secret=None) as group:
        group.join_all()


def test_secret_is_read_from_a_private_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("hidden\n")
    path.chmod(0o600)
    assert read_secret(config(1, 0, 1, secret=None, secret_file=str(path))) == b"hidden"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        settings = config(1, 0, 1, secret=None, secret_file=f"fd:{descriptor}")
        # As often as ranks of a node read it, each from the same open file.
        assert [read_secret(settings) for _ in range(3)] == [b"hidden"] * 3
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("spoil", ["readable", "link", "directory", "fifo", "empty", "absent"])
def test_secret_file_that_others_may_have_touched_is_refused(tmp_path, spoil):
    path = tmp_path / "secret"
    if spoil == "directory":
        path.mkdir(0o700)
    elif spoil == "fifo":
        os.mkfifo(path, 0o600)
    elif spoil != "absent":
        target = tmp_path / "target" if spoil == "link" else path
        target.write_text("" if spoil == "empty" else "hidden")
        target.chmod(0o640 if spoil == "readable" else 0o600)
        if spoil == "link":
            path.symlink_to(target)
    with pytest.raises(InitializationFailed, match="cannot be read") as caught:
        TcpCommunicator(config(1, 0, 2, secret=None, secret_file=str(path)))
    assert "hidden" not in str(caught.value.to_dict())
    assert "0600" in caught.value.suggestion


def test_secret_is_not_shown_and_not_given_twice(tmp_path):
    assert SECRET not in repr(config(1, 0, 2))
    with pytest.raises(InitializationFailed, match="twice"):
        config(1, 0, 2, secret_file=str(tmp_path / "x"))


def test_group_of_one_rank_listens_on_nothing():
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    with TcpCommunicator(config(29500, 0, 1)) as comm:
        assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before
        comm.barrier()
