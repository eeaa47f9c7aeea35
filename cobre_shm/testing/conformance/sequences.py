"""Many collectives after each other: nothing left over from one disturbs the next."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.testing.conformance.expect import (
    Delays,
    assert_same_bytes,
    assert_same_everywhere,
)
from cobre_shm.testing.conformance.payloads import (
    filled,
    numbers,
    packed,
    records,
    reduced,
    slot_bytes,
)
from cobre_shm.testing.conformance.registry import conformance_check

_SEED = 20240229
_VARIANTS = 400


@conformance_check()
def check_mixed_collectives_random_order(comm: Communicator, operations: int = 10_000) -> None:
    """Collectives of random kind, dtype, size and root, with random pauses on every rank."""
    shared = random.Random(_SEED)
    delays = Delays(comm, seed=_SEED, share=0.01)
    variants = [_variant(comm, shared, salt) for salt in range(_VARIANTS)]
    rare = [_large_variant(comm, shared, salt) for salt in range(8)]
    for turn in range(operations):
        is_large = shared.random() < 0.002
        run, expected, recv, what = shared.choice(rare if is_large else variants)
        delays.maybe_sleep()
        run()
        if recv.tobytes() != expected:
            assert_same_bytes(
                recv, np.frombuffer(expected, recv.dtype), f"operation {turn}: {what}"
            )
    assert_same_everywhere(comm, "the last operation", recv)


_Variant = tuple[Callable[[], object], bytes, Array, str]


def _variant(comm: Communicator, shared: random.Random, salt: int) -> _Variant:
    """Return one small collective: a call, the bytes it must leave, and where."""
    kind = shared.choice(["allgatherv", "allreduce", "allreduce", "broadcast", "barrier"])
    dtype = np.dtype(shared.choice(["f8", "f8", "i4", "f4", "u1", "i8", "D"]))
    count = shared.choice([1, 1, 2, 3, 6, 7, 16, 63])
    if kind == "allgatherv":
        counts = [shared.randrange(count + 1) for _ in range(comm.size)]
        return _allgatherv(comm, dtype, counts, salt)
    if kind == "allreduce":
        op = shared.choice([ReduceOp.SUM, ReduceOp.PROD] if dtype.kind == "c" else list(ReduceOp))
        return _allreduce(comm, dtype, count, op, salt)
    if kind == "broadcast":
        return _broadcast(comm, dtype, count, shared.randrange(comm.size), salt)
    return comm.barrier, b"", np.empty(0), "barrier"


def _large_variant(comm: Communicator, shared: random.Random, salt: int) -> _Variant:
    count = slot_bytes(comm) // 4 + shared.randrange(9)
    dtype = np.dtype("f8")
    if salt % 3 == 0:
        return _allreduce(comm, dtype, count, ReduceOp.SUM, salt)
    if salt % 3 == 1:
        return _broadcast(comm, dtype, count, shared.randrange(comm.size), salt)
    counts = [shared.randrange(count) if rank % 2 else count for rank in range(comm.size)]
    return _allgatherv(comm, dtype, counts, salt)


def _allgatherv(comm: Communicator, dtype: np.dtype[Any], counts: list[int], salt: int) -> _Variant:
    blocks = [records(dtype, count, rank, salt) for rank, count in enumerate(counts)]
    recv, displs, send = filled(dtype, sum(counts)), packed(counts), blocks[comm.rank]
    return (
        lambda: comm.allgatherv(send, recv, counts, displs),
        b"".join(block.tobytes() for block in blocks),
        recv,
        f"allgatherv of {dtype}, counts {counts}",
    )


def _allreduce(
    comm: Communicator, dtype: np.dtype[Any], count: int, op: ReduceOp, salt: int
) -> _Variant:
    blocks = [numbers(dtype, count, rank, salt) for rank in range(comm.size)]
    recv, send = filled(dtype, count), blocks[comm.rank]
    return (
        lambda: comm.allreduce(send, recv, op),
        reduced(op, blocks).tobytes(),
        recv,
        f"allreduce {op.name} of {count} x {dtype}",
    )


def _broadcast(
    comm: Communicator, dtype: np.dtype[Any], count: int, root: int, salt: int
) -> _Variant:
    source = records(dtype, count, root, salt)
    buf = filled(dtype, count)

    def run() -> None:
        if comm.rank == root:
            buf[:] = source
        comm.broadcast(buf, root)

    return run, source.tobytes(), buf, f"broadcast of {count} x {dtype} from {root}"


@conformance_check()
def check_send_buffer_reused_at_once(comm: Communicator) -> None:
    """A buffer is the caller's again as soon as its collective returned."""
    delays = Delays(comm, seed=31, share=0.1)
    for count in (1, 40, slot_bytes(comm) // 8 + 1):
        send, recv = np.empty(count), np.empty(count)
        gathered = np.empty(count * comm.size)
        counts = [count] * comm.size
        for turn in range(60 if count < 1000 else 6):
            root = turn % comm.size
            delays.maybe_sleep()
            send[:] = comm.rank + turn
            comm.allreduce(send, recv, ReduceOp.MAX)
            send[:] = comm.rank - turn
            comm.allgatherv(send, gathered, counts)
            send[:] = turn
            comm.broadcast(send, root)
            assert (send == turn).all(), f"broadcast {turn} of {count}: {send[send != turn][0]}"
            send[:] = -1.0
            top = comm.size - 1 + turn
            assert (recv == top).all(), f"allreduce {turn} of {count}: {recv[recv != top][0]}"
            blocks = np.repeat(np.arange(comm.size) - turn, count)
            assert (gathered == blocks).all(), f"allgatherv {turn} of {count} elements"


@conformance_check()
def check_broadcasts_without_pause(comm: Communicator) -> None:
    """A root that runs ahead of its peers overwrites nothing that they still need."""
    delays = Delays(comm, seed=32, share=0.2)
    for root in range(comm.size):
        buf = np.empty(50, np.int64)
        for turn in range(200):
            if comm.rank == root:
                buf[:] = turn
            else:
                delays.maybe_sleep()
            comm.broadcast(buf, root)
            assert (buf == turn).all(), f"broadcast {turn} from {root}: {buf.tolist()}"
            buf[:] = -1


@conformance_check()
def check_sizes_alternate(comm: Communicator) -> None:
    """Small and large payloads follow each other, whatever roads they take."""
    slot = slot_bytes(comm)
    counts = [1, slot // 8 + 1, 2, slot // 8, 600, slot // 2 + 3, 1, 7, slot // 4]
    for salt, count in enumerate(counts * 2):
        blocks = [numbers("f8", count, rank, salt) for rank in range(comm.size)]
        recv = filled("f8", count)
        comm.allreduce(blocks[comm.rank], recv)
        assert_same_bytes(recv, reduced(ReduceOp.SUM, blocks), f"allreduce of {count}")
        root = salt % comm.size
        buf = blocks[root].copy() if comm.rank == root else filled("f8", count)
        comm.broadcast(buf, root)
        assert_same_bytes(buf, blocks[root], f"broadcast of {count} from {root}")
        result = comm.allgatherv(blocks[comm.rank])
        assert_same_bytes(result, np.concatenate(blocks), f"allgatherv of {count}")


@conformance_check()
def check_region_fences_among_collectives(comm: Communicator) -> None:
    """Fences and collectives mix in any order."""
    delays = Delays(comm, seed=33, share=0.1)
    with comm.split_local() as node, comm.create_shared_region(node.size, "i8") as region:
        for turn in range(200):
            delays.maybe_sleep()
            region.array[node.rank] = turn
            region.fence()
            assert (region.array == turn).all(), f"region in turn {turn}: {region.array.tolist()}"
            total = comm.allreduce(np.array([turn]))
            assert total.tolist() == [turn * comm.size], f"sum in turn {turn}: {total.tolist()}"
