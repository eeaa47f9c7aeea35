"""How the connections come about: the coordinator listens, the others come, in any order.

The coordinator serves all who knock at once and none for long: whoever has not proved to know the
secret within ``STRANGER_SECS`` is dropped, and when more than ``_MAX_STRANGERS`` knock, the one
that has knocked longest makes room. A rank that was dropped so comes again; it tries until its own
time is up. Nobody of the group returns before all have come.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import select
import socket
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cobre_net.tcp.handshake import Applicant, Greeter, Identity, Refused, go, refusal
from cobre_net.tcp.link import Link, tune
from cobre_net.tcp.secret import check_exposure, is_loopback
from cobre_net.tcp.wire import STRANGER_SECS
from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import TcpConfig

__all__ = ["gather", "join", "own_identity"]

logger = logging.getLogger("cobre_net")

_MAX_STRANGERS = 128
_FIRST_PAUSE_SECS, _LAST_PAUSE_SECS = 0.01, 0.5
# One attempt to connect; a host that drops packets would take minutes.
_ATTEMPT_SECS = 5.0
_WILDCARDS = ("0.0.0.0", "::")


def own_identity() -> Identity:
    """Return what this process tells the others of itself."""
    return Identity(os.getpid(), socket.gethostname())


def gather(config: TcpConfig, key: bytes, slice_secs: float) -> list[Link]:
    """Be the coordinator: wait for all other ranks, and return the connections in rank order.

    Raises:
        InitializationFailed: The address cannot be had, or ranks did not come in time.
    """
    listener = _listen(config)
    try:
        check_exposure(config, key, listener.getsockname()[0], "The coordinator's address")
        return _Reception(config, key, listener).run(slice_secs)
    finally:
        listener.close()


def join(config: TcpConfig, key: bytes, slice_secs: float) -> Link:
    """Be one of the others: find the coordinator, and return the connection to it.

    Raises:
        InitializationFailed: It did not let us in, or was not there in time.
    """
    seconds = config.connect_timeout_ms / 1000
    deadline = time.monotonic() + seconds
    pause, last = _FIRST_PAUSE_SECS, ""
    source: OSError | None = None
    while True:
        try:
            sock = _connect(config, deadline)
        except OSError as error:
            last, source = error.strerror or str(error), error
        else:
            with contextlib.ExitStack() as stack:
                stack.callback(sock.close)
                check_exposure(config, key, sock.getpeername()[0], "The coordinator")
                last, peer = _introduce(config, key, sock, deadline, seconds)
                if peer is not None:
                    stack.pop_all()
                    return Link(sock, 0, peer, slice_secs)
        if time.monotonic() + pause > deadline:
            _not_there(config, last, source)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LAST_PAUSE_SECS)


# A rank that comes


def _connect(config: TcpConfig, deadline: float) -> socket.socket:
    left = max(0.001, min(_ATTEMPT_SECS, deadline - time.monotonic()))
    assert config.port is not None
    sock = socket.create_connection((config.coordinator, config.port), timeout=left)
    if sock.getsockname() == sock.getpeername():
        # TCP lets a socket find itself when nobody listens on a port of the ephemeral range.
        sock.close()
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


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
                sock.sendall(answer)
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
        return error.strerror or str(error), None
    return "", applicant.coordinator


def _refused(config: TcpConfig, reason: str) -> NoReturn:
    raise InitializationFailed(
        "tcp",
        f"Rank {config.rank} cannot join at {_place(config)}: {reason}",
        operation="join",
        context={"code": "JoinRefused", "coordinator": _place(config), "rank": config.rank},
        suggestion="All ranks need the same COBRE_TCP_SIZE, secret and version, and a "
        "COBRE_TCP_RANK each.",
    )


def _not_there(config: TcpConfig, last: str, source: OSError | None) -> NoReturn:
    place = _place(config)
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


def _place(config: TcpConfig) -> str:
    host = f"[{config.coordinator}]" if ":" in config.coordinator else config.coordinator
    return f"{host}:{config.port}"


# The coordinator


def _listen(config: TcpConfig) -> socket.socket:
    backlog = config.size + _MAX_STRANGERS
    if config.bind_addr.startswith("fd:"):
        return _inherited(int(config.bind_addr.removeprefix("fd:")), backlog)
    address = config.bind_addr
    if address in _WILDCARDS:
        address = _narrowed(config, address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        # A listening socket of the run before, in its last state, does not keep the port.
        return socket.create_server(
            (address, config.port),
            family=family,
            backlog=backlog,
            dualstack_ipv6=address == "::",
        )
    except OSError as error:
        where = f"[{address}]:{config.port}" if ":" in address else f"{address}:{config.port}"
        # The text of create_server's error repeats the address.
        why = os.strerror(error.errno) if error.errno else str(error)
        raise InitializationFailed(
            "tcp",
            f"The coordinator cannot listen on {where}: {why}",
            operation="listen",
            source=error,
            context={"address": where},
            suggestion="Choose another COBRE_TCP_PORT, or an address of this host."
            if error.errno in (errno.EADDRINUSE, errno.EACCES)
            else "COBRE_TCP_BIND_ADDR is an address of the host on which rank 0 runs.",
        ) from error


def _narrowed(config: TcpConfig, wildcard: str) -> str:
    """Loopback in place of a wildcard where nobody was told to come any other way."""
    try:
        found = socket.getaddrinfo(config.coordinator, config.port, type=socket.SOCK_STREAM)
    except OSError:
        # The others may know it by a name that means nothing here.
        return wildcard
    addresses = [str(each[4][0]) for each in found]
    if addresses and all(map(is_loopback, addresses)):
        return addresses[0]
    return "::" if all(":" in each for each in addresses) else wildcard


def _inherited(descriptor: int, backlog: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        with contextlib.ExitStack() as stack:
            own = os.dup(descriptor)
            stack.callback(os.close, own)
            listener = socket.socket(fileno=own)
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.detach()
                raise OSError(errno.EINVAL, "not a listening socket")
            stack.pop_all()
        listener.listen(backlog)
        return listener
    except OSError as error:
        raise InitializationFailed(
            "tcp",
            f"Descriptor {descriptor} cannot be listened on: {error.strerror or error}",
            operation="listen",
            source=error,
            context={"setting": "COBRE_TCP_BIND_ADDR", "value": f"fd:{descriptor}"},
            suggestion="fd:N is set by the launcher; start ranks with python -m cobre_shm.spawn",
        ) from error


@dataclass
class _Caller:
    """Somebody who knocks, a stranger until ``greeter.rank`` is known."""

    sock: socket.socket
    address: Any
    greeter: Greeter
    deadline: float = field(default_factory=lambda: time.monotonic() + STRANGER_SECS)


class _Reception:
    """The coordinator while the group comes together."""

    def __init__(self, config: TcpConfig, key: bytes, listener: socket.socket) -> None:
        self._config, self._key, self._listener = config, key, listener
        self._deadline = time.monotonic() + config.connect_timeout_ms / 1000
        self._poller = select.poll()
        # In the order in which they came.
        self._callers: dict[int, _Caller] = {}
        self._dropped = 0
        self._why_dropped = ""

    def run(self, slice_secs: float) -> list[Link]:
        self._listener.setblocking(False)
        self._poller.register(self._listener, select.POLLIN)
        try:
            while len(self._ready()) < self._config.size - 1:
                self._turn()
            return self._open(slice_secs)
        except InitializationFailed as error:
            self._tell_all(refusal(error.message))
            raise
        finally:
            for caller in self._callers.values():
                caller.sock.close()
            if self._dropped:
                logger.warning(
                    "while ranks joined, %d connection(s) were dropped that proved to be no rank; "
                    "the last one: %s",
                    self._dropped,
                    self._why_dropped,
                )

    def _turn(self) -> None:
        now = time.monotonic()
        if now >= self._deadline:
            self._give_up()
        first = min((each.deadline for each in self._unknown()), default=self._deadline)
        # Rounded up, or the last millisecond would be spent turning.
        wait = int(max(0.0, min(first, self._deadline) - now) * 1000) + 1
        for descriptor, _ in self._poller.poll(wait):
            if descriptor == self._listener.fileno():
                self._accept()
            elif descriptor in self._callers:
                self._hear(descriptor)
        now = time.monotonic()
        for caller in self._unknown():
            if caller.deadline <= now:
                self._drop(caller, f"it said nothing valid for {STRANGER_SECS:g} s")

    def _ready(self) -> dict[int, _Caller]:
        return {
            caller.greeter.rank: caller
            for caller in self._callers.values()
            if caller.greeter.rank is not None and caller.greeter.peer is not None
        }

    def _unknown(self) -> list[_Caller]:
        return [each for each in self._callers.values() if each.greeter.rank is None]

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._unknown():
                    self._drop(self._unknown()[0], "descriptors ran out")
                    continue
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                raise InitializationFailed(
                    "tcp",
                    f"The coordinator cannot accept connections: {error.strerror}",
                    operation="join",
                    source=error,
                    suggestion="Raise the limit of open files (ulimit -n).",
                ) from error
            sock.setblocking(False)
            greeter = Greeter(self._key, self._config.size, self._why_taken)
            self._callers[sock.fileno()] = _Caller(sock, address, greeter)
            self._poller.register(sock, select.POLLIN)
            unknown = self._unknown()
            if len(unknown) > _MAX_STRANGERS:
                self._drop(unknown[0], "too many knocked at once")

    def _hear(self, descriptor: int) -> None:
        caller = self._callers[descriptor]
        greeter = caller.greeter
        try:
            data = caller.sock.recv(max(1, greeter.limit))
        except BlockingIOError:
            return
        except OSError as error:
            data = b""
            reason = error.strerror or str(error)
        else:
            reason = "it closed the connection"
        if greeter.peer is not None or (greeter.rank is not None and not data):
            self._lost(caller, reason if not data else "it spoke out of turn")
        if not data:
            self._drop(caller, reason)
            return
        try:
            reply = greeter.feed(data)
        except Refused as error:
            if greeter.rank is not None:
                self._lost(caller, error.reason)
            self._drop(caller, error.reason, error.reply)
            return
        if reply:
            # A few bytes on a fresh connection: there is room, or it is not one we want.
            try:
                caller.sock.send(reply)
            except OSError as error:
                self._drop(caller, error.strerror or str(error))

    def _why_taken(self, rank: int) -> str | None:
        holder = next((c for c in self._callers.values() if c.greeter.rank == rank), None)
        if holder is None:
            return None
        peer = holder.greeter.peer
        who = f"pid {peer.pid} on {peer.host}" if peer else f"a process at {holder.address[0]}"
        return f"rank {rank} is taken by {who}"

    def _drop(self, caller: _Caller, reason: str, reply: bytes = b"") -> None:
        descriptor = caller.sock.fileno()
        self._poller.unregister(descriptor)
        del self._callers[descriptor]
        if reply:
            with contextlib.suppress(OSError):
                caller.sock.send(reply)
        caller.sock.close()
        self._dropped += 1
        self._why_dropped = f"{caller.address[0]}: {reason}"

    def _lost(self, caller: _Caller, reason: str) -> NoReturn:
        rank, peer = caller.greeter.rank, caller.greeter.peer
        process = f" (pid {peer.pid} on {peer.host})" if peer else f" at {caller.address[0]}"
        raise InitializationFailed(
            "tcp",
            f"Rank {rank}{process} was lost before the group was complete: {reason}",
            operation="join",
            context={"code": "RankFailed", "rank": rank, "pid": peer.pid if peer else 0},
            suggestion="Look at what that rank wrote.",
        )

    def _give_up(self) -> NoReturn:
        ready = self._ready()
        missing = [rank for rank in range(1, self._config.size) if rank not in ready]
        named = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
        dropped = f"; dropped, {self._why_dropped}" if self._dropped else ""
        raise InitializationFailed(
            "tcp",
            f"Ranks {named} did not join at {_place(self._config)} "
            f"within {self._config.connect_timeout_ms} ms{dropped}",
            operation="join",
            context={"code": "JoinTimeout", "missing_ranks": missing},
            suggestion="Start all ranks with the same COBRE_TCP_COORDINATOR and COBRE_TCP_PORT; "
            "COBRE_TCP_CONNECT_TIMEOUT_MS says how long they may take.",
        )

    def _open(self, slice_secs: float) -> list[Link]:
        ready = self._ready()
        self._tell_all(go(own_identity()))
        links = []
        for rank in range(1, self._config.size):
            caller = ready[rank]
            del self._callers[caller.sock.fileno()]
            assert caller.greeter.peer is not None
            links.append(Link(caller.sock, rank, caller.greeter.peer, slice_secs))
        return links

    def _tell_all(self, frame: bytes) -> None:
        """Send a frame to every rank that has joined; whoever is gone is noticed later."""
        for caller in self._callers.values():
            if caller.greeter.rank is not None:
                with contextlib.suppress(OSError):
                    caller.sock.send(frame)
