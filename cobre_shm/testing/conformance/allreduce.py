"""``allreduce``: the plain loop in rank order, bit by bit, on every rank."""

from __future__ import annotations

import array
from typing import Any

import numpy as np

from cobre_shm.communicator import Array, Communicator
from cobre_shm.datatypes import ReduceOp
from cobre_shm.testing.conformance.expect import (
    Delays,
    assert_same_bytes,
    assert_same_everywhere,
    assert_same_numbers,
    memory_of,
)
from cobre_shm.testing.conformance.foreign import InterfaceOnly, guarded, unaligned
from cobre_shm.testing.conformance.payloads import (
    FLOATS,
    INTEGERS,
    SIZES,
    filled,
    numbers,
    reduced,
    reductions,
    slot_bytes,
    special_numbers,
)
from cobre_shm.testing.conformance.registry import conformance_check


def _is_minimum_or_maximum(op: ReduceOp) -> bool:
    return op in (ReduceOp.MIN, ReduceOp.MAX)


def _reduce_and_compare(comm: Communicator, blocks: list[Array], op: ReduceOp) -> Array:
    """Run the full form and compare with the plain loop; return the result."""
    send = blocks[comm.rank].copy()
    recv = filled(send.dtype, send.size).reshape(send.shape)
    what = f"allreduce {op.name} of {send.size} x {send.dtype} on rank {comm.rank}"
    result = comm.allreduce(send, recv, op)
    assert result is recv, f"{what}: the result is not recv"
    # Which of -0.0 and 0.0 is the smaller differs between processors, and numpy follows them.
    assert_same_numbers(
        recv, reduced(op, blocks), what, sign_of_zero=not _is_minimum_or_maximum(op)
    )
    assert_same_bytes(send, blocks[comm.rank], f"{what}: send after the call")
    return recv


def _blocks(comm: Communicator, dtype: Any, count: int, salt: int = 0) -> list[Array]:
    return [numbers(dtype, count, rank, salt) for rank in range(comm.size)]


@conformance_check()
def check_allreduce_every_dtype_and_operation(comm: Communicator) -> None:
    """Every defined pair, for one element and for a few."""
    results = [
        _reduce_and_compare(comm, _blocks(comm, dtype, count), op)
        for dtype, op in reductions()
        for count in (1, 7, 33)
    ]
    assert_same_everywhere(comm, "reductions of every dtype", *results)


@conformance_check()
def check_allreduce_special_values(comm: Communicator) -> None:
    """NaN, infinities, signed zeros, subnormals, overflow and wrap, on every rank the same bits."""
    results = []
    for dtype, op in reductions():
        blocks = [special_numbers(dtype, rank) for rank in range(comm.size)]
        results.append(_reduce_and_compare(comm, blocks, op))
    assert_same_everywhere(comm, "reductions of special values", *results)


