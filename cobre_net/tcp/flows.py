"""Payloads in frames: how blocks of bytes leave through a connection, and how they arrive.

Each call moves what can be moved now, and says so. Two wait: the rest of a control frame is waited
for once it has begun (``look_for_word``), and ``Inflow.pull`` without MSG_DONTWAIT waits as long as
the connection does.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence

from cobre_net.tcp.call import Call
from cobre_net.tcp.failure import Failure
from cobre_net.tcp.link import Ended, Link
from cobre_net.tcp.wire import (
    ABORT,
    END,
    FRAME_BYTES,
    HEAD_BYTES,
    HEARTBEAT,
    MAX_CONTROL_BYTES,
    PREFIX_BYTES,
    PROBE,
    RESULT,
    SEND,
    SHUTDOWN,
    BadFrame,
    check_prefix,
)

__all__ = [
    "CHUNK_BYTES",
    "Block",
    "Different",
    "Inflow",
    "Outflow",
    "Ring",
    "Spoke",
    "look_for_word",
]

# The unit in which results are made and passed on: a few of them stay in a core's cache.
CHUNK_BYTES = 1 << 17
_CONTROL = {HEARTBEAT: (0, 0), PROBE: (0, 0), ABORT: (1, MAX_CONTROL_BYTES), SHUTDOWN: (0, 0)}
# Between the first and the last byte of a control frame.
_WORD_SECS = 2.0


class Different(Exception):
    """A peer's frame belongs to another call than ours."""


class Spoke(Exception):
    """A peer has said its last word: ``failure``, or None if it closed in order."""

    def __init__(self, failure: Failure | None) -> None:
        super().__init__()
        self.failure = failure


class Block:
    """One rank's bytes, in their place in the user's memory.

    Attributes:
        number: The rank, as frames say it.
        view: The bytes.
        ready: How many of them are there, from the beginning.
    """

    def __init__(self, number: int, view: memoryview, ready: int = 0) -> None:
        self.number, self.view, self.ready = number, view, ready

    @property
    def left(self) -> int:
        """How many bytes have not come."""
        return len(self.view) - self.ready

    def room(self) -> memoryview:
        """Where the next bytes go."""
        return self.view[self.ready :]

    def advance(self, count: int) -> None:
        """Say that so many have come."""
        self.ready += count


class Ring:
    """Bytes of one rank on their way into a reduction, in memory of some whole chunks.

    Attributes:
        ready: How many have come since the beginning.
        folded: How many of them have been used; their room is free again.
    """

    def __init__(self, memory: memoryview, address: int, total: int) -> None:
        self._memory, self.address, self._total = memory, address, total
        self.ready = self.folded = 0

    @property
    def left(self) -> int:
        """How many bytes have not come."""
        return self._total - self.ready

    def room(self) -> memoryview:
        """Where the next bytes go; empty while all the room holds what is not folded."""
        size = len(self._memory)
        begin = self.ready % size
        free = size - (self.ready - self.folded)
        return self._memory[begin : min(begin + free, size)]

    def advance(self, count: int) -> None:
        """Say that so many have come."""
        self.ready += count

    def chunk_address(self) -> int:
        """Where the first byte that is not folded stands; a chunk is never divided."""
        return self.address + self.folded % len(self._memory)


class Outflow:
    """Blocks that leave through one connection, each as far as it is ready.

    Args:
        link: The connection.
        call: What the frames belong to.
        kind: SEND or RESULT.
        sequence: Of the collective.
        blocks: In the order in which they leave if all are ready.
    """

    def __init__(
        self, link: Link, call: Call, kind: int, sequence: int, blocks: Sequence[Block]
    ) -> None:
        self._link, self._call, self._kind, self._sequence = link, call, kind, sequence
        self._blocks = [(block, 0) for block in blocks]
        self._buffers: list[memoryview] = []
        self.may_end = kind != RESULT
        # A SEND has at least one frame, which says what is called; a RESULT ends with an empty one.
        self._owes_frame = kind == RESULT or not any(len(block.view) for block in blocks)
        self.is_done = False

    def has_work(self) -> bool:
        """Whether something could be sent now."""
        return bool(self._buffers) or (not self.is_done and self._begin_frame())

    def push(self) -> int:
        """Send what there is room for; return how many bytes that was."""
        if not self.has_work():
            return 0
        count = sent = self._link.send_on(self._buffers, socket.MSG_DONTWAIT)
        while count:
            first = self._buffers[0]
            if count < len(first):
                self._buffers[0] = first[count:]
                break
            count -= len(first)
            del self._buffers[0]
        if not self._buffers:
            # It is the user's memory.
            self._link.begin(())
            self.is_done = not self._blocks and not self._owes_frame
        return sent

    def _begin_frame(self) -> bool:
        for index, (block, sent) in enumerate(self._blocks):
            count = min(block.ready - sent, FRAME_BYTES)
            if not count or (count < CHUNK_BYTES and block.left):
                continue
            self._blocks[index] = block, sent + count
            self._frame(count, block.number, block.view[sent : sent + count])
            if sent + count == len(block.view):
                del self._blocks[index]
            return True
        self._blocks = [each for each in self._blocks if len(each[0].view)]
        if self._owes_frame and not self._blocks and self.may_end:
            self._owes_frame = False
            self._frame(0, END if self._kind == RESULT else 0)
            return True
        return False

    def _frame(self, count: int, block: int, *payload: memoryview) -> None:
        head = self._call.head(self._kind, self._sequence, count, block)
        self._buffers = [memoryview(head), *payload]
        self._link.begin(tuple(self._buffers))


