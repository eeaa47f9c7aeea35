"""How a rank finds the coordinator: it tries until its own time is up, and may come first."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import time
from typing import NoReturn

from cobre_net.tcp.handshake import Applicant, Identity, Refused
from cobre_net.tcp.link import QUIETLY, Link, tune
from cobre_net.tcp.secret import check_exposure
from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import TcpConfig
from cobre_shm.selection.values import join_address

__all__ = ["join", "own_identity", "place_of"]

_FIRST_PAUSE_SECS, _LAST_PAUSE_SECS = 0.01, 0.5
# One attempt to connect; a host that drops packets would take minutes.
_ATTEMPT_SECS = 5.0


def own_identity() -> Identity:
    """Return what this process tells the others of itself."""
    return Identity(os.getpid(), socket.gethostname())


def join(config: TcpConfig, key: bytes, slice_secs: float) -> Link:
    """Be one of the others: find the coordinator, and return the connection to it.

    Raises:
        InitializationFailed: It did not let us in, or was not there in time.
    """
    seconds = config.connect_timeout_ms / 1000
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE_SECS
    while True:
        source: OSError | None = None
        try:
            with contextlib.ExitStack() as stack:
                sock = stack.enter_context(_connect(config, deadline))
                check_exposure(config, key, _peer_of(sock), "The coordinator")
                last, peer = _introduce(config, key, sock, deadline, seconds)
                if peer is not None:
                    stack.pop_all()
                    break
        except OSError as error:
            last, source = error.strerror or str(error), error
        except UnicodeError as error:
            # Such as an empty label, or one above 63 characters: time does not mend it.
            _not_there(config, f"no name of a host: {error}", error)
        if time.monotonic() + pause > deadline:
            _not_there(config, last, source)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LAST_PAUSE_SECS)
    # The group is complete: nothing of this can be tried again.
    try:
        return Link(sock, 0, peer, slice_secs)
    except OSError as error:
        sock.close()
        _refused(config, f"the connection was lost: {error}")


def _connect(config: TcpConfig, deadline: float) -> socket.socket:
    left = max(0.001, min(_ATTEMPT_SECS, deadline - time.monotonic()))
    assert config.port is not None
    return socket.create_connection((config.coordinator, config.port), timeout=left)


def _peer_of(sock: socket.socket) -> str:
    """The address of who is there."""
    address = sock.getpeername()
    if sock.getsockname() == address:
        # TCP lets a socket find itself when nobody listens on a port of the ephemeral range.
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return str(address[0])


def _introduce(
    config: TcpConfig, key: bytes, sock: socket.socket, deadline: float, seconds: float
) -> tuple[str, Identity | None]:
    """Do the handshake; return why it may be tried again, or the coordinator."""
    applicant = Applicant(key, config.rank, config.size, own_identity())
    try:
        tune(sock)
        answer = applicant.hello()
        while applicant.coordinator is None:
            # Once it knows us, the coordinator keeps the time; it may have begun later than we.
            limit = deadline + (seconds + _ATTEMPT_SECS if applicant.is_known else 0)
            left = limit - time.monotonic()
            if left <= 0:
                return "it did not answer in time", None
            sock.settimeout(left)
            if answer:
                sock.sendall(answer, *QUIETLY)
            data = sock.recv(applicant.limit)
            if not data:
                if applicant.is_known:
                    _refused(config, "the coordinator ended before the group was complete")
                return "it closed the connection", None
            answer = applicant.feed(data)
    except Refused as error:
        _refused(config, error.reason)
    except OSError as error:
        if applicant.is_known:
            _refused(config, f"the connection was lost before the group was complete: {error}")
        raise
    return "", applicant.coordinator


def _refused(config: TcpConfig, reason: str) -> NoReturn:
    raise InitializationFailed(
        "tcp",
        f"Rank {config.rank} cannot join at {place_of(config)}: {reason}",
        operation="join",
        context={"code": "JoinRefused", "coordinator": place_of(config), "rank": config.rank},
        suggestion="All ranks need the same COBRE_TCP_SIZE, secret and version, and a "
        "COBRE_TCP_RANK each.",
    )


def _not_there(config: TcpConfig, last: str, source: Exception | None) -> NoReturn:
    place = place_of(config)
    raise InitializationFailed(
        "tcp",
        f"TCP backend failed to connect to coordinator at {place} "
        f"within {config.connect_timeout_ms} ms: {last}",
        operation="connect",
        source=source,
        context={"coordinator": place, "rank": config.rank},
        suggestion=f"Verify that the TCP coordinator is running at {place} and that the port is "
        "accessible from this host.",
    ) from source


def place_of(config: TcpConfig) -> str:
    """Where the coordinator is, as ``host:port``."""
    return join_address(config.coordinator, config.port)
