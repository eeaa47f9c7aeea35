"""Signals as events of the launcher's loop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Self

__all__ = ["SignalInbox", "remember_interrupts", "signals_held"]

_interrupts: list[int] = []


def remember_interrupts() -> None:
    """Have a ^C from now on reach the next inbox where the exception that it raises does not.

    Python drops an exception in a weak reference's callback, and every import runs some.
    """
    _interrupts.clear()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back what would end this process, for the length of the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


class SignalInbox:
    """Turns signals into bytes that a selector can wait for.

    While open, a watched signal does nothing but put its number into a pipe: no code of ours
    ever runs in a handler, and a wait cannot miss a signal that came just before it. Signals
    that were ignored when we were started (``nohup``, a shell's background job) stay ignored,
    here and in the ranks.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = {n: signal.signal(n, _ignore) for n in self._numbers}
        os.write(self._writer, bytes(_interrupts))
        _interrupts.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """Return the descriptor that is readable when signals have come."""
        return self._reader

    def take(self) -> bytes:
        """Return the numbers of the signals that have come, in order."""
        try:
            return os.read(self._reader, 512)
        except BlockingIOError:
            return b""

    def block(self) -> set[int]:
        """Hold the watched signals back and return the mask to give to ``unblock``.

        A child shares our pipe between fork and exec, so a signal to it would look like one to
        us. It is forked with the signals held back and gives up the handlers first.
        """
        return {int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)}

    def unblock(self, mask: set[int]) -> None:
        """Let the watched signals through again."""
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def reset_in_child(self, mask: set[int]) -> None:
        """In a forked child: go back to the default actions, then let signals through."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)
        self.unblock(mask)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Take the place of the default action; the wake-up descriptor carries the number."""
