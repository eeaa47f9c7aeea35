"""Mistakes that one rank can see alone: refused before anything is sent, the group goes on."""

from __future__ import annotations

from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import (
    CommError,
    InvalidBufferSize,
    InvalidDatatype,
    InvalidRoot,
)
from cobre_shm.testing.conformance.expect import (
    assert_group_usable,
    assert_refused,
    assert_same_bytes,
    expect_error,
)
from cobre_shm.testing.conformance.payloads import filled, packed
from cobre_shm.testing.conformance.registry import conformance_check


def _objects() -> Array:
    return np.array([{}, None], dtype=object)


def _records_of_objects() -> Array:
    return np.zeros(2, np.dtype([("number", "i4"), ("thing", "O")]))


def _not_contiguous(count: int) -> list[tuple[str, Array]]:
    return [
        ("of every other element", np.zeros(2 * count)[::2]),
        ("in reverse", np.zeros(count)[::-1]),
        ("of a matrix's column", np.zeros((count, 3))[:, 1]),
        ("of a matrix's corner", np.zeros((count, 4))[:, : count // 2]),
        ("in Fortran order", np.zeros((count, 2), order="F")),
    ]


@conformance_check()
def check_allgatherv_wrong_counts_refused(comm: Communicator) -> None:
    """``counts``: one non-negative integer a rank, this rank's equal to ``send.size``."""
    size = comm.size
    send = np.zeros(2)
    recv = np.zeros(2 * size + 2)
    right = [2] * size
    mistakes: list[tuple[str, Any]] = [
        ("counts too short", right[1:]),
        ("counts too long", [*right, 2]),
        ("counts of two dimensions", [right]),
        ("a single number as counts", 2),
        ("negative counts", [-2] * size),
        ("counts of floats", [2.0] * size),
        ("counts of booleans", [True] * size),
        ("counts of texts", ["2"] * size),
        ("a count beyond 64 bits", [2**64] * size),
        ("a count beyond signed 64 bits", np.array([2**63] * size, np.uint64)),
        ("a count above send.size", [3] * size),
        ("a count below send.size", [1] * size),
    ]
    if size > 1:
        peers = [2 if rank == comm.rank else -1 for rank in range(size)]
        mistakes.append(("negative counts of peers", peers))
    for what, counts in mistakes:
        what = f"allgatherv with {what}"
        assert_refused(comm, InvalidBufferSize, what, comm.allgatherv, send, recv, counts)
    error = expect_error(
        InvalidBufferSize, "a count below send.size", comm.allgatherv, send, recv, [1] * size
    )
    assert error.operation == "allgatherv", f"operation is {error.operation!r}"
    assert error.expected == 1, f"expected is {error.expected!r}, not the count"
    assert error.actual == 2, f"actual is {error.actual!r}, not the size of send"


@conformance_check()
def check_allgatherv_wrong_displs_refused(comm: Communicator) -> None:
    """``displs``: one non-negative integer a rank, blocks inside ``recv`` and apart."""
    size = comm.size
    send = np.zeros(2)
    recv = np.zeros(2 * size + 2)
    counts, right = [2] * size, packed([2] * size)
    mistakes: list[tuple[str, Any]] = [
        ("displs too short", right[1:]),
        ("displs too long", [*right, 2 * size]),
        ("a negative displacement", [-1, *right[1:]]),
        ("displs of floats", [float(displ) for displ in right]),
        ("the last block behind the end", [*right[:-1], 2 * size + 1]),
        ("a displacement beyond 64 bits", [*right[:-1], 2**64]),
        ("a block end beyond 64 bits", [*right[:-1], 2**63 - 1]),
    ]
    if size > 1:
        mistakes += [
            ("two equal blocks", [0, *right[:-1]]),
            ("overlapping blocks", [*right[:-1], right[-1] - 1]),
            ("overlapping blocks out of order", [3, *[displ + 2 for displ in right[1:]]]),
        ]
    for what, displs in mistakes:
        what = f"allgatherv with {what}"
        assert_refused(comm, InvalidBufferSize, what, comm.allgatherv, send, recv, counts, displs)


@conformance_check()
def check_allgatherv_sum_of_counts_overflow_refused(comm: Communicator) -> None:
    """Packed blocks whose end is no 64-bit number."""
    if comm.size > 1:
        counts = [2 if rank == comm.rank else 2**63 - 1 for rank in range(comm.size)]
        assert_refused(
            comm,
            InvalidBufferSize,
            "allgatherv with counts of 2**63 - 1",
            comm.allgatherv,
            np.zeros(2),
            np.zeros(9),
            counts,
        )


@conformance_check()
def check_allgatherv_small_recv_refused(comm: Communicator) -> None:
    """``recv`` must hold every block; it may be larger."""
    send, counts = np.zeros(2), [2] * comm.size
    for room in (0, 1, 2 * comm.size - 1):
        recv = filled("f8", room)
        what = f"allgatherv into {room} elements"
        assert_refused(comm, InvalidBufferSize, what, comm.allgatherv, send, recv, counts)
        assert_same_bytes(recv, filled("f8", room), "recv after a refused call")
        # The sizes are exchanged first: then every rank knows, and every rank raises.
        expect_error(InvalidBufferSize, f"{what} without counts", comm.allgatherv, send, recv)
        assert_group_usable(comm, "a small recv without counts")


@conformance_check()
def check_allgatherv_mistake_of_one_rank(comm: Communicator) -> None:
    """A mistake that a rank finds when the sizes have been exchanged is its own affair."""
    send, wrong = np.full(2, comm.rank, np.int64), comm.size - 1
    expected = np.repeat(np.arange(comm.size), 2)
    for room in (0, 2 * comm.size - 1):
        recv = filled("i8", room if comm.rank == wrong else 2 * comm.size)
        if comm.rank == wrong:
            what = f"allgatherv into {room} elements without counts"
            expect_error(InvalidBufferSize, what, comm.allgatherv, send, recv)
            assert_same_bytes(recv, filled("i8", room), "recv after a refused call")
        else:
            comm.allgatherv(send, recv)
            assert (recv == expected).all(), f"rank {wrong} has a small recv: {recv}"
        assert_group_usable(comm, "a small recv of one rank, without counts")
    if comm.rank == wrong:
        what, displs = "a recv of 2**64 bytes", [2 * rank for rank in range(wrong)] + [2**61]
        expect_error(InvalidBufferSize, what, comm.allgatherv, send, displs=displs)
    else:
        assert (comm.allgatherv(send) == expected).all(), f"rank {wrong} has a large displacement"
    assert_group_usable(comm, "a large displacement of one rank, without counts")


@conformance_check()
def check_allgatherv_wrong_types_refused(comm: Communicator) -> None:
    """``send`` and ``recv``: contiguous, of one movable dtype, ``recv`` writable."""
    size, counts = comm.size, [2] * comm.size
    send, recv = np.zeros(2), np.zeros(2 * comm.size)
    read_only = np.zeros(2 * size)
    read_only.flags.writeable = False
    mistakes: list[tuple[str, Any, Any]] = [
        ("recv of another dtype", send, np.zeros(2 * size, np.int64)),
        ("recv of another byte order", send, recv.astype(recv.dtype.newbyteorder("S"))),
        ("recv of another precision", send, np.zeros(2 * size, np.float32)),
        ("read-only recv", send, read_only),
        ("bytes as recv", np.zeros(2, np.uint8), bytes(2 * size)),
        ("recv not contiguous", send, np.zeros(4 * size)[::2]),
        ("object dtype", _objects(), np.empty(2 * size, object)),
        ("records that hold objects", _records_of_objects(), None),
        ("a list", [0.0, 0.0], recv),
        ("a list as recv", send, [0.0] * 2 * size),
        ("None", None, recv),
        ("a number", 3.0, recv),
    ]
    mistakes += [(f"send {what}", bad, recv) for what, bad in _not_contiguous(2)]
    for what, bad_send, bad_recv in mistakes:
        what = f"allgatherv with {what}"
        assert_refused(comm, InvalidDatatype, what, comm.allgatherv, bad_send, bad_recv, counts)


@conformance_check()
def check_allgatherv_mistakes_without_counts_refused(comm: Communicator) -> None:
    """What is wrong whatever the counts are is found before the counts are exchanged."""
    send, recv = np.zeros(2), np.zeros(2 * comm.size)
    integers = np.zeros(2 * comm.size, np.int64)
    strided = np.zeros(4 * comm.size)[::2]
    short = [0] * (comm.size - 1)
    call = comm.allgatherv
    assert_refused(comm, InvalidDatatype, "objects without counts", call, _objects())
    assert_refused(comm, InvalidDatatype, "other dtypes without counts", call, send, integers)
    assert_refused(comm, InvalidDatatype, "a strided recv without counts", call, send, strided)
    what = "short displs without counts"
    assert_refused(comm, InvalidBufferSize, what, call, send, recv, displs=short)


@conformance_check()
def check_allgatherv_overlap_refused(comm: Communicator) -> None:
    """``send`` overlaps ``recv`` only as the rank's own block."""
    memory = np.zeros(4 * comm.size + 4)
    counts = [4] * comm.size
    own = 4 * comm.rank
    other = 4 * ((comm.rank + 1) % comm.size)
    mistakes = [("a shifted own block", own + 1)]
    if comm.size > 1:
        mistakes.append(("another rank's block", other))
    for what, start in mistakes:
        assert_refused(
            comm,
            InvalidBufferSize,
            f"allgatherv with {what} as send",
            comm.allgatherv,
            memory[start : start + 4],
            memory[: 4 * comm.size],
            counts,
        )


@conformance_check()
def check_allreduce_wrong_sizes_refused(comm: Communicator) -> None:
    """``send`` has at least one element, ``recv`` as many."""
    for what, count, room in (
        ("nothing", 0, None),
        ("nothing into nothing", 0, 0),
        ("a smaller recv", 3, 2),
        ("a larger recv", 3, 4),
        ("an empty recv", 3, 0),
    ):
        send, recv = np.zeros(count), None if room is None else np.zeros(room)
        assert_refused(comm, InvalidBufferSize, f"allreduce of {what}", comm.allreduce, send, recv)
    error = expect_error(
        InvalidBufferSize, "a smaller recv", comm.allreduce, np.zeros(3), np.zeros(2)
    )
    assert error.operation == "allreduce", f"operation is {error.operation!r}"
    assert error.expected == 3, f"expected is {error.expected!r}, not the size of send"
    assert error.actual == 2, f"actual is {error.actual!r}, not the size of recv"


@conformance_check()
def check_allreduce_wrong_types_refused(comm: Communicator) -> None:
    """``send`` and ``recv``: contiguous, of one dtype that the operation is defined for."""
    send, recv = np.zeros(4), np.zeros(4)
    read_only = np.zeros(4)
    read_only.flags.writeable = False
    mistakes: list[tuple[str, Any, Any]] = [
        ("recv of another dtype", send, np.zeros(4, np.int64)),
        ("recv of another byte order", send, recv.astype(recv.dtype.newbyteorder("S"))),
        ("read-only recv", send, read_only),
        ("read-only buffer in place", read_only, read_only),
        ("recv not contiguous", send, np.zeros(8)[::2]),
        ("objects", _objects(), None),
        ("a list", [0.0], None),
        ("None", None, None),
        ("a list as recv", send, [0.0] * 4),
    ]
    mistakes += [(f"send {what}", bad, recv) for what, bad in _not_contiguous(4)]
    for what, bad_send, bad_recv in mistakes:
        what = f"allreduce with {what}"
        assert_refused(comm, InvalidDatatype, what, comm.allreduce, bad_send, bad_recv)


@conformance_check()
def check_allreduce_undefined_operation_refused(comm: Communicator) -> None:
    """Complex numbers have no order, booleans no sum, other types no arithmetic."""
    undefined: list[tuple[Any, tuple[ReduceOp, ...]]] = [
        *((code, (ReduceOp.MIN, ReduceOp.MAX)) for code in "FDG"),
        ("?", (ReduceOp.SUM, ReduceOp.PROD)),
        *((code, tuple(ReduceOp)) for code in ("S5", "U3", "V8", "M8[s]", "m8[s]")),
        ([("a", "f8")], tuple(ReduceOp)),
    ]
    for dtype, operations in undefined:
        for op in operations:
            send = np.zeros(3, dtype)
            what = f"allreduce {op.name} of {send.dtype}"
            expect_error(InvalidDatatype, what, comm.allreduce, send, op=op)
    assert_group_usable(comm, "undefined reductions")
    assert_refused(
        comm,
        InvalidDatatype,
        "allreduce MIN of complex numbers",
        comm.allreduce,
        np.zeros(3, complex),
        op=ReduceOp.MIN,
    )


@conformance_check()
def check_allreduce_unknown_operation_refused(comm: Communicator) -> None:
    """``op`` is a ReduceOp or its name."""
    unknown: tuple[Any, ...] = ("average", "", "SUM,MAX", 4, -1, None, 1.0, np.add, sum)
    for op in unknown:
        what = f"allreduce with op={op!r}"
        assert_refused(comm, ValueError, what, comm.allreduce, np.zeros(3), op=op)


@conformance_check()
def check_allreduce_partial_overlap_refused(comm: Communicator) -> None:
    """``recv`` is ``send`` or shares nothing with it."""
    memory = np.zeros(10)
    for shift in (1, 3):
        for send, recv in ((memory[:4], memory[shift:][:4]), (memory[shift:][:4], memory[:4])):
            what = f"allreduce of buffers {shift} elements apart"
            assert_refused(comm, InvalidBufferSize, what, comm.allreduce, send, recv)
    comm.allreduce(memory[:4], memory[4:8])


@conformance_check()
def check_broadcast_invalid_root_refused(comm: Communicator) -> None:
    """``root`` is an integer, and a rank."""
    invalid: tuple[Any, ...] = (
        *(-1, comm.size, comm.size + 5, 2**40, -(2**70)),
        *(0.0, True, False, None, "0", np.float64(0), np.bool_(False), np.array([0])),
    )
    for root in invalid:
        what = f"broadcast from root {root!r}"
        assert_refused(comm, InvalidRoot, what, comm.broadcast, np.zeros(3), root)
    error = expect_error(
        InvalidRoot, "root behind the last rank", comm.broadcast, np.zeros(3), comm.size
    )
    assert error.root == comm.size, f"root is {error.root!r}"
    assert error.size == comm.size, f"size is {error.size!r}"


@conformance_check()
def check_broadcast_wrong_types_refused(comm: Communicator) -> None:
    """``buf``: contiguous, movable, and writable except at the root."""
    mistakes: list[tuple[str, Any]] = [
        ("objects", _objects()),
        ("records that hold objects", _records_of_objects()),
        ("a list", [0.0]),
        ("None", None),
        *_not_contiguous(4),
    ]
    for what, buf in mistakes:
        for root in (0, comm.size - 1):
            assert_refused(comm, InvalidDatatype, f"broadcast of {what}", comm.broadcast, buf, root)
    read_only = np.zeros(4)
    read_only.flags.writeable = False
    for bad in (read_only, bytes(32), np.float64(1.0)):
        for root in range(comm.size):
            if comm.rank != root:
                what = f"broadcast into a read-only {type(bad).__name__}"
                expect_error(InvalidDatatype, what, comm.broadcast, bad, root)
    assert_group_usable(comm, "read-only receivers of a broadcast")


@conformance_check()
def check_create_shared_region_wrong_arguments_refused(comm: Communicator) -> None:
    """The extents are non-negative integers and make a shape, the dtype is movable."""
    shapes: tuple[Any, ...] = (-1, (3, -1), (2.5,), 2.5, (True,), ("3",), (0, 2**63), (1,) * 99)
    for shape in shapes:
        what = f"region of shape {shape!r}"
        assert_refused(comm, InvalidBufferSize, what, comm.create_shared_region, shape)
    for dtype in (object, [("thing", "O")], "S0", "nonsense", np.dtype(("f8", 3))):
        what = f"region of {dtype!r}"
        assert_refused(comm, InvalidDatatype, what, comm.create_shared_region, 3, dtype)


@conformance_check()
def check_local_mistakes_are_communicator_errors(comm: Communicator) -> None:
    """One ``except CommError`` catches every mistake; each is also the usual Python error."""
    mistakes: list[tuple[type[CommError], type[Exception], Any]] = [
        (InvalidBufferSize, ValueError, lambda: comm.allreduce(np.zeros(0))),
        (InvalidDatatype, TypeError, lambda: comm.allreduce(_objects())),
        (InvalidRoot, ValueError, lambda: comm.broadcast(np.zeros(1), comm.size)),
    ]
    for kind, usual, call in mistakes:
        error = expect_error(kind, kind.__name__, call)
        assert issubclass(kind, CommError), f"{kind.__name__} is no CommError"
        assert isinstance(error, usual), f"{kind.__name__} is no {usual.__name__}"
        assert error.to_dict()["context"]["code"] == kind.__name__, "code of the error"
    assert_group_usable(comm, "three mistakes")
