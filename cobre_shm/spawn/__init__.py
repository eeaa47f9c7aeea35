"""The launcher: ``python -m cobre_shm.spawn -n N program`` starts N ranks and looks after them.

    __main__      arguments, and errors as text or JSON
    program       what a rank runs, checked before anything starts
    environment   what a rank finds in its environment
    launcher      the group: start, watch, stop, exit code
    report        which rank decides the exit code, and how that is told
    tcp           what the ranks inherit to meet over tcp, also on several machines
    rank          one process: start, signal, how it ended, reap
    signals       signals as events of the launcher's loop
    output        lines of the ranks passed on whole
    terminal      typed input passed on to rank 0
    guard         the process that cleans up if the launcher itself is killed

``run(function, nprocs)`` does the same for one function, from within a program or a notebook:

    calls         run(), and what a worker does for it
    workers       the group of them: start, watch, stop; inside anybody's process and thread
    meeting       how they find each other
    worker        what a worker process runs
    frames        messages between the two
    remote        exceptions as messages

Nothing here imports numpy or numba: the launcher must be up long before the ranks are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cobre_shm.spawn.calls import run as run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    # The command line does not need it.
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cobre_shm.spawn.calls import run

    globals()[name] = run
    return run
