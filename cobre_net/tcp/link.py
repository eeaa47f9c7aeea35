"""One connection between the coordinator and a worker, once both know who the other is.

Sockets block, but not for long (``FIRST_SECS``): the kernel's own time limits on send and receive
cost nothing while data flows. They begin anew after each signal, as Python repeats the call; so
they are shorter than the intervals of a timer or a profiler, or nothing would ever be late. Whoever
waits longer polls, up to ``SLICE_SECS``, where Python keeps the time.

How a peer is found to be gone, while one waits for it:

    its process ends       the kernel says so at once: end of stream, or a reset
    its host is silent     nothing was acknowledged for ``SILENCE_SECS``: keep-alive probes when
                           nothing is under way; when something is, whoever waits looks at what
                           TCP knows (``is_silent``), and TCP_USER_TIMEOUT looks where nobody waits

A host may hear and not be heard. Then what the other side repeats keeps its own keep-alive quiet,
but a reset reaches it: so who finds a host silent resets the connection (``_cut``), before
the kernel would give up, which does so without a word.

A peer that computes, or was stopped, is not silent: its kernel answers. But TCP_USER_TIMEOUT also
ends a connection whose peer acknowledges and has no room, which is what a late rank looks like to
one that sends much. So it is off during long payloads (``begin_stream``) and until the peer's
kernel has taken the last of them (``end_stream``). What is below ``SMALL_BYTES`` always finds room.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cobre_net.tcp.failure import Failure
from cobre_net.tcp.handshake import Identity
from cobre_net.tcp.wire import (
    ABORT,
    HEAD,
    HEAD_BYTES,
    HEARTBEAT,
    MAX_CONTROL_BYTES,
    PREFIX,
    PREFIX_BYTES,
    PROBE,
    SHUTDOWN,
    SMALL_BYTES,
    BadFrame,
    Head,
    frame,
)

__all__ = [
    "FIRST_SECS",
    "HANGUP",
    "PAYLOAD",
    "QUIETLY",
    "SLICE_SECS",
    "START",
    "Ended",
    "Ending",
    "FrameBuffer",
    "Link",
    "say_last",
]

HANGUP = select.POLLRDHUP | select.POLLHUP | select.POLLERR
SLICE_SECS = 0.1
FIRST_SECS = 0.002
SILENCE_SECS = 8
_KEEPALIVE_IDLE_SECS = 3
# Where a payload begins in a frame's buffer, so that elements of any type are aligned there.
PAYLOAD = 64
START = PAYLOAD - HEAD_BYTES
# Later than who looks once a second and finds the length of a silence by it.
_USER_TIMEOUT_MS = 1000 * SILENCE_SECS + 1500
_SUSPICION_SECS = SILENCE_SECS - 1.1
# So long after a look, the next one begins anew.
_LOOK_SECS = 3.0
# Of Linux's tcp_info: retransmits, probes, and how many bytes were acknowledged.
_TCP_INFO = struct.Struct("=2xBB116xQ")
# How long a failing rank tries to finish a frame, and a closing one waits for the peers' word.
_LAST_WORDS_SECS = 1.0
# Asks how many bytes of a socket have not been sent even once (SIOCOUTQNSD of linux/sockios.h).
_SIOCOUTQNSD = 0x894B


_libc = ctypes.CDLL(None)
# The flags of ``Link.send`` for a frame of one piece: a peer's death is an error, also where the
# program has given SIGPIPE back its default, which would end this process.
QUIETLY = (socket.MSG_NOSIGNAL,)


class Ended(Exception):
    """The connection is of no use any more; the text says why."""


class Ending(NamedTuple):
    """What a peer said last: ``failure`` if it told of one, ``left`` if it closed in order."""

    failure: Failure | None = None
    left: bool = False


class FrameBuffer:
    """Room for one small frame.

    Attributes:
        memory: The whole buffer; a frame begins at ``START``, its payload at ``PAYLOAD``.
        frame: View of it from ``START``.
        address: Of the payload.
        received: Bytes of a frame that have come so far.
    """

    def __init__(self) -> None:
        self.memory = bytearray(PAYLOAD + SMALL_BYTES)
        self.frame = memoryview(self.memory)[START:]
        whole = np.frombuffer(self.memory, np.uint8)
        self.address = int(whole.__array_interface__["data"][0]) + PAYLOAD
        self.received = 0

    def head(self) -> Head:
        """The head of the frame, which is there."""
        return Head._make(HEAD.unpack_from(self.memory, START))


class Link:
    """A connection.

    Attributes:
        rank: Of the peer.
        peer: Its process.
        sock: The socket.
        buffer: Where its small frames and the heads of its large ones arrive.
        frame: The last frame that was to be sent, in pieces; empty if nothing of it is kept.
        sent: How much of it the kernel took, call by call.
        unread: Bytes of the payload being received that have not come yet.
        has_said_last: Whether the peer's last word was read: it waits for none of ours.
    """

    def __init__(self, sock: socket.socket, rank: int, peer: Identity, slice_secs: float) -> None:
        self.rank, self.peer, self.sock = rank, peer, sock
        self.buffer = FrameBuffer()
        # Without the wrapping of take() and put(), for the shortest road.
        self.receive, self.send = sock.recv_into, sock.send
        self.frame: Sequence[memoryview] = ()
        self.sent: list[int] = []
        self.unread = 0
        self.has_said_last = False
        # When it was looked at last, since when it has been suspected, and the bytes it had
        # acknowledged then.
        self._suspicion = 0.0, 0.0, -1
        tune(sock)
        self._slice_ms = 1000 * slice_secs
        first_secs = min(slice_secs, FIRST_SECS)
        whole = int(first_secs)
        limit = struct.pack("ll", whole, int((first_secs - whole) * 1e6))
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def take(self, view: memoryview, flags: int = 0) -> int:
        """Receive into ``view``; return the number of bytes, 0 when none came in time.

        Raises:
            Ended: Nothing can come any more.
        """
        try:
            count = self.sock.recv_into(view, 0, flags)
        except BlockingIOError:
            has_come = self._has_become(select.POLLIN, flags)
            return self.take(view, socket.MSG_DONTWAIT) if has_come else 0
        except OSError as error:
            raise Ended(_why(error)) from error
        if not count:
            raise Ended("its connection ended")
        return count

    def put(self, buffers: Sequence[memoryview | bytes], flags: int = 0) -> int:
        """Send from ``buffers``; return the number of bytes, 0 when there was no room in time.

        Raises:
            Ended: Nothing can be sent any more.
        """
        try:
            return self.sock.sendmsg(buffers, (), flags | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            has_room = self._has_become(select.POLLOUT, flags)
            return self.put(buffers, socket.MSG_DONTWAIT) if has_room else 0
        except OSError as error:
            raise Ended(_why(error)) from error

    def begin(self, frame: Sequence[memoryview]) -> None:
        """Say what ``send_on`` is going to send."""
        # In this order: of a frame of which nothing was sent, nothing is missing.
        self.sent = []
        self.frame = frame

    def send_on(self, rest: Sequence[memoryview], flags: int = 0) -> int:
        """Do what ``put`` does with ``rest`` of the frame that was begun, and count it.

        A signal's handler may raise as soon as the call has returned, before its result is stored.
        ``map`` and ``extend`` store it in one step of the interpreter, so that ``unsent`` is true.
        """
        try:
            quietly = flags | socket.MSG_NOSIGNAL
            self.sent.extend(map(self.sock.sendmsg, (rest,), ((),), (quietly,)))
        except BlockingIOError:
            has_room = self._has_become(select.POLLOUT, flags)
            return self.send_on(rest, socket.MSG_DONTWAIT) if has_room else 0
        except OSError as error:
            raise Ended(_why(error)) from error
        return self.sent[-1]

    def _has_become(self, event: int, flags: int) -> bool:
        """Wait for ``event`` where ``flags`` allow it; whether it is worth to try again."""
        if flags & socket.MSG_DONTWAIT:
            return False
        poller = select.poll()
        poller.register(self.sock, event)
        return bool(poller.poll(self._slice_ms))

    @property
    def unsent(self) -> int:
        """Bytes of a frame that has been begun and is not sent whole."""
        sent = sum(self.sent)
        return sum(map(len, self.frame)) - sent if sent else 0

    def heartbeat(self) -> None:
        """Tell a waiting peer that somebody is there, if that is possible now."""
        self._interject(frame(HEARTBEAT))

    def probe(self) -> None:
        """Have the kernel of a peer whose process has ended answer with a reset.

        Between collectives.
        """
        self._interject(frame(PROBE))

    def has_much_unread(self) -> bool:
        """Whether more has come than always finds room: what follows it may not arrive."""
        return self._ask(termios.FIONREAD) > SMALL_BYTES + HEAD_BYTES

    def _interject(self, word: bytes) -> None:
        """Send a control frame now or not at all; never inside another frame."""
        if self.unsent:
            return
        with contextlib.suppress(Ended):
            sent = self.put([word], socket.MSG_DONTWAIT)
            if 0 < sent < len(word) and self.put([word[sent:]]) != len(word) - sent:
                # A connection that takes no five bytes: it ends here rather than garbled.
                self.sock.shutdown(socket.SHUT_RDWR)

    def begin_stream(self) -> None:
        """Expect that the peer may be late while much is sent to it."""
        self._set_user_timeout(0)

    def end_stream(self) -> bool:
        """Return to the short limit if the peer's kernel has taken all; whether it has."""
        if self._ask(termios.TIOCOUTQ):
            return False
        self._set_user_timeout(_USER_TIMEOUT_MS)
        return True

    def has_unsent(self) -> bool:
        """Whether the kernel holds bytes for the peer that it has not sent even once."""
        return self._ask(_SIOCOUTQNSD) > 0

    def is_over(self) -> bool:
        """Whether the connection was reset or has failed: nothing that is unsent will be sent."""
        poller = select.poll()
        poller.register(self.sock, 0)
        return any(events & select.POLLERR for _, events in poller.poll(0))

    def _ask(self, request: int) -> int:
        try:
            return int(struct.unpack("i", fcntl.ioctl(self.sock, request, bytes(4)))[0])
        except OSError:
            return 0

    def _set_user_timeout(self, milliseconds: int) -> None:
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def is_silent(self) -> bool:
        """Whether packets have been repeated for so long and none was acknowledged.

        If so, the connection is reset. To be asked at least once a second.
        """
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return False
        retransmits, probes, acknowledged = _TCP_INFO.unpack(info)
        looked, since, before = self._suspicion
        now = time.monotonic()
        # One probe may always be under way.
        is_suspect = retransmits or probes > 1
        if not is_suspect or acknowledged != before or now - looked > _LOOK_SECS:
            since = now
        self._suspicion = now, since, acknowledged
        if now - since < _SUSPICION_SECS:
            return False
        self._cut()
        return True

    def _cut(self) -> None:
        # To close the socket would not do: rank 0 has a thread that waits on it.
        nowhere = struct.pack("H14x", socket.AF_UNSPEC)
        _libc.connect(self.sock.fileno(), nowhere, len(nowhere))

    def ending(self) -> Ending:
        """What the peer said last, of what has arrived; nothing is taken away.

        For a connection that has ended, so that no more can come. The next byte to come belongs
        to a frame's payload of which ``unread`` bytes are missing, or begins a frame.
        """
        queued = self._ask(termios.FIONREAD)
        try:
            data = self.sock.recv(queued, socket.MSG_PEEK | socket.MSG_DONTWAIT) if queued else b""
        except OSError:
            return Ending()
        begun = bytes(self.buffer.frame[: self.buffer.received]) if not self.unread else b""
        return last_word(begun + data, self.unread)

    def close(self) -> None:
        """Give the connection back; what was sent still arrives."""
        # Unread bytes would turn the end of the stream into a reset.
        with contextlib.suppress(OSError):
            while self.sock.recv(1 << 16, socket.MSG_DONTWAIT):
                pass
        self.sock.close()


