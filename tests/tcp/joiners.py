"""Ranks as threads of one process, as far as joining goes."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from cobre_net.tcp.joining import join
from cobre_net.tcp.reception import gather
from cobre_net.tcp.secret import read_secret
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
