"""One selector with deadlines: the launcher's only place to wait."""

from __future__ import annotations

import errno
import os
import selectors
import time
from collections.abc import Callable

__all__ = ["Loop", "Timer"]


class Timer:
    """Something to be done at a time; ``cancel`` and it is not.

    Attributes:
        deadline: Of the monotonic clock, in seconds.
    """

    def __init__(self, deadline: float, action: Callable[[], None]) -> None:
        self.deadline = deadline
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Let nothing happen; idempotent."""
        self.action = None


class Loop:
    """Calls whoever waits for a descriptor, a process's end, or a time.

    Attributes:
        selector: For those who register descriptors by themselves; the data of each is called.
        is_pidfd_refused: Whether the system has refused to tell of a process's end.
    """

    def __init__(self) -> None:
        self.is_pidfd_refused: bool = False
        # Not epoll: it goes on to tell of a closed descriptor, under a number that may have come to
        # mean another, where the kernel refused to take it out or a forked process still has it.
        self.selector: selectors.PollSelector = selectors.PollSelector()
        self._timers: list[Timer] = []
        self._pidfds: set[int] = set()

    def turn_until(self, is_done: Callable[[], bool]) -> None:
        """Wait and call until ``is_done``, and not once more: the rest is for who waits next."""
        while not is_done():
            waiting = self.selector.get_map()
            for key, _ in self.selector.select(self._timeout()):
                # Whoever was called before may have closed this one, or the number is another's.
                if waiting.get(key.fd) is key:
                    key.data()
                if is_done():
                    return
            self._call_timers()

    def call_after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Have ``action`` called once, ``seconds`` from now."""
        timer = Timer(time.monotonic() + seconds, action)
        self._timers.append(timer)
        return timer

    def call_at_end_of(self, pid: int, action: Callable[[], None]) -> bool:
        """Have ``action`` called when the process ends; False if the kernel refuses."""
        try:
            descriptor = os.pidfd_open(pid)
        except OSError as error:
            self.is_pidfd_refused = error.errno in (errno.ENOSYS, errno.EPERM)
            return False

        def on_event() -> None:
            self._forget(descriptor)
            action()

        self.selector.register(descriptor, selectors.EVENT_READ, on_event)
        self._pidfds.add(descriptor)
        return True

    def close(self) -> None:
        """Forget everything; descriptors of others stay open."""
        for pidfd in list(self._pidfds):
            self._forget(pidfd)
        self.selector.close()

    def _forget(self, pidfd: int) -> None:
        self.selector.unregister(pidfd)
        self._pidfds.remove(pidfd)
        os.close(pidfd)

    def _timeout(self) -> float | None:
        self._timers = [timer for timer in self._timers if timer.action is not None]
        if not self._timers:
            return None
        return max(0.0, min(timer.deadline for timer in self._timers) - time.monotonic())

    def _call_timers(self) -> None:
        now = time.monotonic()
        for timer in [timer for timer in self._timers if timer.deadline <= now]:
            action = timer.action
            timer.cancel()
            if action is not None:
                action()
