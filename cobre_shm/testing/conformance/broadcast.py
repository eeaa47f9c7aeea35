"""``broadcast``: the root's buffer, in place, on every rank."""

from __future__ import annotations

import array
from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator
from cobre_shm.testing.conformance.expect import assert_same_bytes, memory_of
from cobre_shm.testing.conformance.foreign import InterfaceOnly, guarded, unaligned
from cobre_shm.testing.conformance.payloads import (
    MOVABLE,
    SIZES,
    filled,
    records,
    slot_bytes,
)
from cobre_shm.testing.conformance.registry import conformance_check


def _broadcast_and_compare(
    comm: Communicator, dtype: Any, count: int, root: int, salt: int = 0
) -> None:
    expected = records(dtype, count, root, salt)
    # Made anew: numpy copies records field by field, without the padding.
    buf = records(dtype, count, root, salt) if comm.rank == root else filled(dtype, count)
    what = f"broadcast of {count} x {np.dtype(dtype)} from {root} on rank {comm.rank}"
    assert comm.broadcast(buf, root) is buf, f"{what}: the result is not buf"
    assert_same_bytes(buf, expected, what)


@conformance_check()
def check_broadcast_every_root(comm: Communicator) -> None:
    """Every rank is root once, for every small size and for none."""
    for root in range(comm.size):
        for count in (0, *SIZES):
            _broadcast_and_compare(comm, "f8", count, root, salt=count)


@conformance_check()
def check_broadcast_every_dtype(comm: Communicator) -> None:
    """Every element type travels bit by bit, signalling NaN and padding included."""
    for salt, dtype in enumerate(MOVABLE):
        for count in (1, 7):
            _broadcast_and_compare(comm, dtype, count, salt % comm.size, salt)


@conformance_check()
def check_broadcast_around_one_slot(comm: Communicator) -> None:
    """Sizes at which one round becomes two."""
    for dtype in (np.dtype("u1"), np.dtype("f8"), np.dtype("V24")):
        edge = slot_bytes(comm) // dtype.itemsize
        for root in range(comm.size):
            for count in (edge - 1, edge, edge + 1):
                _broadcast_and_compare(comm, dtype, count, root)


@conformance_check()
def check_broadcast_many_chunks(comm: Communicator) -> None:
    """Payloads of many slots, and elements longer than one."""
    slot = slot_bytes(comm)
    for root in range(comm.size):
        _broadcast_and_compare(comm, "u1", 5 * slot + 3, root)
        _broadcast_and_compare(comm, np.dtype((np.void, slot + 8)), 3, root)


@conformance_check()
def check_broadcast_short_form(comm: Communicator) -> None:
    """The root is rank 0 unless given; any integer type names it."""
    buf = np.array([comm.rank, 7])
    comm.broadcast(buf)
    assert buf.tolist() == [0, 7], f"broadcast without a root: {buf.tolist()}"
    last = comm.size - 1
    for root in (last, np.int8(last), np.uint64(last)):
        buf = np.array([comm.rank, 7])
        comm.broadcast(buf, root)  # type: ignore[arg-type]
        assert buf.tolist() == [last, 7], f"root as {type(root).__name__}: {buf.tolist()}"


@conformance_check()
def check_broadcast_shapes(comm: Communicator) -> None:
    """Shapes may differ between ranks as long as the sizes agree."""
    expected = records("f4", 12, 0)
    shape: tuple[int, ...] = (12,) if comm.rank % 2 else (3, 4)
    buf = (expected.copy() if comm.rank == 0 else filled("f4", 12)).reshape(shape)
    assert comm.broadcast(buf).shape == shape, "the shape of buf"
    assert_same_bytes(buf, expected, f"shape {shape}")
    scalar = np.array(float(comm.rank))
    comm.broadcast(scalar, comm.size - 1)
    assert float(scalar) == comm.size - 1, f"zero-dimensional buffer: {scalar}"


@conformance_check()
def check_broadcast_unaligned_buffers(comm: Communicator) -> None:
    """Buffers may start at any address."""
    for root in range(comm.size):
        for count in (1, 7, slot_bytes(comm) // 8 + 1):
            expected = records("f8", count, root)
            buf = unaligned(expected if comm.rank == root else filled("f8", count))
            comm.broadcast(buf, root)
            assert_same_bytes(buf, expected, f"unaligned, {count} elements from {root}")


@conformance_check()
def check_broadcast_read_only_at_root(comm: Communicator) -> None:
    """The root only reads its buffer."""
    for root in range(comm.size):
        expected = records("f8", 5, root)
        buf = expected.copy() if comm.rank == root else filled("f8", 5)
        buf.flags.writeable = comm.rank != root
        comm.broadcast(buf, root)
        assert_same_bytes(buf, expected, f"read-only on root {root}")


@conformance_check()
def check_broadcast_neighbours_left_alone(comm: Communicator) -> None:
    """Nothing is written before or behind the buffer."""
    for count in (1, 7, slot_bytes(comm) + 1):
        buf, assert_neighbours_untouched = guarded("u1", count)
        comm.broadcast(buf, comm.size - 1)
        assert_neighbours_untouched(f"broadcast of {count} bytes")


@conformance_check()
def check_broadcast_foreign_buffers(comm: Communicator) -> None:
    """Anything that exports its memory is used without copying."""
    for root in range(comm.size):
        text = f"from rank {root}".encode()
        own = bytearray(text if comm.rank == root else bytes(len(text)))
        for buf in (own, memoryview(own), InterfaceOnly(np.frombuffer(own, np.uint8))):
            comm.broadcast(buf, root)  # type: ignore[arg-type]
            assert own == text, f"{type(buf).__name__}: {own!r}, expected {text!r}"
            own[:] = text if comm.rank == root else bytes(len(text))
        values = array.array("q", [root, -1] if comm.rank == root else [0, 0])
        comm.broadcast(values, root)  # type: ignore[arg-type]
        assert values.tolist() == [root, -1], f"array.array: {values.tolist()}"


@conformance_check()
def check_broadcast_allocates_nothing(comm: Communicator) -> None:
    """No array of the payload's size is made, neither at the root nor where it arrives."""
    buf = records("f8", max(2 * slot_bytes(comm), 1 << 18), comm.rank)
    for root in range(comm.size):
        comm.broadcast(buf, root)
        grown = memory_of(lambda root=root: comm.broadcast(buf, root))  # type: ignore[misc]
        assert grown < buf.nbytes // 2, f"broadcast of {buf.nbytes} bytes allocated {grown} bytes"


@conformance_check(huge=True)
def check_broadcast_more_than_32_bits_of_elements(comm: Communicator) -> None:
    """Sizes are 64-bit."""
    buf: Array = np.zeros(2**31 + 5, np.int8)
    if comm.rank == 0:
        buf[:: 2**16] = 1
        buf[-1] = 2
    comm.broadcast(buf)
    assert int(buf[-1]) == 2, f"last element {buf[-1]}"
    assert np.count_nonzero(buf) == 2**15 + 2, f"{np.count_nonzero(buf)} elements are set"
