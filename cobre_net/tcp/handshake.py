"""Who is there: the two-way challenge, as two state machines without sockets.

    W                                        C
    HELLO     nonce_w                   ->
                                        <-   CHALLENGE  nonce_c
    PROOF     rank, size, mac_w         ->   checks mac_w, size, rank
    checks mac_c                        <-   ACK        session, mac_c
    READY     session, pid, host        ->
                                        <-   GO         pid, host

    mac_w = HMAC-SHA256(key, "cobre-net worker 1"      | nonce_w | nonce_c | rank | size)
    mac_c = HMAC-SHA256(key, "cobre-net coordinator 1" | nonce_w | nonce_c | rank | size | session)

Both nonces are fresh for each connection, so what was recorded once proves nothing again, and the
two texts differ, so what one side said cannot be sent back to it (the scheme is that of RFC 2104
challenges as in ``multiprocessing.connection``). Without a secret the key is empty and the
exchange proves nothing but the protocol; then only loopback, or what was declared insecure, is
let in (``secret.py``). What follows the handshake is neither signed nor encrypted.

C says nothing about ranks or sizes to anybody who has not proved to know the key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass

from cobre_net.tcp.wire import (
    ACK,
    CHALLENGE,
    GO,
    HELLO,
    PREFIX_BYTES,
    PROOF,
    READY,
    REFUSE,
    STRANGER_BYTES,
    VERSION,
    BadFrame,
    check_prefix,
    frame,
)

__all__ = ["Applicant", "Greeter", "Identity", "Refused"]

_MAGIC = b"COBRENET"
_NONCE_BYTES = 16
_MAC_BYTES = 32
_HOST_BYTES = 255
_REASON_BYTES = 512
_HELLO = struct.Struct(f">8sH{_NONCE_BYTES}s")
_CHALLENGE = struct.Struct(f">H{_NONCE_BYTES}s")
_PROOF = struct.Struct(f">II{_MAC_BYTES}s")
_ACK = struct.Struct(f">{_NONCE_BYTES}s{_MAC_BYTES}s")
_READY = struct.Struct(f">{_NONCE_BYTES}sQ")
_GO = struct.Struct(">Q")
_WORKER = b"cobre-net worker 1"
_COORDINATOR = b"cobre-net coordinator 1"

_REFUSALS = {
    1: "it speaks another version of the protocol",
    2: "the secrets differ",
    3: "the sizes differ",
    4: "the rank is not one that may join",
    5: "the rank is taken",
    6: "the group did not come together",
}
_VERSION, _SECRET, _SIZE, _RANK, _TAKEN, _FAILED = _REFUSALS


@dataclass(frozen=True)
class Identity:
    """A process at the other end."""

    pid: int
    host: str


class Refused(Exception):
    """The other side is not let in, or does not let us in.

    Attributes:
        reason: In words.
        reply: What to send before closing; empty: nothing.
    """

    def __init__(self, reason: str, reply: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply = reply


def refusal(text: str, reason: int = _FAILED) -> bytes:
    """Return the REFUSE frame with this text."""
    return frame(REFUSE, bytes([reason]) + text.encode()[:_REASON_BYTES])


def go(identity: Identity) -> bytes:
    """Return the GO frame of a coordinator."""
    return frame(GO, _GO.pack(identity.pid) + _host_bytes(identity))


class Greeter:
    """The coordinator's end of one connection.

    Args:
        key: The secret.
        size: Number of ranks.
        claim: Called with the rank of a peer that has proved the key and fits; returns why it may
            not have the rank, or None.

    Attributes:
        limit: How many bytes may be read at most before the next ``feed``; the connection
            needs no larger buffer.
        rank: Of the peer once it is authenticated, else None.
        peer: Its process once it is ready, else None.
    """

    def __init__(self, key: bytes, size: int, claim: Callable[[int], str | None]) -> None:
        self._key, self._size, self._claim = key, size, claim
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._session = secrets.token_bytes(_NONCE_BYTES)
        self._nonces = b""
        self._received = b""
        self._step = self._on_hello
        self._limits = {HELLO: (_HELLO.size, _HELLO.size)}
        self.rank: int | None = None
        self.peer: Identity | None = None

    @property
    def limit(self) -> int:
        """See the class."""
        bound = STRANGER_BYTES if self.rank is None else _READY.size + _HOST_BYTES + PREFIX_BYTES
        return bound - len(self._received)

    def feed(self, data: bytes) -> bytes:
        """Take what has come, at most ``limit`` bytes; return what to send.

        Raises:
            Refused: The connection is to be closed.
        """
        self._received += data
        if len(self._received) < PREFIX_BYTES:
            return b""
        try:
            length = check_prefix(self._received, self._limits)
        except BadFrame as error:
            raise Refused(f"no rank: {error}") from error
        end = PREFIX_BYTES + length
        if len(self._received) < end:
            return b""
        body, rest = self._received[PREFIX_BYTES:end], self._received[end:]
        if rest:
            # Each side speaks when it is its turn.
            raise Refused("no rank: it does not wait for answers")
        self._received = b""
        return self._step(body)

    def _on_hello(self, body: bytes) -> bytes:
        magic, version, nonce = _HELLO.unpack(body)
        if magic != _MAGIC:
            raise Refused("no rank: another magic word")
        if version != VERSION:
            text = f"version {version} is not {VERSION}"
            raise Refused(text, refusal(text, _VERSION))
        self._nonces = nonce + self._nonce
        self._step, self._limits = self._on_proof, {PROOF: (_PROOF.size, _PROOF.size)}
        return frame(CHALLENGE, _CHALLENGE.pack(VERSION, self._nonce))

    def _on_proof(self, body: bytes) -> bytes:
        rank, size, mac = _PROOF.unpack(body)
        claimed = self._nonces + struct.pack(">II", rank, size)
        if not hmac.compare_digest(mac, _mac(self._key, _WORKER, claimed)):
            raise Refused("the proof of its secret is wrong", refusal("", _SECRET))
        if size != self._size:
            text = f"rank {rank} was started with size {size}, the coordinator with {self._size}"
            raise Refused(text, refusal(text, _SIZE))
        if not 0 < rank < size:
            text = f"rank {rank} is not in 1..{size - 1}"
            raise Refused(text, refusal(text, _RANK))
        taken = self._claim(rank)
        if taken is not None:
            raise Refused(taken, refusal(taken, _TAKEN))
        self.rank = rank
        mac = _mac(self._key, _COORDINATOR, claimed + self._session)
        self._step = self._on_ready
        self._limits = {READY: (_READY.size, _READY.size + _HOST_BYTES)}
        return frame(ACK, _ACK.pack(self._session, mac))

    def _on_ready(self, body: bytes) -> bytes:
        session, pid = _READY.unpack_from(body)
        if session != self._session:
            raise Refused("the session is another one")
        self.peer = Identity(pid, body[_READY.size :].decode("utf-8", "replace"))
        self._limits = {}
        return b""


class Applicant:
    """The end of a rank that joins.

    Attributes:
        is_known: Whether the coordinator has proved to know the secret.
        coordinator: Its process once the group is complete, else None.
    """

    def __init__(self, key: bytes, rank: int, size: int, identity: Identity) -> None:
        self._key, self._rank, self._size = key, rank, size
        self._identity = identity
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._claimed = b""
        self._received = b""
        self._step = self._on_challenge
        self._limits = {CHALLENGE: (_CHALLENGE.size, _CHALLENGE.size)}
        self.is_known = False
        self.coordinator: Identity | None = None

    @property
    def limit(self) -> int:
        """How many bytes may be read at most before the next ``feed``.

        Exactly to the end of the frame: what follows GO is a collective's.
        """
        if len(self._received) < PREFIX_BYTES:
            return PREFIX_BYTES - len(self._received)
        return PREFIX_BYTES + self._body_bytes() - len(self._received)

    def hello(self) -> bytes:
        """Return the first frame."""
        return frame(HELLO, _HELLO.pack(_MAGIC, VERSION, self._nonce))

    def feed(self, data: bytes) -> bytes:
        """Take what has come, at most ``limit`` bytes; return what to send.

        Raises:
            Refused: We are not let in, or this is no coordinator of ours.
        """
        self._received += data
        if len(self._received) < PREFIX_BYTES or self.limit:
            return b""
        body, tag = self._received[PREFIX_BYTES:], self._received[4]
        self._received = b""
        if tag == REFUSE:
            text = body[1:].decode("utf-8", "replace")
            shown = "".join(each if each.isprintable() else "?" for each in text)
            raise Refused(f"{_REFUSALS.get(body[0], 'no reason given')}: {shown}".rstrip(": "))
        return self._step(body)

    def _body_bytes(self) -> int:
        try:
            return check_prefix(self._received, {**self._limits, REFUSE: (1, 1 + _REASON_BYTES)})
        except BadFrame as error:
            raise Refused(f"this is no coordinator: {error}") from error

    def _on_challenge(self, body: bytes) -> bytes:
        version, nonce = _CHALLENGE.unpack(body)
        if version != VERSION:
            raise Refused(f"the coordinator speaks version {version}, not {VERSION}")
        self._claimed = self._nonce + nonce + struct.pack(">II", self._rank, self._size)
        self._step, self._limits = self._on_ack, {ACK: (_ACK.size, _ACK.size)}
        mac = _mac(self._key, _WORKER, self._claimed)
        return frame(PROOF, _PROOF.pack(self._rank, self._size, mac))

    def _on_ack(self, body: bytes) -> bytes:
        session, mac = _ACK.unpack(body)
        if not hmac.compare_digest(mac, _mac(self._key, _COORDINATOR, self._claimed + session)):
            raise Refused("the coordinator's proof of the secret is wrong")
        self.is_known = True
        self._step, self._limits = self._on_go, {GO: (_GO.size, _GO.size + _HOST_BYTES)}
        return frame(READY, _READY.pack(session, self._identity.pid) + _host_bytes(self._identity))

    def _on_go(self, body: bytes) -> bytes:
        (pid,) = _GO.unpack_from(body)
        self.coordinator = Identity(pid, body[_GO.size :].decode("utf-8", "replace"))
        return b""


def _mac(key: bytes, side: bytes, text: bytes) -> bytes:
    return hmac.new(key, side + text, hashlib.sha256).digest()


def _host_bytes(identity: Identity) -> bytes:
    return identity.host.encode("utf-8", "replace")[:_HOST_BYTES]
