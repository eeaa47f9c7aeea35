"""One rank's part in a group over MPI: joining, who is inside, failing, leaving."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np

from cobre_net.mpi import ending
from cobre_net.mpi.failure import failed, of_node
from cobre_net.mpi.fast import new_words
from cobre_net.mpi.flat import Flat
from cobre_net.mpi.grouping import Grouping
from cobre_net.mpi.library import MPI, check_started, duplicate
from cobre_net.mpi.region import Windows, new_windows
from cobre_shm.communicator import exit_status
from cobre_shm.errors import (
    CobreError,
    CollectiveFailed,
    InitializationFailed,
    InvalidCommunicator,
)
from cobre_shm.fastcall import ContextFirst
from cobre_shm.kernels import context, mpi_words
from cobre_shm.member import Member
from cobre_shm.selection.kinds import MpiConfig

__all__ = ["Membership"]

logger = logging.getLogger("cobre_shm")

_Result = TypeVar("_Result")
# What must be the same on all ranks, and the variable that says it.
_EQUAL_SETTINGS = {
    "hierarchical": "COBRE_MPI_HIERARCHICAL",
    "check": "COBRE_MPI_CHECK",
    "deterministic": "",
}
_SETTING_VALUES = ("false", "true", "auto")


class Membership(ContextFirst, Member):
    """A communicator as far as it belongs to a group, without any operation.

    Args:
        config: As of :class:`MpiCommunicator`.
    """

    backend = "mpi"

    def __init__(self, config: MpiConfig) -> None:
        # Shared with the fast road, where there is one: who is inside, and whether it is closed.
        self._words = new_words()
        # Held by the thread that is inside, unless it is on the fast road.
        self._lock = threading.Lock()
        self._asks_at_exit = False
        self._windows: Windows | None = None
        self._config = config
        self._pid = os.getpid()
        is_refused_by_all = False
        try:
            check_started(os.environ)
            self._comm = duplicate(config.comm)
            # Nothing but the question of ending.py goes over it.
            self._ending = duplicate(config.comm)
            self._flat = Flat(self._comm, deterministic=config.deterministic)
            self.rank, self.size = self._flat.rank, self._flat.size
            try:
                self._check_settings()
                self._grouping = Grouping(self._flat, config)
            except InitializationFailed:
                # A program may go on without it.
                is_refused_by_all = True
                self._comm.Free()
                self._ending.Free()
                raise
            if self.size > 1:
                self._windows = new_windows(self._comm, self)
        except BaseException as error:
            if not is_refused_by_all and ending.has_peers():
                # They may wait for this rank in here.
                ending.watch()
            if isinstance(error, MPI.Exception):
                raise failed(error, MPI.COMM_WORLD.Get_rank()) from error
            raise
        self.is_leader = self._grouping.is_leader
        self.levels = self._grouping.levels
        self._engine = self._grouping.engine
        self._group = self._grouping.whole
        logger.info("mpi: rank %d of %d, %s", self.rank, self.size, self.levels)
        if self.size > 1:
            ending.watch()
        self._enlist()

    def abort(self, code: int = 1) -> NoReturn:
        """End the whole job with ``code``, as MPI_Abort does; it does not return.

        Raises:
            SystemExit: With ``code``, where MPI has been finalised, or in a forked child.
        """
        status = exit_status(code)
        if os.getpid() == self._pid and not MPI.Is_finalized():
            self._grouping.abort(status)
            ending.abort(status)
        raise SystemExit(status)

    def close(self) -> None:
        """See :meth:`Communicator.close`. Windows go later, see ``region.py``."""
        if not self._is_over() and not self._try_inside(self._close):
            raise InvalidCommunicator("Another thread is inside a collective: close() must wait")

    def _close(self) -> None:
        if self._is_over():
            return
        try:
            self._grouping.close()
        except InvalidCommunicator:
            # A thread is inside the group of the node. Nothing was begun.
            self._words[mpi_words.METHOD] = 0
            raise
        self._words[mpi_words.CLOSED] = 1
        self._retire()
        if not MPI.Is_finalized():
            # MPI expects this to be local, although all ranks must do it at some time.
            self._grouping.free()
            self._comm.Free()
            if not self._asks_at_exit:
                self._ending.Free()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; a process that ends after leaving by an exception ends the job."""
        if error is not None and not self._is_over():
            if not isinstance(error, SystemExit):
                self._grouping.tell_peers(error)
            if self.size > 1 and ending.exit_code(error) != 0 and not self._asks_at_exit:
                self._asks_at_exit = True
                ending.left_by_exception(self._ending, error)
        try:
            self.close()
        except InvalidCommunicator:
            if error is None:
                raise
            # A thread of this rank is inside still, and shall be the last. What ends the block
            # tells more than that.
            self._lose(self._interrupted())

    def _fail_for(self, text: str) -> None:
        """MPI has no word for it: see ``ending.py``."""

    def _disown(self) -> None:
        self._words[mpi_words.CLOSED] = 1

    def _lose(self, reason: CollectiveFailed) -> None:
        """Be of no use from now on, unless it was of none before."""
        self._words[mpi_words.CLOSED] = 1
        if self._unusable is None:
            self._unusable = copy.copy(reason)

    def _fail(self, error: Any) -> NoReturn:
        if isinstance(error, CollectiveFailed):
            node = self._grouping.node
            reason = of_node(error, self.rank - node.Get_rank(), node.Get_size())
        else:
            reason = failed(error, self.rank)
        self._lose(reason)
        raise reason from error

    def _inside(self, collective: Callable[[], _Result], *alike: type[CobreError]) -> _Result:
        """Do a collective as the one thread that is inside the communicator.

        An exception that leaves it loses the group, unless it is one of ``alike``, which all ranks
        raise and which leave nothing unfinished: of several functions of MPI some may have been
        called, and peers wait in the next.
        """
        found: list[_Result] = []

        def run() -> None:
            # Another thread may have lost or closed it since.
            self._check_usable()
            try:
                found.append(collective())
            except alike:
                self._words[mpi_words.METHOD] = 0
                raise
            except MPI.Exception as error:
                self._fail(error)
            except CollectiveFailed as error:
                if self._unusable is None:
                    self._fail(error)
                raise
            except BaseException:
                self._lose(self._interrupted())
                raise

        if not self._try_inside(run):
            raise self._taken()
        return found[0]

    def _try_inside(self, do: Callable[[], None]) -> bool:
        """Call ``do`` unless a thread is inside: another one, or this one below a signal handler.

        A handler may raise anywhere, and again before it is told that the group is lost. So the
        lock is taken by a ``with`` statement, which waits where another thread was faster by a
        hair, and METHOD stays where ``do`` was left by an exception: who comes next loses the
        group.
        """
        if self._lock.locked():
            return False
        words = self._words
        with self._lock:
            if words[mpi_words.ERROR]:
                self._lose(failed(MPI.Exception(int(words[mpi_words.ERROR])), self.rank))
            if words[mpi_words.METHOD]:
                self._lose(self._interrupted())
            words[mpi_words.METHOD] = 1
            is_free = not words[context.BUSY]
            if is_free:
                do()
            words[mpi_words.METHOD] = 0
        return bool(is_free)

    def _interrupted(self) -> CollectiveFailed:
        return CollectiveFailed(
            f"A collective was interrupted on rank {self.rank} by an exception",
            context={"backend": self.backend, "rank": self.rank},
        )

    def _check_settings(self) -> None:
        """Refuse settings that differ, on all ranks: they would call different functions of MPI."""
        values = [str(getattr(self._config, name)).lower() for name in _EQUAL_SETTINGS]
        codes = [_SETTING_VALUES.index(value) for value in values]
        found = np.empty((self.size, len(codes)), np.int64)
        self._flat.gather_equal(np.array(codes, np.int64), found)
        for (name, variable), column in zip(_EQUAL_SETTINGS.items(), found.T, strict=True):
            if (column != column[0]).any():
                other = int(np.argmax(column != column[0]))
                first, theirs = (_SETTING_VALUES[column[rank]] for rank in (0, other))
                raise InitializationFailed(
                    "mpi",
                    f"MpiConfig.{name} must be the same on all ranks: it is {first} on rank 0, and "
                    f"{theirs} on rank {other}",
                    operation="configure",
                    context={"setting": name, "values": column.tolist()},
                    suggestion=f"Give {variable} to all of them; Open MPI's mpiexec passes a "
                    f"variable on to other nodes with -x {variable} only"
                    if variable
                    else None,
                )
