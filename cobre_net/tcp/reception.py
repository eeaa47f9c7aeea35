"""How the ranks come together at the coordinator, in any order.

The coordinator serves all who knock at once and none for long: whoever has not proved to know the
secret within ``STRANGER_SECS`` is dropped, and when more than ``_MAX_STRANGERS`` knock, the one
that has knocked longest makes room. A rank that was dropped so comes again; it tries until its own
time is up. Nobody of the group returns before all have come.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cobre_net.tcp.handshake import Greeter, Refused, go, refusal
from cobre_net.tcp.joining import own_identity, place_of
from cobre_net.tcp.link import QUIETLY, Link
from cobre_net.tcp.listening import listen
from cobre_net.tcp.secret import check_exposure
from cobre_net.tcp.wire import STRANGER_SECS
from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import TcpConfig

__all__ = ["gather"]

logger = logging.getLogger("cobre_net")

_MAX_STRANGERS = 128


def gather(config: TcpConfig, key: bytes, slice_secs: float) -> list[Link]:
    """Be the coordinator: wait for all other ranks, and return the connections in rank order.

    Raises:
        InitializationFailed: The address cannot be had, or ranks did not come in time.
    """
    listener = listen(config, config.size + _MAX_STRANGERS)
    try:
        check_exposure(config, key, listener.getsockname()[0], "The coordinator's address")
        return _Reception(config, key, listener).run(slice_secs)
    except OSError as error:
        # Not a rank's doing, as that is told by its name.
        raise InitializationFailed(
            "tcp",
            f"The coordinator lost the use of a connection: {error.strerror or error}",
            operation="join",
            source=error,
        ) from error
    finally:
        listener.close()


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
        # Not until nobody is left: who connects without end would keep the others unheard.
        for _ in range(_MAX_STRANGERS):
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
                caller.sock.send(reply, *QUIETLY)
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
                caller.sock.send(reply, *QUIETLY)
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
            f"Ranks {named} did not join at {place_of(self._config)} "
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
            assert caller.greeter.peer is not None
            links.append(Link(caller.sock, rank, caller.greeter.peer, slice_secs))
        for link in links:
            del self._callers[link.sock.fileno()]
        return links

    def _tell_all(self, frame: bytes) -> None:
        """Send a frame to every rank that has joined; whoever is gone is noticed later."""
        for caller in self._callers.values():
            if caller.greeter.rank is not None:
                with contextlib.suppress(OSError):
                    caller.sock.send(frame, *QUIETLY)
