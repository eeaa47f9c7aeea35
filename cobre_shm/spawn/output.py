"""Lines of the ranks passed on whole.

Each rank writes into two pipes of its own; a ``Stream`` reads one of them and hands complete
lines to a ``Sink``, the only writer of our descriptor 1 or 2. So no line of one rank is ever
torn by another's, whatever their lengths. Bytes are never decoded.

Nothing here blocks, so that the launcher stays awake when nobody reads its output: a sink is
written to only when the system says that it can take ``PIPE_BUF`` bytes, and a sink that lags
behind stops the reading of its streams, whose ranks then wait in their own writes. A terminal says
so when it can take one byte, so it is opened once more, for writes that do not wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import selectors
from collections import deque
from collections.abc import Callable
from pathlib import Path

__all__ = ["FileCopy", "Output", "Sink", "Stream", "encoded"]

_READ_BYTES = 65536
# A line longer than this is passed on in pieces: memory is bounded, whatever a rank writes.
_MAX_LINE_BYTES = 1 << 20
# Streams are paused above the first and resumed below the second.
_HIGH_BYTES = 1 << 20
_LOW_BYTES = 1 << 18
# After this, what stands unfinished on a line that is waited for is taken for a prompt.
_PROMPT_SECS = 0.1
_TAIL_LINES = 40
_TAIL_LINE_BYTES = 2000


class Sink:
    """One of our own descriptors, with what is still to be written to it.

    Args:
        descriptor: 1 or 2.
        selector: Of the launcher's loop.
        on_broken: Called once with the error when the descriptor takes no more.

    Attributes:
        streams: What comes here; the first is read first after a pause.
        is_broken: Whether it takes no more.
        is_paused: Whether it lags behind, so that nothing is read.
        is_terminal: Whether it is shown to somebody while they type.
    """

    def __init__(
        self,
        descriptor: int,
        selector: selectors.BaseSelector,
        on_broken: Callable[[OSError], None],
    ) -> None:
        self.streams: list[Stream] = []
        self.is_broken: bool = False
        self.is_paused: bool = False
        self.is_terminal: bool = os.isatty(descriptor)
        self._terminal = _open_terminal(descriptor)
        self._descriptor = descriptor if self._terminal is None else self._terminal
        self._selector = selector
        self._on_broken = on_broken
        self._pending = bytearray()
        self._is_waiting = False
        self._unfinished: Stream | None = None
        self._last: Stream | None = None
        self._last_lines = 0

    @property
    def is_flushed(self) -> bool:
        """Whether everything was written, or never will be."""
        return not self._pending

    def ends_with(self, stream: Stream, lines: int) -> bool:
        """Whether at least the last ``lines`` lines passed on all came from this stream."""
        return self._last is stream and self._last_lines >= lines

    def put(self, stream: Stream | None, data: bytes) -> None:
        """Queue output of a stream, or of the launcher itself.

        Args:
            stream: Where it comes from; None for the launcher.
            data: Complete lines, or a piece of a line, which the same stream may go on with. If
                another stream comes first, the piece becomes a line of its own.
        """
        if self.is_broken or not data:
            return
        if self._unfinished not in (None, stream):
            self._pending += b"\n"
            self._unfinished = None
        label = stream.label() if stream is not None else b""
        self._pending += _labelled(label, data, first=self._unfinished is None)
        self._unfinished = None if data.endswith(b"\n") else stream
        if stream is not self._last:
            self._last, self._last_lines = stream, 0
        self._last_lines += data.count(b"\n")
        self._wait_until_writable()
        if len(self._pending) > _HIGH_BYTES and not self.is_paused:
            self.is_paused = True
            if stream is not None:
                # It comes last when they are resumed: there may be no room for more than a dozen.
                after = self.streams.index(stream) + 1
                self.streams = self.streams[after:] + self.streams[:after]
            for each in self.streams:
                each.pause()

    def discard(self) -> None:
        """Forget what is queued and take no more."""
        self.is_broken = True
        self._pending.clear()
        self._stop_waiting()
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None
        self._resume_streams()

    def _wait_until_writable(self) -> None:
        if self._is_waiting:
            return
        self._selector.register(self._descriptor, selectors.EVENT_WRITE, self._write)
        self._is_waiting = True

    def _stop_waiting(self) -> None:
        if self._is_waiting:
            self._selector.unregister(self._descriptor)
            self._is_waiting = False

    def _resume_streams(self) -> None:
        if self.is_paused:
            self.is_paused = False
            for each in self.streams:
                each.resume()

    def _write(self) -> None:
        # As many whole lines as fit into what cannot block; pipes take that much in one piece.
        end = self._pending.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
        try:
            written = os.write(self._descriptor, self._pending[:end])
        except BlockingIOError:
            return
        except OSError as error:
            self.discard()
            self._on_broken(error)
            return
        del self._pending[:written]
        if not self._pending:
            self._stop_waiting()
        if len(self._pending) < _LOW_BYTES:
            self._resume_streams()


class Stream:
    """The read end of one pipe from a rank.

    Args:
        descriptor: The pipe; owned by the stream from now on.
        sink: Where lines go; None: they are not shown.
        selector: Of the launcher's loop.
        label: Gives what is put before every line of a block.
        copy: A file for a copy of everything, as it came.
        keeps_tail: Whether the last lines are remembered for a report.
        call_after: Of the launcher's loop, if somebody types to the rank: then the beginning of a
            line is passed on too, a moment after it came, for it may be a prompt.

    Attributes:
        label: As given.
        held: What has come since ``hold``; None: nothing is held.
        tail: The last lines, without line ends; empty if they are not kept.
    """

    def __init__(
        self,
        descriptor: int,
        sink: Sink | None,
        selector: selectors.BaseSelector,
        *,
        label: Callable[[], bytes],
        copy: FileCopy | None = None,
        keeps_tail: bool = False,
        call_after: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self.label = label
        self.held: bytearray | None = None
        self._copy = copy
        self.tail: deque[bytes] = deque(maxlen=_TAIL_LINES if keeps_tail else 0)
        self._descriptor = descriptor
        self._sink = sink
        self._selector = selector
        self._line = bytearray()
        self._call_after = call_after
        self._awaits_rest = False
        self._has_grown = False
        self._is_tail_open = False
        self._is_closed = False
        self._is_registered = False
        os.set_blocking(descriptor, False)
        if sink is not None:
            sink.streams.append(self)
        self.resume()

    @property
    def is_last(self) -> bool:
        """Whether the remembered lines are also the last that our sink passed on."""
        return self._sink is not None and self._sink.ends_with(self, len(self.tail))

    def hold(self) -> None:
        """Keep back what comes from now on, until ``take_held``."""
        self.held = bytearray()

    def take_held(self) -> bytes:
        """Return what was kept back; what comes from now on is passed on."""
        held, self.held = self.held, None
        self.resume()
        return bytes(held or b"")

    def pause(self) -> None:
        """Stop reading; the rank waits in its write once the pipe is full."""
        if self._is_registered:
            self._selector.unregister(self._descriptor)
            self._is_registered = False

    def resume(self) -> None:
        """Read again, unless the sink lags behind: then it says when."""
        is_wanted = self._sink is None or not self._sink.is_paused
        if is_wanted and not self._is_registered and not self._is_closed:
            self._selector.register(self._descriptor, selectors.EVENT_READ, self.read)
            self._is_registered = True

    def read(self) -> int:
        """Pass on what the pipe holds, up to one block, and return the number of bytes."""
        if self._is_closed:
            return 0
        if self.held is not None and len(self.held) >= _MAX_LINE_BYTES:
            self.pause()
            return 0
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self.close()
            return 0
        end = data.rfind(b"\n") + 1
        if end:
            self._pass_on(bytes(self._line) + data[:end])
            self._line.clear()
        self._line += data[end:]
        if len(self._line) >= _MAX_LINE_BYTES:
            self._pass_on(bytes(self._line))
            self._line.clear()
        self._has_grown = True
        if self._line and self._call_after is not None and not self._awaits_rest:
            self._awaits_rest = True
            self._call_after(_PROMPT_SECS, self._show_prompt)
        return len(data)

    def _show_prompt(self) -> None:
        """Pass on the beginning of a line, unless it has just become longer."""
        self._awaits_rest = self._has_grown and not self._is_closed
        if self._awaits_rest and self._call_after is not None:
            self._has_grown = False
            self._call_after(_PROMPT_SECS, self._show_prompt)
        elif self._line:
            self._pass_on(bytes(self._line))
            self._line.clear()

    def finish(self) -> None:
        """Pass on what the pipe holds now, and close it without waiting for its end.

        A process that left its rank's group may hold the other end for ever.
        """
        if not self._is_closed:
            limit = fcntl.fcntl(self._descriptor, fcntl.F_GETPIPE_SZ)
            while limit > 0 and (count := self.read()):
                limit -= count
            self.close()

    def close(self) -> None:
        """Pass on an unfinished last line as it is, and close the pipe; idempotent."""
        if self._is_closed:
            return
        self.pause()
        self._is_closed = True
        os.close(self._descriptor)
        if self._line:
            self._pass_on(bytes(self._line))
            self._line.clear()
        if self._copy is not None:
            self._copy.close()

    def _pass_on(self, data: bytes) -> None:
        if self._copy is not None:
            self._copy.write(data)
        if self.held is not None:
            self.held += data
            return
        if self.tail.maxlen:
            lines = data.removesuffix(b"\n").split(b"\n")
            if self._is_tail_open:
                lines[0] = self.tail.pop() + lines[0]
            self._is_tail_open = not data.endswith(b"\n")
            self.tail.extend(line[:_TAIL_LINE_BYTES] for line in lines[-self.tail.maxlen :])
        if self._sink is not None:
            self._sink.put(self, data)


def encoded(text: str) -> bytes:
    """Return text of our own as bytes, whatever the locale; file names in it as they are."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


