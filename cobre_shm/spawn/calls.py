"""Calling a function on every rank of a group of workers, from a program or a notebook."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from cobre_shm.layout import MAX_RANKS
from cobre_shm.spawn.errors import InvalidArguments, ProgramNotRunnable
from cobre_shm.spawn.frames import Channel
from cobre_shm.spawn.meeting import ShmMeeting
from cobre_shm.spawn.workers import WorkerGroup

__all__ = ["carry_out", "check_size", "run"]

_Result = TypeVar("_Result")
_INSTALL = 'pip install "cobre-shm[notebook]"'


def run(
    function: Callable[..., _Result],
    nprocs: int,
    args: Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> list[_Result]:
    """Call ``function(*args, **kwargs)`` on each of ``nprocs`` fresh processes of this machine.

    Each of them is a rank, as under ``python -m cobre_shm.spawn``: ``create_communicator()``
    joins the group over shared memory, and ``RANK`` and ``WORLD_SIZE`` are set. The main module
    of this program is not imported there, so no ``if __name__ == "__main__"`` is needed, and it
    works in a notebook, a REPL, a test and a thread. A function that is defined in the main
    module, or inside another one, is sent by value, for which the package cloudpickle is
    needed (extra ``notebook``); one of an importable module is imported there.

    Args:
        function: What every rank calls.
        nprocs: Number of ranks, 1 to 1024.
        args: Its arguments, equal on all ranks; must be picklable.
        kwargs: The same by name.

    Returns:
        What it returned, by rank; must be picklable.

    Raises:
        WorkerError: A rank raised, or ended otherwise; the others were ended, nothing is left.
        InvalidArguments: ``nprocs`` is out of range, or ``function`` cannot be called. This and
            the next are in ``cobre_shm.spawn.errors``.
        ProgramNotRunnable: The function or its arguments cannot be sent, or the system refuses
            another process.
        AllocationFailed: There is not enough memory for the group.

    >>> from cobre_shm import spawn
    >>> import math
    >>> spawn.run(math.hypot, nprocs=2, args=(3.0, 4.0))
    [5.0, 5.0]
    """
    size = check_size(nprocs, "nprocs")
    if not callable(function):
        raise InvalidArguments(f"function must be something to call, not {function!r}")
    task = _pack(function, (function, tuple(args), dict(kwargs or {})))
    with ShmMeeting.unnamed(size) as meeting:
        results = WorkerGroup(f"{__name__}:carry_out", task, size, meeting).run()
    return [pickle.loads(result) for result in results]


def check_size(value: object, name: str) -> int:
    """Return a number of workers as an int.

    Raises:
        InvalidArguments: It is not one, or out of range.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, type):
        size = 0
    else:
        size = value.__index__()
    if not 1 <= size <= MAX_RANKS:
        raise InvalidArguments(f"{name}={value!r}: expected an integer in 1..{MAX_RANKS}")
    return size


def carry_out(_channel: Channel, task: bytes) -> bytes:
    """In a worker: call what was sent, and return what it returned as bytes."""
    program, task = task.split(b"\0", 1)
    sys.argv[:] = program.decode("utf-8", "surrogateescape").split("\x1f")
    function, args, kwargs = pickle.loads(task)
    return _dumps(function(*args, **kwargs))


def _pack(function: Callable[..., Any], call: object) -> bytes:
    try:
        data = _dumps(call)
        needs_value = _cloudpickle() is None and _is_of_main(function)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        hint = None if _cloudpickle() is not None else _INSTALL
        raise ProgramNotRunnable(
            f"{function!r} or its arguments cannot be sent to the workers: {error}",
            suggestion=hint,
        ) from error
    if needs_value:
        raise ProgramNotRunnable(
            f"{function!r} is defined in the main program, which workers do not import",
            suggestion=f"Define it in a module, or: {_INSTALL}",
        )
    # What a program finds in sys.argv is part of what it would see if started directly.
    program = "\x1f".join(sys.argv).encode("utf-8", "surrogateescape").replace(b"\0", b"")
    return program + b"\0" + data


def _is_of_main(function: Callable[..., Any]) -> bool:
    return getattr(function, "__module__", None) == "__main__"


def _dumps(value: object) -> bytes:
    by_value = _cloudpickle()
    data: bytes = pickle.dumps(value) if by_value is None else by_value.dumps(value)
    return data


def _cloudpickle() -> Any:
    try:
        import cloudpickle
    except ImportError:
        return None
    return cloudpickle