class Inflow:
    """Blocks that arrive through one connection.

    Args:
        link: The connection.
        call: What the frames have to belong to.
        kind: SEND or RESULT.
        sequence: Of the collective.
        blocks: Where the bytes go, by the number in the frame.

    Attributes:
        has_called: Whether the peer's first frame has come, and agrees.
        is_done: Whether all has come.
    """

    def __init__(
        self,
        link: Link,
        call: Call,
        kind: int,
        sequence: int,
        blocks: Mapping[int, Block | Ring],
    ) -> None:
        self.link, self._kind, self._blocks = link, kind, blocks
        self._expected = call.head(kind, sequence, 0)[4:-4]
        self._block: Block | Ring | None = None
        self.has_called = False
        self.is_done = False

    def has_room(self) -> bool:
        """Whether what comes now could be taken."""
        if self._block is None or not self.link.unread:
            return not self.is_done
        return len(self._block.room()) > 0

    def pull(self, flags: int = socket.MSG_DONTWAIT) -> int:
        """Take what has come; return how many bytes that was, with heads and heartbeats.

        Raises:
            Different: The peer has called something else.
            Spoke: The peer has said its last word.
            BadFrame: It sent what cannot come here.
            Ended: The connection is of no use any more.
        """
        link = self.link
        if self.is_done:
            return 0
        count = 0 if link.unread else self._head(flags)
        if link.unread:
            assert self._block is not None
            room = self._block.room()[: link.unread]
            taken = link.take(room, flags) if room else 0
            self._block.advance(taken)
            link.unread -= taken
            count += taken
        if self.has_called and not link.unread and self._kind != RESULT:
            self.is_done = not any(block.left for block in self._blocks.values())
        return count

    def _head(self, flags: int) -> int:
        """Read more of the head of the next frame; return how many bytes came, without probes."""
        buffer = self.link.buffer
        taken = self.link.take(buffer.frame[buffer.received : HEAD_BYTES], flags)
        buffer.received += taken
        taken -= look_for_word(self.link)
        if buffer.received < HEAD_BYTES:
            return taken
        if buffer.frame[4 : HEAD_BYTES - 4] != self._expected:
            raise Different
        head = buffer.head()
        buffer.received = 0
        self.has_called = True
        count = head.payload_bytes
        if head.block == END and self._kind == RESULT:
            if count or any(block.left for block in self._blocks.values()):
                raise BadFrame("the result ends too early")
            self.is_done = True
            return taken
        block = self._blocks.get(head.block)
        if block is None and (head.block or self._kind == RESULT):
            raise BadFrame(f"block {head.block} where {sorted(self._blocks)} may come")
        # A rank that contributes nothing says so in block 0.
        room = block.left if block is not None else 0
        if not 0 <= count <= min(room, FRAME_BYTES):
            raise BadFrame(f"{count} bytes for block {head.block}, which lacks {room}")
        self._block, self.link.unread = block, count
        return taken


def look_for_word(link: Link) -> int:
    """Read control frames that begin in the buffer; heartbeats and probes are taken out of it.

    Returns:
        How many bytes of the buffer were probes, after which a peer is as late as before.

    Raises:
        Spoke: It is the peer's last word.
        BadFrame: It is none that may come.
        Ended: It broke off.
    """
    buffer, probes = link.buffer, 0
    while buffer.received >= PREFIX_BYTES and not buffer.frame[4] & (SEND | RESULT):
        end = PREFIX_BYTES + check_prefix(buffer.frame, _CONTROL)
        tag = buffer.frame[4]
        deadline = time.monotonic() + _WORD_SECS
        while buffer.received < end:
            if time.monotonic() > deadline:
                raise Ended("it broke off in its last word")
            buffer.received += link.take(buffer.frame[buffer.received : end])
        link.has_said_last = tag in (SHUTDOWN, ABORT)
        if tag == SHUTDOWN:
            raise Spoke(None)
        if tag == ABORT:
            raise Spoke(Failure.from_body(buffer.frame[PREFIX_BYTES:end]))
        probes += end if tag == PROBE else 0
        buffer.received -= end
        buffer.frame[: buffer.received] = bytes(buffer.frame[end : end + buffer.received])
    return probes
