"""The launcher: ``python -m cobre_shm.spawn -n N program`` starts N ranks and looks after them.

    __main__      the entry, and ^C before anything else is there
    command       what was asked for, errors as text or JSON, exit code
    flags         what can stand on the command line
    values        what stands behind a flag
    options       the command line, turned into a job
    job           what to launch, and how
    program       what a rank runs, checked before anything starts
    environment   what a rank finds in its environment
    binding       on which CPUs it runs
    errors        what keeps ranks from being started
    dry_run       what would be started, for --dry-run
    doctor        whether ranks can be run here, for --doctor

    launcher      from a job to its exit code
    attempts      a job's runs: meeting, guard, group
    meeting       how the ranks find each other: in a segment of shared memory
    tcp           the same over tcp, also on several machines
    network       which part of a run over several machines is started here
    group         the ranks of one run: watch, stop, exit code
    starting      two ways in which ranks come into being
    forking       the zygote as the launcher sees it
    boot, zygote  the process that imports what ranks need and is forked into them
    direct        runs a program in a forked rank as if started directly
    title         has ps show the program, and not the zygote
    ladder        the steps by which a group is brought to its end
    loop          the one place to wait
    parent        processes that do not outlive their parent
    rank          one process: signal, how it ended, reap
    signals       signals as events of the loop
    terminal      typed input passed on to rank 0
    descriptors   as many as the ranks need
    monitor       a live table of the ranks, for --monitor
    guard         the process that cleans up if the launcher itself is killed

    output        lines of the ranks passed on whole
    rank_output   shown or not, labelled, copied to files
    report        which rank decides the exit code, and how that is told
    table         how each rank is, or ended
    stacks        Python stacks of all ranks, for --timeout
    memory        whether the kernel killed a rank for want of memory
    events        one JSON object a line, for tools

``run(function, nprocs)`` does the same for one function, from within a program or a notebook:

    calls         run(), and what a worker does for it
    workers       the group of them: start, watch, stop; inside anybody's process and thread
    cancellation  the request to end them, from another thread
    worker        what a worker process runs
    frames        messages between the two
    remote        exceptions as messages

Nothing here imports numpy or numba, except the zygote at run time: the launcher must be up long
before the ranks are.
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
