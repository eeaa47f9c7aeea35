"""The mpi backend: ties MPI, and shared memory within the nodes, to the contract."""

from __future__ import annotations

import copy
import logging
import os
import threading
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from cobre_net.mpi import ending, fast
from cobre_net.mpi.failure import failed, of_node
from cobre_net.mpi.flat import Flat
from cobre_net.mpi.grouping import Grouping
from cobre_net.mpi.library import MPI, check_started, duplicate
from cobre_net.mpi.region import MpiRegion, Windows, new_windows
from cobre_shm import layout
from cobre_shm.call_text import words_text
from cobre_shm.communicator import Array, Communicator, Counts, SharedRegion, exit_status
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.errors import (
    AllocationFailed,
    CobreError,
    CollectiveFailed,
    CollectiveMismatch,
    InitializationFailed,
    InvalidCommunicator,
)
from cobre_shm.fastcall import ContextFirst
from cobre_shm.heap import HeapRegion
from cobre_shm.kernels import context, mpi_words
from cobre_shm.member import Member
from cobre_shm.selection.kinds import MpiConfig
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_gathered,
    check_region,
    region_words,
)

__all__ = ["MpiCommunicator"]

logger = logging.getLogger("cobre_shm")

_Result = TypeVar("_Result")
# What must be the same on all ranks, and the variable that says it.
_EQUAL_SETTINGS = {
    "hierarchical": "COBRE_MPI_HIERARCHICAL",
    "check": "COBRE_MPI_CHECK",
    "deterministic": "",
}
_SETTING_VALUES = ("false", "true", "auto")
# What a group of one node does by itself from its construction on.
_DELEGATED = (
    "allgatherv",
    "allgatherv_init",
    "allreduce",
    "allreduce_init",
    "allreduce_shared",
    "barrier",
    "barrier_init",
    "broadcast",
    "broadcast_init",
    "create_shared_region",
    "empty",
    "split_local",
)


