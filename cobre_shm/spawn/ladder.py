"""The steps by which a group is brought to its end, each harder than the one before."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cobre_shm.spawn.loop import Loop, Timer

__all__ = [
    "CULPRIT_SECS",
    "MOMENT",
    "Ladder",
    "Step",
    "ending_steps",
    "failing_steps",
    "interrupting_steps",
]

# Time for the other ranks to fail by themselves: they then say where they were.
MOMENT = 0.25
# Time for the culprit to end by itself, if others who noticed were faster: its code decides.
CULPRIT_SECS = 2.0


@dataclass(frozen=True)
class Step:
    """After so many seconds, a signal to the group; None interrupts who cannot hear one."""

    delay: float
    signal: int | None


def failing_steps(grace: float, delay: float = MOMENT) -> list[Step]:
    """After a failure: a moment, SIGTERM, the grace time, SIGKILL."""
    return [Step(delay, signal.SIGTERM), Step(grace, signal.SIGKILL)]


def interrupting_steps(grace: float) -> list[Step]:
    """For ^C: SIGINT, then the poison if jitted code may hear no signal, SIGTERM, SIGKILL.

    Others have the grace time for what they want to save, as after SIGTERM.
    """
    return [Step(0, signal.SIGINT), Step(MOMENT, None), *failing_steps(grace, grace)]


def ending_steps(number: int, grace: float) -> list[Step]:
    """For another ending signal: itself, then SIGKILL.

    Not poisoned before the grace time is over: a program may want to save its state on SIGTERM,
    and needs its communicator for that.
    """
    return [Step(0, number), Step(grace, signal.SIGKILL)]


class Ladder:
    """Takes one step after the other, each when its time has come or on demand.

    Args:
        loop: That waits.
        act: Called with each step.
    """

    def __init__(self, loop: Loop, act: Callable[[Step], None]) -> None:
        self._loop = loop
        self._act = act
        self._steps: deque[Step] = deque()
        self._timer: Timer | None = None

    @property
    def is_used_up(self) -> bool:
        """Whether no step is left, or none was begun."""
        return not self._steps

    def begin(self, steps: Iterable[Step]) -> None:
        """Begin with these, unless others have been begun and are not used up."""
        if self.is_used_up:
            self._steps.extend(steps)
            self._wait()

    def insert(self, step: Step) -> None:
        """Put a step before those that are left; called while one is taken."""
        self._steps.appendleft(step)

    def advance(self) -> None:
        """Take the next step that is a signal now."""
        while self._steps and self._steps[0].signal is None:
            self._steps.popleft()
        self._take()

    def clear(self) -> None:
        """Take no step more."""
        self._steps.clear()
        self._wait()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._steps:
            self._timer = self._loop.call_after(self._steps[0].delay, self._take)

    def _take(self) -> None:
        if self._steps:
            self._act(self._steps.popleft())
        self._wait()
