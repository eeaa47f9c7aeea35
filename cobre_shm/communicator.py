"""The contract that every backend keeps. No behaviour lives here."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from cobre_shm.arrays import bytes_of, check_element, check_shape, private_array
from cobre_shm.datatypes import Array, Counts, ReduceOp
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
)

__all__ = ["Array", "Communicator", "Counts", "SharedRegion", "exit_status"]


def exit_status(code: int) -> int:
    """Return the status with which a process ends for ``abort(code)``: a failure never as 0.

    Raises:
        TypeError: It is no integer.
    """
    code = operator.index(code)
    return code & 0xFF or int(code != 0)


class SharedRegion(ABC):
    """An array with one copy per node, made by ``Communicator.create_shared_region``.

    Life: populate (the node's leader, or each of the node's ranks a block: those of
    ``split_local()``, which is this rank alone where memory is not shared), ``fence()``, read;
    optionally ``freeze()``, after which followers do not write; ``close()`` or garbage collection.

    Attributes:
        array: View of the region, zero-filled at creation. Writable on the leader, and on every
            rank until ``freeze()``.
    """

    array: Array

    def fill_slice(self, start: int, values: Array) -> None:
        """Write ``values`` to ``array[start : start + len(values)]`` (first axis).

        Not collective. Peers see the values after the next ``fence()``.

        Raises:
            ValueError: The slice leaves the region, or the region is frozen on this rank.
        """
        stop = start + len(values)
        if start < 0 or stop > len(self.array):
            raise ValueError(
                f"fill_slice: rows {start}..{stop} leave the region of {len(self.array)} rows"
            )
        self.array[start:stop] = values

    @abstractmethod
    def fence(self) -> None:
        """Make all earlier writes of a node's ranks visible to all of them. Collective.

        Where nothing is shared there is nothing to do, and nobody is waited for.

        Raises:
            CollectiveMismatch, RankFailed, CollectiveTimeout: As in
                :meth:`Communicator.allgatherv`.
        """

    @abstractmethod
    def freeze(self) -> None:
        """Fence, then make ``array`` read-only on the followers. Collective.

        On a follower a new ``array`` stands in the attribute, and writing to it is a
        ``ValueError``. Views that it took before must not be written afterwards: over shm that
        ends the process (SIGSEGV), so that nobody reads what it would write; in a window of MPI
        it would be read.

        Raises:
            CollectiveMismatch, RankFailed, CollectiveTimeout: As in :meth:`fence`.
            AllocationFailed: There are no addresses for the read-only view.
        """

    @abstractmethod
    def close(self) -> None:
        """Release this rank's hold on the region. Idempotent; live views stay valid.

        Afterwards the attribute ``array`` is an empty array.
        """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied or pickled: a copy would give back what both hold."""
        raise TypeError("a shared region cannot be copied or pickled; np.copy(region.array) can be")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Communicator(ABC):
    """A group of ranks that exchange numpy arrays.

    A collective is called by all ranks, in the same order, with equal arguments where this page
    says so. Buffers are C-contiguous numpy arrays of a fixed-size dtype, structured ones
    included; an object that exports a buffer or ``__array_interface__`` is taken as one without
    copying. A mistake that one rank can see alone is raised before any peer is involved, and
    leaves the communicator usable.

    One operation at a time: a communicator is not shared by threads.

    What a lost group raises is a ``CollectiveFailed``: mostly one of the three classes named
    below, itself where the launcher ended the group, an MPI call failed, or shared memory was
    damaged. A communicator that is closed, or (if it has peers) was made before a fork, or is
    inside a collective in another thread, raises ``InvalidCommunicator``; ``close`` does so in the
    last case.

    Attributes:
        rank: Of this process, ``0 <= rank < size``.
        size: Number of ranks.
        backend: ``"local"``, ``"shm"``, ``"tcp"``, ``"mpi"``, or a third party's name.
        is_leader: Whether this is local rank 0 of its node; always True where memory is not
            really shared.
    """

    rank: int
    size: int
    backend: str
    is_leader: bool

    @abstractmethod
    def allgatherv(
        self,
        send: Array,
        recv: Array | None = None,
        counts: Counts | None = None,
        displs: Counts | None = None,
    ) -> Array:
        """Give every rank a copy of every rank's block.

        Afterwards ``recv[displs[r] : displs[r] + counts[r]]`` equals the block that rank ``r``
        passed as ``send``, for every ``r`` and on every rank. Elements of ``recv`` outside the
        blocks are left alone. Bytes are copied, never computed with, so the result does not
        depend on the backend.

        Collective: equal dtype and ``counts`` on all ranks; ``displs`` may differ. A return means
        that every rank has contributed; it does not mean that every rank has returned.

        Args:
            send: This rank's block, ``counts[rank]`` elements. It may be the rank's own block of
                ``recv`` (in place); any other overlap is refused.
            recv: Destination, one-dimensional use of its elements in memory order. None: a new
                1-D array of ``max(displs[r] + counts[r])`` elements, gaps unspecified.
            counts: Elements per rank; zero is allowed. None: gathered first, one exchange more;
                then it must be None on all ranks.
            displs: Start of each block in elements; gaps are allowed, overlaps are not. None: the
                packed layout.

        Returns:
            ``recv``.

        Raises:
            InvalidBufferSize: A size, count or displacement does not fit; found before any peer
                is involved, the communicator stays usable.
            InvalidDatatype: Object dtype, or dtypes of ``send`` and ``recv`` differ; likewise.
            CollectiveMismatch: Ranks disagree on operation, dtype or counts; on every rank.
            RankFailed, CollectiveTimeout: A peer is gone, or did not come; afterwards ``recv``
                is unspecified and the communicator can only be closed.
        """

    @abstractmethod
    def allreduce(
        self, send: Array, recv: Array | None = None, op: ReduceOp | str = ReduceOp.SUM
    ) -> Array:
        """Reduce element-wise over all ranks; the same bits on every rank.

        Afterwards ``recv[i] == op(...op(op(x0[i], x1[i]), x2[i])..., x(size-1)[i])`` where ``xr``
        is rank ``r``'s ``send``: strictly rank order and the dtype's own arithmetic, for every
        backend, algorithm, chunk size and timing.

        Collective: equal dtype, size and ``op`` on all ranks.

        Args:
            send: At least one element, of an integer, unsigned or floating dtype; complex for
                SUM and PROD; bool for MIN and MAX (logical and, or).
            recv: Destination of the same size and dtype; may be ``send`` (in place), any other
                overlap is refused. No memory that another rank writes meanwhile, so not one
                shared region on several ranks: that is :meth:`allreduce_shared`. None: a new
                array of ``send``'s shape.
            op: A :class:`ReduceOp` or its name.

        Returns:
            ``recv``.

        Raises:
            ValueError: There is no such ``op``; found before any peer is involved.
            InvalidBufferSize, InvalidDatatype, CollectiveMismatch, RankFailed,
            CollectiveTimeout: As in :meth:`allgatherv`.
        """

    @abstractmethod
    def broadcast(self, buf: Array, root: int = 0) -> Array:
        """Copy ``root``'s ``buf`` into every rank's ``buf``, in place.

        Collective: equal dtype, size and ``root`` on all ranks. Zero elements are allowed.

        Returns:
            ``buf``.

        Raises:
            InvalidRoot: ``root`` is not a rank; found before any peer is involved.
            InvalidBufferSize, InvalidDatatype, CollectiveMismatch, RankFailed,
            CollectiveTimeout: As in :meth:`allgatherv`.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return only after every rank has entered.

        Raises:
            CollectiveMismatch, RankFailed, CollectiveTimeout: As in :meth:`allgatherv`.
        """

    def allreduce_shared(self, send: Array, op: ReduceOp | str = ReduceOp.SUM) -> Array:
        """Reduce as :meth:`allreduce` does, to a read-only result of which a node has one copy.

        Where ranks share memory each of them makes its part of the result, and nobody copies it;
        with a shared array (:meth:`empty`) as ``send`` nothing is copied at all. Elsewhere, and
        where it is so small that this would take longer, the result is private and this is an
        ``allreduce``, also for ranks that call it by that name.

        Returns:
            The result, of ``send``'s shape. Its contents are valid until this rank calls
            ``allreduce_shared`` with the same dtype and number of elements again.

        Raises:
            ValueError, InvalidBufferSize, InvalidDatatype, CollectiveMismatch, RankFailed,
            CollectiveTimeout: As in :meth:`allreduce`.
            AllocationFailed: The memory is not there; on every rank.
        """
        result = self.allreduce(send, None, op)
        result.flags.writeable = False
        return result

    def allgatherv_init(
        self, send: Array, recv: Array, counts: Counts, displs: Counts | None = None
    ) -> Callable[[], Array]:
        """Return a plan: ``plan()`` is ``allgatherv(send, recv, counts, displs)``.

        A plan is a collective whose arguments are checked when it is made (some backends check
        them in each call as well). It reads and writes the buffers
        as they are when it is called, and keeps them alive. Making it is not collective, calling
        it is. Other ranks may call the method instead.

        Raises:
            InvalidBufferSize, InvalidDatatype: As the method would.
        """
        buffers = check_gather_buffers(self.size, send, recv, displs)
        checked = check_allgatherv(self.rank, self.size, *buffers, counts, displs)
        return partial(self.allgatherv, checked.send, checked.recv, counts, displs)

    def allreduce_init(
        self, send: Array, recv: Array, op: ReduceOp | str = ReduceOp.SUM
    ) -> Callable[[], Array]:
        """Return a plan for ``allreduce(send, recv, op)``; see :meth:`allgatherv_init`.

        Raises:
            ValueError, InvalidBufferSize, InvalidDatatype: As the method would.
        """
        check_allreduce(send, recv, op)
        return partial(self.allreduce, send, recv, op)

    def broadcast_init(self, buf: Array, root: int = 0) -> Callable[[], Array]:
        """Return a plan for ``broadcast(buf, root)``; see :meth:`allgatherv_init`."""
        check_broadcast(self.size, self.rank, buf, root)
        return partial(self.broadcast, buf, root)

    def barrier_init(self) -> Callable[[], None]:
        """Return a plan for ``barrier()``; see :meth:`allgatherv_init`."""
        return self.barrier

    @abstractmethod
    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> SharedRegion:
        """Allocate an array with one copy per node, zero-filled. Collective.

        Raises:
            AllocationFailed: The memory is not there; on every rank, nothing is left.
            InvalidBufferSize, InvalidDatatype: Of shape and dtype; before any peer is involved.
            CollectiveMismatch: Ranks asked for different shapes or dtypes.
            RankFailed, CollectiveTimeout: As in :meth:`allgatherv`.
        """

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64) -> Array:
        """Return a new array of this rank's own, its contents unspecified. Collective.

        An ordinary ``numpy.ndarray``, which no other rank can change. Where ranks share memory it
        is a *shared array*: it comes from memory that all ranks have mapped, so that collectives
        on it, and on contiguous parts of it, can do without copies. Elsewhere it is private.

        Shapes and dtypes may differ between ranks; room is taken for the largest. The memory is
        used again when all ranks have dropped their array of this call, and its last view. An
        array outlives ``close()``.

        Raises:
            AllocationFailed: The memory is not there; on every rank where it is shared.
            InvalidBufferSize, InvalidDatatype: Of shape and dtype; before any peer is involved.
            CollectiveMismatch, RankFailed, CollectiveTimeout: As in :meth:`allgatherv`.
        """
        extents, element = check_shape("empty", shape, dtype)
        self.barrier()
        return private_array(extents, element)

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64) -> Array:
        """As :meth:`empty`, every byte zero."""
        array = self.empty(shape, dtype)
        bytes_of(array).fill(0)
        return array

    def full(
        self, shape: int | tuple[int, ...], fill_value: Any, dtype: DTypeLike | None = None
    ) -> Array:
        """As :meth:`empty`, every element ``fill_value``; ``dtype`` None is that of the value.

        Raises:
            ValueError, TypeError: The value is not one of that dtype, or does not fill that shape;
                found before any peer is involved.
        """
        if dtype is not None:
            dtype = check_element("full", dtype)
        value = np.asarray(fill_value, dtype)
        extents, element = check_shape("full", shape, value.dtype)
        # A scalar fills any shape, also one of more bytes than numpy can say.
        if value.ndim:
            np.broadcast_to(value, extents)
        array = self.empty(extents, element)
        array[...] = value
        return array

    @abstractmethod
    def split_local(self) -> Communicator:
        """Return a new communicator of the ranks that share memory with this one. Collective.

        Where memory is not really shared its size is 1.

        Raises:
            InitializationFailed, AllocationFailed: The new group did not come together.
            CollectiveMismatch, RankFailed, CollectiveTimeout: As in :meth:`allgatherv`.
        """

    @abstractmethod
    def abort(self, code: int = 1) -> NoReturn:
        """Take the whole group down: peers that wait raise ``RankFailed`` at once.

        Not collective. Under the launcher the run ends with ``code``. This communicator is
        failed afterwards, if it has peers. On mpi the call does not return: MPI ends the job.

        Args:
            code: 0 to 255. The system keeps the last eight bits of another; where these are 0, the
                code is 1, so that no failure is taken for success.

        Raises:
            SystemExit: With ``code``, so that this process ends too.
            TypeError: ``code`` is no integer; nothing has happened.
        """

    @abstractmethod
    def close(self) -> None:
        """Release segments, sockets and windows. Idempotent; not collective.

        Who drops it instead leaves the group too: peers that wait raise ``RankFailed``, on shm and
        tcp.

        A collective after it raises ``InvalidCommunicator``.
        """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied or pickled: there is one of it for each rank of a group."""
        raise TypeError(
            "a communicator belongs to its process and cannot be copied or pickled; make one where "
            "it is needed"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