class FileCopy:
    """A file that output is written to as it came.

    Args:
        path: Of the file.
        appends: Whether what it holds already stays.
        on_broken: Called once with the error when it takes no more.
    """

    def __init__(self, path: Path, appends: bool, on_broken: Callable[[OSError], None]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if appends else os.O_TRUNC)
        self._descriptor = os.open(path, flags, 0o666)
        self._on_broken = on_broken
        self._is_broken = False

    def write(self, data: bytes) -> None:
        """Write all of it, unless the file is broken."""
        view = memoryview(data)
        while view and not self._is_broken:
            try:
                view = view[os.write(self._descriptor, view) :]
            except OSError as error:
                self._is_broken = True
                self._on_broken(error)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class Output:
    """Our standard output and error, and the streams of all ranks.

    Args:
        selector: Of the launcher's loop.
        on_broken: Called once with the error when one of the two takes no more.
    """

    def __init__(
        self, selector: selectors.BaseSelector, on_broken: Callable[[OSError], None]
    ) -> None:
        self._selector = selector
        self._streams: list[Stream] = []
        self.stdout: Sink = Sink(1, selector, on_broken)
        # One queue where both are one file: with two, a line of one could tear one of the other.
        self.stderr: Sink = self.stdout if _are_same(1, 2) else Sink(2, selector, on_broken)

    @property
    def is_flushed(self) -> bool:
        """Whether everything was written, or never will be."""
        return self.stdout.is_flushed and self.stderr.is_flushed

    def add(
        self,
        descriptor: int,
        sink: Sink | None,
        *,
        label: Callable[[], bytes] = bytes,
        copy: FileCopy | None = None,
        keeps_tail: bool = False,
        call_after: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> Stream:
        """Pass on what comes out of a pipe, which is closed at the end."""
        stream = Stream(
            descriptor,
            sink,
            self._selector,
            label=label,
            copy=copy,
            keeps_tail=keeps_tail,
            call_after=call_after,
        )
        self._streams.append(stream)
        return stream

    def finish(self) -> None:
        """Read what the pipes hold and close them: no rank is left that could write."""
        for stream in self._streams:
            stream.finish()

    def discard(self) -> None:
        """Close everything and forget what is not written yet."""
        self.stdout.discard()
        self.stderr.discard()
        for stream in self._streams:
            stream.close()


def _labelled(label: bytes, data: bytes, *, first: bool) -> bytes:
    if not label:
        return data
    body = data.removesuffix(b"\n")
    rest = data[len(body) :]
    return (label if first else b"") + body.replace(b"\n", b"\n" + label) + rest


def _open_terminal(descriptor: int) -> int | None:
    """Return a descriptor of our own of the same terminal, or None where that is none or refused.

    Of our own, because whoever else writes to the terminal shares the flags of the one we have.
    """
    with contextlib.suppress(OSError):
        if os.isatty(descriptor):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{descriptor}", flags)
    return None


def _are_same(first: int, second: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.sameopenfile(first, second)
    return False
