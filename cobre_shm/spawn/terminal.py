"""Typed input passed on to rank 0.

A rank runs in a process group of its own and so in the background of the terminal: if it read
there, the kernel would stop it. The launcher stands in the foreground, so it reads and passes on
what was typed. It does so only while it is in the foreground itself.
"""

from __future__ import annotations

import contextlib
import os
import selectors

__all__ = ["TerminalInput", "is_controlled_by_terminal"]

_TERMINAL = 0
_BLOCK_BYTES = 4096


def is_controlled_by_terminal() -> bool:
    """Whether standard input is the terminal whose foreground and background jobs we are among."""
    with contextlib.suppress(OSError):
        return os.tcgetpgrp(_TERMINAL) > 0
    return False


class TerminalInput:
    """Copies our terminal to a pipe, holding one block at most.

    Args:
        pipe: Write end of rank 0's standard input; owned from now on.
        selector: Of the launcher's loop.
    """

    def __init__(self, pipe: int, selector: selectors.BaseSelector) -> None:
        self._pipe = pipe
        self._selector = selector
        self._pending = b""
        self._is_closed = False
        os.set_blocking(pipe, False)
        self.resume()

    def resume(self) -> None:
        """Read again, after the terminal was or may have been another job's."""
        if not self._is_closed and not self._pending:
            self._ignore(_TERMINAL)
            self._selector.register(_TERMINAL, selectors.EVENT_READ, self._read)

    def close(self) -> None:
        """Stop reading and end rank 0's input; idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._ignore(_TERMINAL)
            self._ignore(self._pipe)
            os.close(self._pipe)

    def _read(self) -> None:
        try:
            if os.tcgetpgrp(_TERMINAL) != os.getpgrp():
                self._ignore(_TERMINAL)
                return
            self._pending = os.read(_TERMINAL, _BLOCK_BYTES)
        except OSError:
            # The terminal is gone.
            self._pending = b""
        if not self._pending:
            self.close()
            return
        self._ignore(_TERMINAL)
        self._selector.register(self._pipe, selectors.EVENT_WRITE, self._write)

    def _write(self) -> None:
        try:
            written = os.write(self._pipe, self._pending)
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.close()
            return
        self._pending = self._pending[written:]
        if not self._pending:
            self._ignore(self._pipe)
            self.resume()

    def _ignore(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)