class MpiCommunicator(ContextFirst, Member):
    """Ranks that an MPI launcher started.

    Construction is collective over ``config.comm``. Where the ranks of a node can share memory
    (see :class:`MpiConfig`) they form a group of the shm backend: alone on one machine they are
    that group, and on several their leaders talk MPI.

    MPI offers no place in which to compare calls for free, so ranks that disagree are noticed
    only with ``MpiConfig(check=True)``, or where all ranks share a node. Nor does it report a
    death: the launcher ends the job then, and an exception that nobody catches ends it as well
    (see ``ending.py``). There is no time limit.

    Args:
        config: Communicator, determinism, levels.

    Raises:
        InitializationFailed: MPI is not there, not in a usable state, or not the launcher's; or
            two levels were demanded and are not possible.

    Attributes:
        levels: How the ranks talk: ``"flat: <reason>"``, ``"one node"`` or ``"N nodes"``.
    """

    backend = "mpi"

    def __init__(self, config: MpiConfig) -> None:
        self._fast: fast.Fast | None = None
        self._words = fast.new_words()
        # Held by the thread that is inside, unless it is on the fast road.
        self._lock = threading.Lock()
        self._asks_at_exit = False
        self._windows: Windows | None = None
        self._context = _closed
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
        # Only while the communicator is usable, flat, and compares nothing.
        if self._engine is self._flat and not config.check:
            self._fast = fast.make_road(MpiCommunicator, self._flat)
            if self._fast is not None:
                self._context = self._words = self._fast.state
        if self._group is not None:
            for name in _DELEGATED:
                setattr(self, name, getattr(self._group, name))
        logger.info("mpi: rank %d of %d, %s", self.rank, self.size, self.levels)
        if self.size > 1:
            ending.watch()
        self._enlist()

    def __repr__(self) -> str:
        return f"<MpiCommunicator rank {self.rank} of {self.size}>"

    def allgatherv(
        self,
        send: Array,
        recv: Array | None = None,
        counts: Counts | None = None,
        displs: Counts | None = None,
    ) -> Array:
        """See :meth:`Communicator.allgatherv`."""
        self._check_usable()
        send, recv = check_gather_buffers(self.size, send, recv, displs)
        known = None
        if counts is not None:
            known = check_allgatherv(self.rank, self.size, send, recv, counts, displs)

        def gather() -> tuple[Array, list[Exception]]:
            mistakes: list[Exception] = []
            checked = known
            if checked is None:
                found = self._gather_counts(send)
                checked, mistakes = check_gathered(self.rank, self.size, send, recv, found, displs)
            if self._config.check:
                hashed = zlib.crc32(checked.counts.tobytes())
                total = int(checked.counts.sum())
                self._compare(layout.ALLGATHERV, dtype_tag(send.dtype), total, high=hashed)
            self._engine.allgatherv(*checked)
            self._learn(checked.send.dtype)
            return checked.recv, mistakes

        result, mistakes = self._inside(gather)
        if mistakes:
            raise mistakes.pop()
        return result

    def _gather_counts(self, send: Array) -> Array:
        counts = np.empty(self.size, np.int64)
        if self._config.check:
            self._compare(layout.COUNTS, dtype_tag(send.dtype), self.size)
        self._engine.gather_equal(np.array([send.size], np.int64), counts)
        return counts

    def allreduce(
        self, send: Array, recv: Array | None = None, op: ReduceOp | str = ReduceOp.SUM
    ) -> Array:
        """See :meth:`Communicator.allreduce`."""
        self._check_usable()
        source, target, checked = check_allreduce(send, recv, op)

        def reduce() -> Array:
            if self._config.check:
                self._compare(layout.ALLREDUCE | checked << 8, dtype_tag(source.dtype), source.size)
            self._engine.allreduce(source, target, checked)
            self._learn(source.dtype, checked)
            return target

        return self._inside(reduce)

    def broadcast(self, buf: Array, root: int = 0) -> Array:
        """See :meth:`Communicator.broadcast`."""
        self._check_usable()
        array = check_broadcast(self.size, self.rank, buf, root)

        def spread() -> Array:
            if self._config.check:
                what = layout.BROADCAST | int(root) << 16
                self._compare(what, dtype_tag(array.dtype), array.size)
            self._engine.broadcast(array, int(root))
            self._learn(array.dtype)
            return array

        return self._inside(spread)

    def barrier(self) -> None:
        """See :meth:`Communicator.barrier`."""
        self._meet(layout.BARRIER)

    def _meet(self, what: int) -> None:
        """Wait for all ranks in the call with this code of ``layout``."""
        self._check_usable()

        def meet() -> None:
            if self._config.check:
                self._compare(what, 0, 0)
            self._engine.barrier()

        self._inside(meet)

    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> SharedRegion:
        """See :meth:`Communicator.create_shared_region`."""
        self._check_usable()
        extents, element = check_region(shape, dtype)

        def make() -> SharedRegion:
            if self._config.check:
                tag, count, hashed = region_words(extents, element)
                self._compare(layout.REGION, tag, count, high=hashed)
            if self._windows is None:
                return HeapRegion(extents, element)
            node = self._grouping.node
            return MpiRegion(self._comm, node, self._windows, extents, element, self._meet)

        return self._inside(make, AllocationFailed)

    def split_local(self) -> Communicator:
        """See :meth:`Communicator.split_local`."""
        self._check_usable()

        def split() -> Communicator:
            if self._config.check:
                self._compare(layout.SPLIT, 0, 0)
            return self._grouping.split()

        return self._inside(split, AllocationFailed, InitializationFailed)

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

    def _learn(self, dtype: np.dtype[Any], op: ReduceOp | None = None) -> None:
        """Such a call takes the fast road from now on."""
        if self._fast is not None:
            self._fast.learn(dtype, op)

    def _finish(self, *_: object, **__: object) -> NoReturn:
        """Go on where a function of MPI has failed on the fast road."""
        assert self._fast is not None
        self._fail(self._fast.failure())

    _finish_barrier = _finish_broadcast = _finish_allreduce = _finish_allgatherv = _finish

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

    def _compare(self, what: int, tag: int, count: int, *, high: int = 0) -> None:
        """Compare this call with those of all ranks."""
        high -= (high & 0x80000000) << 1  # the call word is signed
        calls = np.empty((self.size, 3), np.int64)
        self._flat.gather_equal(np.array([what | high << 32, tag, count], np.int64), calls)
        if (calls != calls[0]).any():
            reason = CollectiveMismatch([words_text(*call) for call in calls.tolist()])
            self._lose(reason)
            raise reason


_closed = fast.install(MpiCommunicator)