@conformance_check()
def check_allreduce_overflow_is_no_error(comm: Communicator) -> None:
    """Whatever numpy does about overflow in the program, a reduction says nothing of it."""
    for dtype in (np.dtype("e"), np.dtype("f8"), np.dtype("g")):
        # Of several slots: an error after the first would leave peers waiting.
        send = np.full(2 * slot_bytes(comm) // dtype.itemsize, np.finfo(dtype).max, dtype)
        with np.errstate(all="raise"):
            result = comm.allreduce(send)
        assert (result == (send if comm.size == 1 else np.inf)).all(), f"overflow of {dtype}"


@conformance_check()
def check_allreduce_small_sizes(comm: Communicator) -> None:
    """Sizes around the limits that fast paths tend to have."""
    for count in SIZES:
        for dtype in ("f8", "f4", "i1"):
            _reduce_and_compare(comm, _blocks(comm, dtype, count, count), ReduceOp.SUM)


@conformance_check()
def check_allreduce_around_one_slot(comm: Communicator) -> None:
    """Sizes at which one round becomes two."""
    for dtype in (np.dtype("i1"), np.dtype("f8"), np.dtype("D")):
        edge = slot_bytes(comm) // dtype.itemsize
        for count in (edge - 1, edge, edge + 1):
            _reduce_and_compare(comm, _blocks(comm, dtype, count), ReduceOp.SUM)


@conformance_check()
def check_allreduce_many_chunks(comm: Communicator) -> None:
    """Payloads of many slots, for every operation."""
    slot = slot_bytes(comm)
    for op in ReduceOp:
        _reduce_and_compare(comm, _blocks(comm, "f8", 5 * slot // 8 + 3), op)
    for dtype in ("f4", "i2", "e"):
        count = 3 * slot // np.dtype(dtype).itemsize + 1
        _reduce_and_compare(comm, _blocks(comm, dtype, count), ReduceOp.SUM)


@conformance_check()
def check_allreduce_short_tail(comm: Communicator) -> None:
    """A last part of a few bytes behind a whole slot."""
    for code, tails in (("e", (1, 9, 13, 20, 24)), ("g", (1, 2, 3)), ("f8", (1, 3, 6))):
        edge = slot_bytes(comm) // np.dtype(code).itemsize
        for tail in tails:
            _reduce_and_compare(comm, _blocks(comm, code, edge + tail), ReduceOp.SUM)


@conformance_check(min_size=3)
def check_allreduce_sum_in_rank_order(comm: Communicator) -> None:
    """A sum that any other order of the ranks gets wrong: 1e16, then ones, then -1e16."""
    terms = [1e16, *[1.0] * (comm.size - 2), -1e16]
    for turn in range(comm.size):
        turned = terms[turn:] + terms[:turn]
        expected = turned[0]
        for term in turned[1:]:
            expected += term
        for count in (1, 9, slot_bytes(comm) // 8 + 1):
            result = comm.allreduce(np.full(count, turned[comm.rank]))
            assert (result == expected).all(), (
                f"sum of {turned}, {count} elements: {result[result != expected][0]}, "
                f"expected {expected}"
            )


@conformance_check()
def check_allreduce_nan_from_any_rank(comm: Communicator) -> None:
    """One NaN anywhere makes the result NaN, for every operation."""
    for dtype in FLOATS:
        for op in ReduceOp:
            for source in range(comm.size):
                send = np.full(9, comm.rank + 1, dtype)
                if comm.rank == source:
                    send[4] = np.nan
                found = np.isnan(comm.allreduce(send, op=op))
                assert found.tolist() == [index == 4 for index in range(9)], (
                    f"{op.name} of {dtype} with NaN on rank {source}: NaN at {found.nonzero()[0]}"
                )


@conformance_check()
def check_allreduce_integers_wrap(comm: Communicator) -> None:
    """Sums and products of integers are taken modulo two to the number of bits."""
    for dtype in INTEGERS:
        limits = np.iinfo(dtype)
        modulus = 2**limits.bits
        for op, exact in (
            (ReduceOp.SUM, limits.max * comm.size),
            (ReduceOp.PROD, limits.max**comm.size),
        ):
            expected = exact % modulus
            if expected > limits.max:
                expected -= modulus
            result = comm.allreduce(np.full(5, limits.max, dtype), op=op)
            assert result.tolist() == [expected] * 5, (
                f"{op.name} of {limits.max} over {comm.size} ranks of {dtype}: {result.tolist()}, "
                f"expected {expected}"
            )


@conformance_check()
def check_allreduce_opposing_zeros_independent_of_position(comm: Communicator) -> None:
    """The sign of the minimum of -0.0 and 0.0 does not depend on the element's place."""
    edge = slot_bytes(comm) // 2 + 1
    for dtype in FLOATS:
        for op in (ReduceOp.MIN, ReduceOp.MAX):
            for count in (17, edge):
                zero = -0.0 if comm.rank % 2 else 0.0
                result = comm.allreduce(np.full(count, zero, dtype), op=op)
                signs = np.signbit(result)
                assert (signs == signs[0]).all(), f"{op.name} of {count} zeros of {dtype}: mixed"
                assert_same_everywhere(comm, f"{op.name} of zeros of {dtype}", result)


@conformance_check()
def check_allreduce_booleans_logical(comm: Communicator) -> None:
    """MIN is the logical and, MAX the logical or."""
    for source in range(comm.size):
        mine = comm.rank == source
        some = comm.allreduce(np.array([mine, False, True]), op=ReduceOp.MAX)
        every = comm.allreduce(np.array([not mine, True, False]), op=ReduceOp.MIN)
        assert some.dtype == every.dtype == np.bool_, "dtype of a logical reduction"
        assert some.tolist() == [True, False, True], f"or over the ranks: {some.tolist()}"
        assert every.tolist() == [False, True, False], f"and over the ranks: {every.tolist()}"


@conformance_check()
def check_allreduce_in_place(comm: Communicator) -> None:
    """``recv`` may be ``send``, as the same object or as another view of the same elements."""
    for count in (1, 7, slot_bytes(comm) // 8 + 1, 3 * slot_bytes(comm) // 8):
        blocks = _blocks(comm, "f8", count)
        expected = reduced(ReduceOp.SUM, blocks)
        both = blocks[comm.rank].copy()
        assert comm.allreduce(both, both) is both, "in place: the result is not recv"
        assert_same_bytes(both, expected, f"in place, {count} elements")
        both = blocks[comm.rank].copy()
        comm.allreduce(both[:], both[:])
        assert_same_bytes(both, expected, f"two views of the same {count} elements")


@conformance_check()
def check_allreduce_short_forms(comm: Communicator) -> None:
    """``recv`` may be left out; ``op`` is SUM unless given, and may be a name."""
    blocks = [block.reshape(2, 3) for block in _blocks(comm, "f8", 6)]
    send = blocks[comm.rank]
    result = comm.allreduce(send)
    assert result.shape == (2, 3), f"recv=None: shape {result.shape}, expected (2, 3)"
    assert not np.shares_memory(result, send), "recv=None: the result is send"
    assert_same_bytes(result, reduced(ReduceOp.SUM, blocks), "recv=None")
    for op in ReduceOp:
        for given in (op, op.name, op.name.lower(), op.name.title()):
            recv = filled("f8", 6).reshape(2, 3)
            assert comm.allreduce(send, recv, given) is recv, "the result is not recv"
            assert_same_bytes(recv, reduced(op, blocks), f"op={given!r}")


@conformance_check()
def check_allreduce_new_results_independent(comm: Communicator) -> None:
    """Arrays that were returned are not written again."""
    first = comm.allreduce(numbers("f8", 4, comm.rank, 1))
    kept = first.copy()
    second = comm.allreduce(numbers("f8", 4, comm.rank, 2))
    assert not np.shares_memory(first, second), "two results share memory"
    comm.barrier()
    assert_same_bytes(first, kept, "the first result after a second call")


@conformance_check()
def check_allreduce_shapes(comm: Communicator) -> None:
    """Two-dimensional and zero-dimensional arrays are reduced in memory order."""
    blocks = [block.reshape(3, 5) for block in _blocks(comm, "f4", 15)]
    _reduce_and_compare(comm, blocks, ReduceOp.SUM)
    flat = filled("f4", 15)
    comm.allreduce(blocks[comm.rank], flat)
    assert_same_bytes(flat, reduced(ReduceOp.SUM, blocks), "two-dimensional send, flat recv")
    scalar = comm.allreduce(np.array(comm.rank + 1.0))
    assert scalar.shape == (), f"shape of a zero-dimensional result: {scalar.shape}"
    assert float(scalar) == comm.size * (comm.size + 1) / 2, f"zero-dimensional sum: {scalar}"


@conformance_check()
def check_allreduce_unaligned_buffers(comm: Communicator) -> None:
    """Buffers may start at any address."""
    for dtype in ("f8", "i2", "D", "g"):
        for count in (1, 7, 67, slot_bytes(comm) // 8 + 1):
            blocks = _blocks(comm, dtype, count)
            send = unaligned(blocks[comm.rank])
            recv = unaligned(filled("u1", send.nbytes)).view(dtype)
            comm.allreduce(send, recv)
            what = f"unaligned, {count} x {dtype}"
            assert_same_numbers(recv, reduced(ReduceOp.SUM, blocks), what)


@conformance_check()
def check_allreduce_read_only_send(comm: Communicator) -> None:
    """``send`` is only read."""
    blocks = _blocks(comm, "f8", 5)
    send = blocks[comm.rank].copy()
    send.flags.writeable = False
    assert_same_bytes(comm.allreduce(send), reduced(ReduceOp.SUM, blocks), "read-only send")


@conformance_check()
def check_allreduce_neighbours_of_recv_left_alone(comm: Communicator) -> None:
    """Nothing is written before or behind ``recv``."""
    for dtype in ("i1", "f8"):
        for count in (1, 7, slot_bytes(comm) + 1):
            recv, assert_neighbours_untouched = guarded(dtype, count)
            comm.allreduce(numbers(dtype, count, comm.rank), recv)
            assert_neighbours_untouched(f"allreduce of {count} x {dtype}")


@conformance_check()
def check_allreduce_foreign_buffers(comm: Communicator) -> None:
    """Anything that exports its memory is used without copying."""
    blocks = [np.arange(4.0) + rank for rank in range(comm.size)]
    expected = reduced(ReduceOp.SUM, blocks)
    mine = array.array("d", blocks[comm.rank])
    target: Any
    for send in (mine, memoryview(mine), InterfaceOnly(blocks[comm.rank])):
        kind = type(send).__name__
        for target in (array.array("d", bytes(32)), memoryview(array.array("d", bytes(32)))):
            comm.allreduce(send, target)  # type: ignore[arg-type]
            assert target.tolist() == expected.tolist(), f"{kind} to a buffer: {target.tolist()}"
        memory = np.zeros(4)
        comm.allreduce(send, InterfaceOnly(memory))  # type: ignore[arg-type]
        assert_same_bytes(memory, expected, f"{kind} to an array interface")
    octets = bytearray([comm.rank + 1] * 3)
    comm.allreduce(octets, octets, ReduceOp.MAX)  # type: ignore[arg-type]
    assert octets == bytes([comm.size] * 3), f"bytearray in place: {octets!r}"


@conformance_check()
def check_allreduce_repeated_same_bits(comm: Communicator) -> None:
    """The same data gives the same bits whenever and wherever it is reduced."""
    delays = Delays(comm, seed=11, share=0.3)
    count = 203
    blocks = _blocks(comm, "f8", count)
    expected = reduced(ReduceOp.SUM, blocks)
    memory = np.empty(2 * count + 64)
    for turn in range(60):
        delays.maybe_sleep()
        send = memory[turn % 9 :][:count]
        send[:] = blocks[comm.rank]
        recv = memory[count + 9 + turn % 13 :][:count]
        comm.allreduce(send, recv)
        assert_same_bytes(recv, expected, f"repetition {turn}")


@conformance_check()
def check_allreduce_in_pieces_same_bits(comm: Communicator) -> None:
    """A reduction done piece by piece gives the bits of the whole."""
    count = 2 * slot_bytes(comm) // 8 + 77
    for dtype in ("f8", "f4"):
        send = numbers(dtype, count, comm.rank)
        whole = comm.allreduce(send)
        pieces = [
            comm.allreduce(send[start : start + length])
            for start, length in ((0, 1), (1, 6), (7, 1000), (1007, count - 1007))
        ]
        assert_same_bytes(np.concatenate(pieces), whole, f"pieces of {count} x {dtype}")
        assert_same_everywhere(comm, "the whole", whole)


@conformance_check()
def check_allreduce_full_form_allocates_nothing(comm: Communicator) -> None:
    """With all arguments given, no array of the payload's size is made."""
    count = max(2 * slot_bytes(comm), 1 << 18)
    send, recv = numbers("f8", count, comm.rank), filled("f8", count)
    comm.allreduce(send, recv, ReduceOp.SUM)
    grown = memory_of(lambda: comm.allreduce(send, recv, ReduceOp.SUM))
    assert grown < send.nbytes // 2, f"allreduce of {send.nbytes} bytes allocated {grown} bytes"


@conformance_check(huge=True)
def check_allreduce_more_than_32_bits_of_elements(comm: Communicator) -> None:
    """Sizes are 64-bit."""
    both = np.ones(2**31 + 5, np.int8)
    both[-1] = comm.rank
    comm.allreduce(both, both)
    assert int(both[-1]) == comm.size * (comm.size - 1) // 2, f"last element {both[-1]}"
    assert int(both[:-1].min()) == int(both[:-1].max()) == comm.size, "other elements"