def tune(sock: socket.socket) -> None:
    """Set what every connection has: see the head of this module."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tcp = {
        socket.TCP_NODELAY: 1,
        socket.TCP_KEEPIDLE: _KEEPALIVE_IDLE_SECS,
        socket.TCP_KEEPINTVL: 1,
        socket.TCP_KEEPCNT: SILENCE_SECS - _KEEPALIVE_IDLE_SECS,
        socket.TCP_USER_TIMEOUT: _USER_TIMEOUT_MS,
    }
    for option, value in tcp.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    # A connection that was reset has no peer; who uses it next finds that out, and says who it was.
    with contextlib.suppress(OSError):
        if sock.getpeername()[0] == sock.getsockname()[0]:
            # Nothing is lost and nothing queues inside one host. The kernel's choice may be BBR,
            # which paces what it sends by timers, and they cost more than the bytes.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def last_word(data: bytes, skip: int) -> Ending:
    """Return what frames that begin behind ``skip`` bytes of ``data`` end with."""
    place = skip
    while place + PREFIX_BYTES <= len(data):
        length, tag = PREFIX.unpack_from(data, place)
        if tag == SHUTDOWN:
            return Ending(left=True)
        end = place + 4 + length
        if tag == ABORT and length <= MAX_CONTROL_BYTES + 1 and end <= len(data):
            with contextlib.suppress(BadFrame):
                return Ending(Failure.from_body(data[place + PREFIX_BYTES : end]))
        if length < 1:
            break
        place = end
    return Ending()


def say_last(links: Sequence[Link], word: bytes) -> None:
    """Send ``word`` and then the end of the stream to all, in bounded time, whatever happens.

    A frame that was begun goes first, or the word would be part of it, and it goes as it is: it may
    be the last that a peer lacks, who is then content and works with it before it hears the word.
    So that peer has what this rank would have sent without the failure.

    Returns when the kernel has sent it to all: a process that ends with bytes unread resets its
    connections, and what was not sent by then is lost. A peer that does not read in time is left to
    find the connection ended, as is one that has said its last word.
    """
    poller = select.poll()
    waiting: dict[int, tuple[Link, memoryview]] = {}
    hearing = [link for link in links if not link.has_said_last]
    for link in links:
        begun = b"".join(link.frame)
        rest = memoryview(begun[len(begun) - link.unsent :] + word)
        # It may be the user's memory.
        link.begin(())
        if link in hearing:
            waiting[link.sock.fileno()] = link, rest
            poller.register(link.sock, select.POLLOUT)
        else:
            _end_stream(link)
    deadline = time.monotonic() + _LAST_WORDS_SECS
    while waiting:
        left = deadline - time.monotonic()
        ready = poller.poll(max(0.0, left) * 1000)
        for descriptor, _ in ready:
            link, rest = waiting[descriptor]
            try:
                rest = rest[link.put([rest], socket.MSG_DONTWAIT) :]
            except Ended:
                rest = rest[:0]
            waiting[descriptor] = link, rest
            if not rest:
                poller.unregister(descriptor)
                del waiting[descriptor]
                _end_stream(link)
        if left <= 0:
            break
    for link, _ in waiting.values():
        _end_stream(link)
    for link in hearing:
        while link.has_unsent() and not link.is_over() and time.monotonic() < deadline:
            time.sleep(0.001)


def _end_stream(link: Link) -> None:
    with contextlib.suppress(OSError):
        link.sock.shutdown(socket.SHUT_WR)


def _why(error: OSError) -> str:
    if error.errno == errno.ETIMEDOUT:
        return f"its host has not answered for {SILENCE_SECS} s"
    if error.errno == errno.ECONNRESET:
        return "its connection was reset"
    return f"its connection failed: {error.strerror or error}"
