"""The tcp communicator: ties the star to the contract."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cobre_net.tcp.call import Call
from cobre_net.tcp.coordinator import Coordinator
from cobre_net.tcp.flows import CHUNK_BYTES, Block
from cobre_net.tcp.link import PAYLOAD, Link
from cobre_net.tcp.membership import Membership
from cobre_net.tcp.plans import SmallReduce, payload
from cobre_net.tcp.reducing import fold_function
from cobre_net.tcp.wire import HEAD_BYTES, SMALL_BYTES
from cobre_net.tcp.worker import Worker
from cobre_shm.arrays import address_of, bytes_of, bytes_of_shape
from cobre_shm.communicator import Array, Counts
from cobre_shm.datatypes import ReduceOp, dtype_tag
from cobre_shm.errors import AllocationFailed
from cobre_shm.heap import HeapRegion
from cobre_shm.layout import ALLGATHERV, ALLREDUCE, BARRIER, BROADCAST, COUNTS, REGION, SPLIT
from cobre_shm.selection.kinds import TcpConfig
from cobre_shm.validate import (
    GatherLayout,
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_gathered,
    check_region,
    region_words,
)

__all__ = ["TcpCommunicator"]

_BARRIER = Call(BARRIER)
_SPLIT = Call(SPLIT)
_INT64 = np.dtype(np.int64)
_MAX_PLANS = 256


class TcpCommunicator(Membership):
    """Ranks on any hosts, in a star around rank 0.

    Construction is collective: it returns when all ranks are connected. ``wire.py`` draws the
    protocol, ``coordinator.py`` says why nobody waits for ever. Memory is not shared: every rank
    is its own leader, and its regions are private.

    Results are those of the ``shm`` backend bit for bit: rank 0 reduces, in rank order, with the
    same kernels.

    A rank whose process ends without ``close()`` has failed, whatever its exit code.

    Args:
        config: Where the coordinator is, rank, size, time limits, secret.

    Attributes:
        slot_bytes: Bytes in which large payloads are reduced and passed on.

    Raises:
        InitializationFailed: The group did not come together.
    """

    slot_bytes = CHUNK_BYTES

    def __init__(self, config: TcpConfig) -> None:
        self._plans: dict[tuple[np.dtype[Any], int, int], SmallReduce] = {}
        super().__init__(config)

    def __repr__(self) -> str:
        return f"<TcpCommunicator rank {self.rank} of {self.size}>"

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
        if counts is not None:
            checked = check_allgatherv(self.rank, self.size, send, recv, counts, displs)
            return self._gather_checked(checked)
        with self._in_one_call():
            counts = self._gather_counts(send)
            checked, mistakes = check_gathered(self.rank, self.size, send, recv, counts, displs)
            self._gather_checked(checked)
        if mistakes:
            raise mistakes.pop()
        return checked.recv

    def _gather_checked(self, checked: GatherLayout) -> Array:
        send = checked.send
        hashed = zlib.crc32(np.ascontiguousarray(checked.counts).tobytes())
        total = int(checked.counts.sum())
        call = Call(ALLGATHERV, 0, hashed, dtype_tag(send.dtype), total)
        itemsize = send.itemsize
        parts = [count * itemsize for count in checked.counts.tolist()]
        places = [displ * itemsize for displ in checked.displs.tolist()]
        self._gather(call, send, checked.recv, parts, places)
        return checked.recv

    def _gather_counts(self, send: Array) -> Array:
        counts = np.empty(self.size, _INT64)
        own = np.array([send.size], _INT64)
        places = [8 * rank for rank in range(self.size)]
        call = Call(COUNTS, 0, 0, dtype_tag(send.dtype), self.size)
        self._gather(call, own, counts, [8] * self.size, places)
        return counts

    def _gather(
        self, call: Call, send: Array, recv: Array, parts: list[int], places: list[int]
    ) -> None:
        source, target = bytes_of(send).data, bytes_of(recv).data
        blocks = [
            target[place : place + nbytes] for place, nbytes in zip(places, parts, strict=True)
        ]
        with self._round() as star:
            blocks[self.rank][:] = source
            if star is None:
                return
            total = sum(parts)
            if total > SMALL_BYTES:
                if isinstance(star, Coordinator):
                    star.gather(call, blocks)
                else:
                    others = {
                        rank: Block(rank, block)
                        for rank, block in enumerate(blocks)
                        if rank != self.rank
                    }
                    star.stream(call, source, others)
                return
            starts = [PAYLOAD + sum(parts[:rank]) for rank in range(self.size + 1)]
            if isinstance(star, Coordinator):
                memory = star.out.memory
                memory[PAYLOAD : starts[1]] = source

                def combine(link: Link) -> None:
                    rank = link.rank
                    part = link.buffer.frame[HEAD_BYTES : HEAD_BYTES + parts[rank]]
                    memory[starts[rank] : starts[rank + 1]] = part

                star.exchange_parts(call, parts, total, combine)
                result = memory
            else:
                star.out.memory[PAYLOAD : PAYLOAD + len(source)] = source
                star.exchange(call, len(source), total)
                result = star.links[0].buffer.memory
            view = memoryview(result)
            for rank, block in enumerate(blocks):
                if rank != self.rank:
                    block[:] = view[starts[rank] : starts[rank + 1]]

    def allreduce(
        self, send: Array, recv: Array | None = None, op: ReduceOp | str = ReduceOp.SUM
    ) -> Array:
        """See :meth:`Communicator.allreduce`."""
        self._check_usable()
        plan = self._known_plan(send, recv, op)
        if plan is None:
            send, recv, op = check_allreduce(send, recv, op)
            if send.nbytes > SMALL_BYTES or self._star is None:
                self._reduce_large(send, recv, op)
                return recv
            plan = self._plans.get((send.dtype, int(op), send.size)) or self._new_plan(send, op)
        assert recv is not None
        # As _Round does it, spelled out: this is the call whose own cost is seen most.
        if not self._lock.acquire(False):
            self._enter_slowly()
        try:
            if self._unusable is not None:
                self._check_usable()
            plan.part[:] = send if send.ndim == 1 else send.reshape(-1)
            plan.run()
            if recv.ndim == 1:
                recv[:] = plan.result
            else:
                recv.reshape(-1)[:] = plan.result
        except BaseException as error:
            self._fail_inside(error)
            raise
        finally:
            self._lock.release()
        return recv

    def _known_plan(
        self, send: Array, recv: Array | None, op: ReduceOp | str
    ) -> SmallReduce | None:
        """A plan that is there already, for arrays in which ``check_allreduce`` finds no fault.

        It finds faults in others, and does more than these few comparisons; they are a tenth of
        a round trip.
        """
        if type(send) is not np.ndarray or type(recv) is not np.ndarray or type(op) is not ReduceOp:
            return None
        flags = recv.flags
        if (
            recv.dtype is not send.dtype
            or recv.shape != send.shape
            or not (flags.c_contiguous and flags.writeable and send.flags.c_contiguous)
            or np.may_share_memory(send, recv)
        ):
            return None
        return self._plans.get((send.dtype, int(op), send.size))

    def _new_plan(self, send: Array, op: ReduceOp) -> SmallReduce:
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        assert self._star is not None
        plan = SmallReduce(self._star, send, op)
        # Not by op itself: to hash an enumeration takes longer than to send eight bytes.
        self._plans[send.dtype, int(op), send.size] = plan
        return plan

    def _reduce_large(self, send: Array, recv: Array, op: ReduceOp) -> None:
        call = Call(ALLREDUCE, int(op), 0, dtype_tag(send.dtype), send.size)
        result = bytes_of(recv).data
        with self._round() as star:
            if isinstance(star, Coordinator):
                fold = fold_function(send.dtype, op)
                star.reduce(call, send.nbytes, send.itemsize, address_of(send), result, fold)
            elif star is not None:
                # In place, what has been sent is overwritten by what was made of it.
                star.stream(call, bytes_of(send).data, {0: Block(0, result)})
            elif recv is not send:
                recv.reshape(-1)[:] = send.reshape(-1)

    def broadcast(self, buf: Array, root: int = 0) -> Array:
        """See :meth:`Communicator.broadcast`."""
        self._check_usable()
        array = check_broadcast(self.size, self.rank, buf, root)
        root, nbytes = int(root), array.nbytes
        call = Call(BROADCAST, 0, root, dtype_tag(array.dtype), array.size)
        is_root = self.rank == root
        with self._round() as star:
            if star is None:
                return array
            data = bytes_of(array).data
            if nbytes > SMALL_BYTES:
                if isinstance(star, Coordinator):
                    star.broadcast(call, root, data)
                else:
                    blocks = {} if is_root else {root: Block(root, data)}
                    star.stream(call, data if is_root else data[:0], blocks)
                return array
            end = PAYLOAD + nbytes
            if is_root:
                star.out.memory[PAYLOAD:end] = data
            if isinstance(star, Coordinator):
                self._broadcast_small(star, call, root, nbytes)
                result = star.out.memory
            else:
                star.exchange(call, nbytes if is_root else 0, nbytes)
                result = star.links[0].buffer.memory
            if not is_root:
                data[:] = memoryview(result)[PAYLOAD:end]
        return array

    def _broadcast_small(self, star: Coordinator, call: Call, root: int, nbytes: int) -> None:
        end = PAYLOAD + nbytes

        def combine(link: Link) -> None:
            if link.rank == root:
                star.out.memory[PAYLOAD:end] = memoryview(link.buffer.memory)[PAYLOAD:end]

        if root:
            parts = [nbytes if rank == root else 0 for rank in range(self.size)]
            star.exchange_parts(call, parts, nbytes, combine)
        else:
            star.exchange_equal(call, 0, nbytes, combine)

    def barrier(self) -> None:
        """See :meth:`Communicator.barrier`."""
        self._check_usable()
        self._meet(_BARRIER)

    def _meet(self, call: Call) -> None:
        with self._round() as star:
            if isinstance(star, Coordinator):
                star.exchange_equal(call, 0, 0, _nothing)
            elif star is not None:
                star.exchange(call, 0, 0)

    def create_shared_region(
        self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float64
    ) -> HeapRegion:
        """See :meth:`Communicator.create_shared_region`: a private array on every rank."""
        self._check_usable()
        extents, element = check_region(shape, dtype)
        region, refused = None, None
        try:
            region = HeapRegion(extents, element)
        except AllocationFailed as error:
            refused = error
        tag, count, hashed = region_words(extents, element)
        call = Call(REGION, 0, hashed, tag, count)
        if self._count_refusals(call, refused is not None) or region is None:
            raise refused or AllocationFailed(
                bytes_of_shape(extents, element), "another rank could not allocate its region"
            )
        return region

    def _count_refusals(self, call: Call, is_refused: bool) -> int:
        with self._round() as star:
            if star is None:
                return int(is_refused)
            part = payload(star.out, _INT64, 1)
            part[0] = is_refused
            if isinstance(star, Worker):
                star.exchange(call, 8, 8)
                part = payload(star.links[0].buffer, _INT64, 1)
            else:
                total = part

                def combine(link: Link) -> None:
                    total[0] += payload(link.buffer, _INT64, 1)[0]

                star.exchange_equal(call, 8, 8, combine)
            return int(part[0])

    def split_local(self) -> TcpCommunicator:
        """See :meth:`Communicator.split_local`: this rank alone."""
        self._check_usable()
        self._meet(_SPLIT)
        return TcpCommunicator(TcpConfig(self._config.coordinator, rank=0, size=1))


def _nothing(link: Link) -> None:
    """Combine parts without payload."""
