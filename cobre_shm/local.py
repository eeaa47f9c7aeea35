"""The local backend: one process, rank 0 of size 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
from numpy.typing import DTypeLike

from cobre_shm.arrays import bytes_of
from cobre_shm.communicator import Array, Communicator, Counts, exit_status
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import InvalidCommunicator
from cobre_shm.heap import HeapRegion
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_region,
)

__all__ = ["LocalCommunicator"]


class LocalCommunicator(Communicator):
    """One process. Collectives are identities that check their arguments like all backends.

    There is no group to lose: it goes on working in a forked child, which has its own, and after
    an ``abort`` whose SystemExit was caught.
    """

    rank = 0
    size = 1
    backend = "local"
    is_leader = True

    def __init__(self) -> None:
        self._closed = False
        self._busy: Array | None = None

    def __repr__(self) -> str:
        return "<LocalCommunicator rank 0 of 1>"

    def allgatherv(
        self,
        send: Array,
        recv: Array | None = None,
        counts: Counts | None = None,
        displs: Counts | None = None,
    ) -> Array:
        """See :meth:`Communicator.allgatherv`."""
        return self._gather_plan(send, recv, counts, displs)()

    def allgatherv_init(
        self, send: Array, recv: Array, counts: Counts, displs: Counts | None = None
    ) -> Callable[[], Array]:
        """See :meth:`Communicator.allgatherv_init`."""
        return self._gather_plan(send, recv, counts, displs)

    def _gather_plan(
        self, send: Array, recv: Array | None, counts: Counts | None, displs: Counts | None
    ) -> Callable[[], Array]:
        self.check_open()
        send, recv = check_gather_buffers(1, send, recv, displs)
        if counts is None:
            counts = [send.size]
        checked = check_allgatherv(0, 1, send, recv, counts, displs)
        start = int(checked.displs[0]) * send.itemsize
        # As bytes: numpy copies records field by field, without the padding.
        source, target = bytes_of(send), bytes_of(checked.recv)[start : start + send.nbytes]
        return self._copy_plan(source, target, checked.recv)

    def allreduce(
        self, send: Array, recv: Array | None = None, op: ReduceOp | str = ReduceOp.SUM
    ) -> Array:
        """See :meth:`Communicator.allreduce`."""
        return self._reduce_plan(send, recv, op)()

    def allreduce_init(
        self, send: Array, recv: Array, op: ReduceOp | str = ReduceOp.SUM
    ) -> Callable[[], Array]:
        """See :meth:`Communicator.allreduce_init`."""
        return self._reduce_plan(send, recv, op)

    def _reduce_plan(
        self, send: Array, recv: Array | None, op: ReduceOp | str
    ) -> Callable[[], Array]:
        self.check_open()
        send, recv, _ = check_allreduce(send, recv, op)
        return self._copy_plan(send.reshape(-1), recv.reshape(-1), recv)

    def _copy_plan(self, source: Array, target: Array, result: Array) -> Callable[[], Array]:
        def run() -> Array:
            self.check_open()
            target[:] = source
            return result

        return run

    def broadcast(self, buf: Array, root: int = 0) -> Array:
        """See :meth:`Communicator.broadcast`."""
        self.check_open()
        return check_broadcast(1, 0, buf, root)

    def barrier(self) -> None:
        """See :meth:`Communicator.barrier`."""
        self.check_open()

    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> HeapRegion:
        """See :meth:`Communicator.create_shared_region`."""
        self.check_open()
        return HeapRegion(*check_region(shape, dtype))

    def split_local(self) -> LocalCommunicator:
        """See :meth:`Communicator.split_local`."""
        self.check_open()
        return LocalCommunicator()

    def abort(self, code: int = 1) -> NoReturn:
        """End the process: it is the whole group.

        Raises:
            SystemExit: With ``code``.
        """
        raise SystemExit(exit_status(code))

    def close(self) -> None:
        """See :meth:`Communicator.close`."""
        self._closed = True
        if self._busy is not None:
            self._busy[:] = 1

    def bar_with(self, busy: Array) -> None:
        """Take the word that keeps jitted collectives out when it is not 0."""
        self._busy = busy
        if self._closed:
            busy[:] = 1

    def check_open(self) -> None:
        """Raise ``InvalidCommunicator`` if this is closed."""
        if self._closed:
            raise InvalidCommunicator("The communicator is closed", context={"backend": "local"})
