"""Exhaustive search through the interleavings of a protocol.

A model is a function from a state to its successor states; `explore` visits all of them. A model
is worth something only if it objects to a broken protocol, so its tests also remove each rule once,
and the search must find the harm.
"""

from collections.abc import Callable, Hashable, Iterator

State = Hashable


class Violation(AssertionError):
    """A reachable state breaks a property."""


def explore(start: State, successors: Callable[[State], Iterator[State]], is_final) -> int:
    """Visit every reachable state; a state without successors must be final."""
    seen, frontier = {start}, [start]
    while frontier:
        state = frontier.pop()
        found = False
        for after in successors(state):
            found = True
            if after not in seen:
                seen.add(after)
                frontier.append(after)
        if not found and not is_final(state):
            raise Violation(f"stuck in {state}")
    return len(seen)


def replaced(values: tuple, index: int, value: Hashable) -> tuple:
    return (*values[:index], value, *values[index + 1 :])
