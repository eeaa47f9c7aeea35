"""Where tcp needs a secret, and how it is kept."""

import os
import socket
import threading
from pathlib import Path

import pytest

from cobre_net.tcp import TcpCommunicator, secret
from cobre_net.tcp.secret import read_secret
from cobre_shm.errors import InitializationFailed
from tests.support.backends import free_port
from tests.tcp.joiners import SECRET, Group, config


@pytest.fixture
def outside(monkeypatch):
    """An address that is taken for one that others reach: no test listens on a real one."""
    monkeypatch.setattr(secret, "is_loopback", lambda address: False)
    return "127.0.0.1"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("fe80::1%lo", False),
    ],
)
def test_loopback_is_told_by_the_address(address, expected):
    assert secret.is_loopback(address) is expected


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


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_descriptor_of_a_file_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "secret"
    path.write_text("hidden")
    path.chmod(mode)
    with path.open() as file, pytest.raises(InitializationFailed, match="others may use it"):
        read_secret(config(1, 0, 1, secret=None, secret_file=f"fd:{file.fileno()}"))


def test_memory_without_a_name_is_private_whatever_its_mode():
    descriptor = os.memfd_create("secret")
    try:
        os.pwrite(descriptor, b"hidden", 0)
        settings = config(1, 0, 1, secret=None, secret_file=f"fd:{descriptor}")
        assert read_secret(settings) == b"hidden"
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
