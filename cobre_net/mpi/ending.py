"""How a process ends, so that its peers do not wait for it for ever.

MPI has no word for "I failed" but MPI_Abort. Without it a rank that leaves by an exception waits
in MPI_Finalize for peers that wait for it in a collective. As soon as one of our communicators
exists, or has failed to come into being on this rank alone:

* an exception that nobody catches ends the job, after its traceback has been printed: code 1, or
  130 for Ctrl-C;
* a process that ends after an exception has left a ``with`` block of one of our communicators
  (and was caught further out, or was SystemExit with a code) asks at its end whether all ranks of
  that communicator did the same. If they did, as when all refuse the same input, everybody ends
  in order with its own exit code. If that is not so after two seconds, it ends the job.

The question is a barrier that nobody blocks in, on a duplicate that carries nothing else.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import stat
import sys
import termios
import time
from array import array
from types import TracebackType
from typing import Any

from cobre_net.mpi.library import MPI
from cobre_shm.communicator import exit_status
from cobre_shm.errors import CollectiveFailed
from cobre_shm.member import tell_peers

__all__ = ["abort", "has_peers", "left_by_exception", "watch"]

_AGREE_SECS = 2.0
# A rank that lost its group is not the cause. The rank that is ends the job with its own code,
# which needs up to the time above; only if nobody does, this one ends it.
_ORIGIN_SECS = 3.0
_INTERRUPTED = 130
# Longer than a launcher takes to read a pipe on a busy machine; only one that never reads lasts so.
_READ_SECS = 1.0

_left: list[tuple[Any, int]] = []
_state = {"watching": False}


def has_peers() -> bool:
    """Whether this process is one of several of an MPI job."""
    return MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1


def watch() -> None:
    """From now on an uncaught exception of this process ends the job. Idempotent."""
    if not _state["watching"]:
        _state["watching"] = True
        _chain_hook()
        atexit.register(_at_exit)


def _chain_hook() -> None:
    previous = sys.excepthook
    pid = os.getpid()

    def end_job(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        try:
            previous(kind, error, trace)
        finally:
            # A forked child is no rank.
            if os.getpid() == pid and not MPI.Is_finalized():
                # A node's ranks see its poison before they see a death.
                tell_peers(error)
                if issubclass(kind, CollectiveFailed):
                    flush()
                    time.sleep(_ORIGIN_SECS)
                abort(_INTERRUPTED if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = end_job


def left_by_exception(comm: Any, error: BaseException) -> None:
    """Remember that a ``with`` block was left by ``error``.

    Args:
        comm: mpi4py communicator of all ranks that entered such a block, free for the question.
        error: Decides the code of the job, if it comes to that.
    """
    # One question for the same ranks: a library has few communicators, and a program that goes on
    # may leave many blocks. Whose first such block was another asks alone, and ends the job.
    if MPI.Is_finalized():
        return
    if any(MPI.Comm.Compare(comm, other) == MPI.CONGRUENT for other, _ in _left):
        comm.Free()
        return
    _left.append((comm, exit_code(error)))


def exit_code(error: BaseException) -> int:
    """Return the code with which Python ends for ``error``, as mpi4py's runner sees it."""
    if isinstance(error, SystemExit):
        code = error.code
        return 0 if code is None else exit_status(code) if isinstance(code, int) else 1
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def abort(code: int) -> None:
    """End the job; what was printed is flushed, for MPI ends the process without that.

    All of it, never a duplicate's ranks: of these MPICH 5.0.2 killed some first and reported that
    instead of the code, and once in eight times left the others running.
    """
    flush()
    MPI.COMM_WORLD.Abort(code)


def flush() -> None:
    """Pass on what was printed, and see that the launcher has taken it.

    MPICH's ends the job as soon as it hears of the abort, and leaves unread what is still in the
    pipes of the ranks: the traceback that tells why.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            _wait_until_read(stream.fileno())
        except (OSError, ValueError, AttributeError):
            continue


def _wait_until_read(descriptor: int) -> None:
    deadline = time.monotonic() + _READ_SECS
    unread = array("i", [1])
    while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
        fcntl.ioctl(descriptor, termios.FIONREAD, unread)
        if not unread[0]:
            return
        time.sleep(0.001)


def _at_exit() -> None:
    if not _left or MPI.Is_finalized():
        return
    requests = [comm.Ibarrier() for comm, _ in _left]
    deadline = time.monotonic() + _AGREE_SECS
    while not MPI.Request.Testall(requests):
        if time.monotonic() > deadline:
            try:
                print(
                    "cobre_net.mpi: this rank failed and its peers did not: the job ends",
                    file=sys.stderr,
                )
            finally:
                abort(_left[0][1] or 1)
        time.sleep(0.005)
