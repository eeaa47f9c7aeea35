"""The short road from a call to MPI, for the arguments that most calls have.

The checks of ``validate`` take longer than a small message. Here the same is established for
plain arrays only: numpy's own class, a plain dtype in native order, C-contiguous, memory of their
own (so that two of them cannot overlap), one call of MPI. Whatever is otherwise, or wrong, is not
taken here and goes the long way, which also words the errors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cobre_net.mpi.flat import BYTE, Flat, native_operation
from cobre_shm.datatypes import ReduceOp, is_reducible
from cobre_shm.native.reduce import reduction_address
from cobre_shm.native.rows import address_of, reduce_at
from cobre_shm.validate import check_allgatherv

__all__ = ["Direct"]

_PLAIN = frozenset(np.dtype(code) for code in "?bBhHiIlLqQfdFD")
# Programs use a few layouts again and again; more than this many are not kept.
_PLANS = 64
# numpy's flags: C-contiguous, owner of its memory, writeable.
_SEND, _RECV = 0x1 | 0x4, 0x1 | 0x4 | 0x400


class Direct:
    """Each method returns whether it has done the collective; if not, nothing was sent."""

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self._comm = flat.comm
        self._rank, self._size, self._limit = flat.rank, flat.size, flat.piece_bytes
        self._plans: dict[Any, Any] = {}
        self._room = np.empty(flat.small_bytes, np.uint8)
        self._rows = address_of(self._room)
        self._small = flat.small_bytes // flat.size
        # By operation, then by dtype.
        self._native = [
            {
                dtype: native
                for dtype in _PLAIN
                if (native := native_operation(dtype, op, deterministic=flat.deterministic))
            }
            for op in ReduceOp
        ]

    def broadcast(self, buf: Any, root: Any) -> bool:
        """Broadcast a plain array."""
        if type(buf) is not np.ndarray or type(root) is not int or buf.dtype not in _PLAIN:
            return False
        flags = buf.flags
        if not (
            flags.c_contiguous
            and (flags.writeable or root == self._rank)
            and 0 <= root < self._size
            and buf.nbytes <= self._limit
        ):
            return False
        self._comm.Bcast([buf, BYTE], root)
        return True

    def allreduce(self, send: Any, recv: Any, op: Any) -> bool:
        """Reduce plain arrays: small ones in one step, any by MPI where it may."""
        if type(send) is not np.ndarray or type(recv) is not np.ndarray or type(op) is not ReduceOp:
            return False
        dtype = send.dtype
        if (
            recv.dtype is not dtype
            or send.flags.num & _SEND != _SEND
            or recv.flags.num & _RECV != _RECV
            or send is recv
            or not 0 < send.size == recv.size
        ):
            return False
        native = self._native[op].get(dtype)
        nbytes = send.nbytes
        if native is not None:
            if nbytes > self._limit:
                return False
            self._comm.Allreduce([send, native[0]], [recv, native[0]], native[1])
            return True
        if nbytes > self._small or dtype not in _PLAIN or not is_reducible(dtype, op):
            return False
        self._comm.Allgather([send, BYTE], [self._room, nbytes, BYTE])
        reduce_at(reduction_address(dtype, op), self._rows, self._size, recv)
        return True

    def allgatherv(self, send: Any, recv: Any, counts: Any, displs: Any) -> bool:
        """Gather plain arrays with a layout that was checked before."""
        if type(counts) is not list or type(displs) is not list or type(send) is not np.ndarray:
            return False
        if (
            type(recv) is not np.ndarray
            or recv.dtype is not send.dtype
            or send.dtype not in _PLAIN
            or send.flags.num & _SEND != _SEND
            or recv.flags.num & _RECV != _RECV
            or send is recv
        ):
            return False
        # A float makes the sum a float: equal to an integer, but no count.
        if type(sum(counts)) is not int or type(sum(displs)) is not int:
            return False
        key = (send.itemsize, *counts, *displs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._add_plan(key, send, recv, counts, displs)
        own, needed, message = plan
        if message is None:
            return False
        if send.size != own or recv.size < needed:
            return False
        self._comm.Allgatherv([send, BYTE], [recv, message, BYTE])
        return True

    def _add_plan(
        self, key: Any, send: Any, recv: Any, counts: list[Any], displs: list[Any]
    ) -> Any:
        """Check a layout, which raises where it is wrong, and keep it."""
        checked = check_allgatherv(self._rank, self._size, send, recv, counts, displs)
        ends = checked.counts + checked.displs
        message = None
        if int(ends.max()) * send.itemsize <= self._limit:
            lengths, starts = checked.counts * send.itemsize, checked.displs * send.itemsize
            message = (lengths.tolist(), starts.tolist())
        plan = (int(checked.counts[self._rank]), int(ends.max()), message)
        if len(self._plans) < _PLANS:
            self._plans[key] = plan
        return plan
