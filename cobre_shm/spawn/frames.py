"""Messages between a process and a worker that it started, over one socket pair for each worker.

    to the worker       TASK, once and first     what to do
                        STOP                     end at the next good moment
    from the worker     EVENT, any number        progress
                        RESULT or ERROR, once    and nothing after it

A frame is one byte of kind, eight bytes of length (little-endian) and the payload. Each direction
has one writer and one reader, and a killed worker holds no lock: what it had begun to write ends in
the end of the stream, never in a wait.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterator

__all__ = ["Channel", "Frame", "FrameReader", "encode_frame"]

_HEADER = struct.Struct("<BQ")
_CHUNK_BYTES = 1 << 16


class Frame(enum.IntEnum):
    """What a message is."""

    TASK = 1
    STOP = 2
    EVENT = 3
    RESULT = 4
    ERROR = 5


def encode_frame(kind: Frame, payload: bytes = b"") -> bytes:
    """Return the bytes of a message."""
    return _HEADER.pack(kind, len(payload)) + payload


class FrameReader:
    """Puts messages together from the pieces in which they arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Frame, bytes]]:
        """Take bytes; yield the messages that they complete.

        Raises:
            ValueError: The bytes are no message.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield Frame(kind), payload


class Channel:
    """A worker's end.

    Args:
        descriptor: The inherited socket; the channel owns it from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._reader = FrameReader()
        self._is_stopping = False

    def receive_task(self) -> bytes:
        """Wait for the task, and return it.

        Raises:
            EOFError: The starting process is gone.
        """
        while True:
            data = self._socket.recv(_CHUNK_BYTES)
            if not data:
                raise EOFError("the starting process closed the connection")
            task = None
            for kind, payload in self._reader.feed(data):
                if kind is Frame.TASK:
                    task = payload
                # What comes in one piece with the task: nothing else will bring it up.
                self._is_stopping |= kind is Frame.STOP
            if task is not None:
                return task

    def send_event(self, payload: bytes) -> None:
        """Tell the starting process of progress. Waits while it is behind in reading."""
        self.send(Frame.EVENT, payload)

    def send(self, kind: Frame, payload: bytes) -> None:
        """Send a message."""
        self._socket.sendall(encode_frame(kind, payload))

    def is_stopping(self) -> bool:
        """Whether the starting process has asked for the end; costs one system call."""
        if not self._is_stopping:
            try:
                data = self._socket.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            # The end of the stream is an end as well.
            self._is_stopping = not data or any(
                kind is Frame.STOP for kind, _ in self._reader.feed(data)
            )
        return self._is_stopping

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
