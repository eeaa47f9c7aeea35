"""Strangers of every kind knock while ranks join over tcp: they are dropped, and the ranks join."""

import contextlib
import itertools
import resource
import select
import signal
import socket
import struct
import time
from pathlib import Path

import pytest

from cobre_net.tcp import wire
from cobre_net.tcp.listening import listen
from cobre_net.tcp.reception import _MAX_STRANGERS, _Reception
from cobre_net.tcp.secret import read_secret
from cobre_net.tcp.wire import frame
from tests.support.backends import free_port
from tests.tcp.joiners import Group, config, is_closed

HELLO = frame(wire.HELLO, struct.pack(">8sH16s", b"COBRENET", wire.VERSION, bytes(16)))
NOISE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "much": bytes(1 << 20),
    "hello and noise": HELLO + bytes(1000),
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


def test_stranger_that_goes_before_it_is_answered_raises_no_signal():
    chosen = config(free_port(), 0, 2)
    raised, before = [], signal.getsignal(signal.SIGPIPE)
    signal.signal(signal.SIGPIPE, lambda number, _: raised.append(number))
    try:
        with listen(chosen, 2) as listener:
            reception = _Reception(chosen, read_secret(chosen), listener)
            with socket.create_connection(listener.getsockname()) as stranger:
                stranger.sendall(HELLO)
                stranger.shutdown(socket.SHUT_WR)
                # Its end of the connection is reset.
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # As run() does.
            listener.setblocking(False)
            reception._poller.register(listener, select.POLLIN)
            while not reception._dropped:
                reception._turn()
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert "Broken pipe" in reception._why_dropped
    assert not raised


def test_one_byte_a_second_is_dropped_after_five_seconds():
    with Group(2) as group, group.knock() as sock:
        begun = time.monotonic()
        try:
            for place in itertools.count():
                sock.sendall(HELLO[place : place + 1])
                time.sleep(0.5)
                assert time.monotonic() - begun < 20
        except OSError:
            pass
        assert time.monotonic() - begun > wire.STRANGER_SECS - 0.1
        group.join_all()


IDLE = 1000


@pytest.fixture
def descriptors_for_both_ends():
    """Have this process open as many as the strangers and those who meet them need."""
    needed = IDLE + _MAX_STRANGERS + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < needed:
        pytest.skip(f"a process may open {hard} files here (ulimit -Hn), and this needs {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("descriptors_for_both_ends")
def test_a_thousand_idle_connections_do_not_keep_the_ranks_out():
    with Group(4) as group:
        idle = [group.knock() for _ in range(IDLE)]
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
