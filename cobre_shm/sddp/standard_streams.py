"""Standard output and error of the command line, whose end does not end the work.

What is printed is for whoever looks on. A pipe that nobody reads any more, a full disk or a
terminal without a letter must not cost the result of a training.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import TextIO

from cobre_shm.command_line import BROKEN_PIPE

_LOST_OUTPUT = 1


class LenientStream(io.TextIOBase):
    """Passes text on to a stream until that takes no more, and is quiet from then on.

    Attributes:
        failure: Why the stream took no more, or None.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Take a stream; None, as of a process without the descriptor, takes nothing."""
        self._stream = stream
        self.failure: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            # Names may have letters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Tell whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write what the stream takes; return the length of the text."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush what the stream takes."""
        self._try(lambda stream: stream.flush())

    def close(self) -> None:
        """Let go of the stream, which stays open: it is not ours."""
        self._stream = None
        super().close()

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None or self.failure is not None:
            return
        try:
            action(self._stream)
        except OSError as error:
            self.failure = error
            # Python flushes at its end what could not be written, and would complain again.
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def with_lenient_streams(action: Callable[[], int]) -> int:
    """Run a command that prints; return its exit code.

    Args:
        action: Prints, and returns its exit code.

    Returns:
        That code. Where it is 0 but standard output was lost: 141 if nobody reads it, else 1,
        with a line on standard error.
    """
    output, errors = LenientStream(sys.stdout), LenientStream(sys.stderr)
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            code = action()
        except SystemExit as error:
            # Of argparse: --help, which prints too.
            if not isinstance(error.code, int | None):
                raise
            code = error.code or 0
        output.flush()
        failure = output.failure
        if failure is None:
            return code
        if isinstance(failure, BrokenPipeError):
            return code or BROKEN_PIPE
        reason = failure.strerror or failure
        print(f"cobre_shm.sddp: error: cannot write to standard output: {reason}", file=sys.stderr)
        return code or _LOST_OUTPUT
