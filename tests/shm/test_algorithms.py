"""Every algorithm of the shm backend, byte for byte against the plain loop in rank order.

Which algorithm serves a payload is data, so a tuning file forces each of them, with slots of one
or two pages, so that small payloads already take many chunks.
"""

import ctypes
import json
import secrets
from dataclasses import dataclass

import numpy as np
import pytest

from cobre_shm import layout
from cobre_shm.datatypes import ReduceOp
from cobre_shm.kernels import context
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.testing.conformance.expect import assert_same_bytes, assert_same_numbers
from cobre_shm.testing.conformance.payloads import filled, numbers, records, reduced, reductions
from tests.support.ranks import RankGroup, results_of

NEVER = 1 << 62
SMALL = {
    "scatter_chunk": 4096,
    "scatter_stream_chunk": 4096,
    "gather_chunk": 4096,
    "gather_stream_chunk": 4096,
    "direct_chunk": 4096,
    "chain_chunk": 4096,
    "broadcast_small_chunk": 4096,
    "broadcast_chunk": 8192,
    "direct_bytes": 0,
    "chain_min_bytes": NEVER,
    "stream_bytes": NEVER,
    "stream_ranks": 0,
    "share_bytes": 64,
    "read_bytes": NEVER,
    "common_bytes": 0,
}
ALGORITHMS = {
    "direct": {**SMALL, "direct_bytes": NEVER},
    "scatter": SMALL,
    "scatter past the caches": {**SMALL, "stream_bytes": 0},
    "streaming": {**SMALL, "stream_ranks": 1024},
    "streaming past the caches": {**SMALL, "stream_bytes": 0, "stream_ranks": 1024},
    "chain": {**SMALL, "chain_min_bytes": 0},
    "chain past the caches": {**SMALL, "chain_min_bytes": 0, "stream_bytes": 0},
    "reading": {**SMALL, "read_bytes": 64},
}
# Around lines, pieces and chunks of 8-byte elements, blocks of a chain, and beyond what is done
# before Python looks for signals.
LENGTHS = [1, 5, 6, 7, 8, 9, 63, 511, 512, 513, 1023, 1024, 1025, 1537, 4097, 9000, 40000]


@dataclass(frozen=True)
class JoinTuned:
    name: str
    rank: int
    size: int
    tuning: str
    slot_bytes: int = 8192

    def __call__(self):
        from cobre_shm.shm import ShmCommunicator

        return ShmCommunicator(
            ShmConfig(
                self.name,
                self.rank,
                self.size,
                60.0,
                slot_bytes=self.slot_bytes,
                tuning=self.tuning,
            )
        )


def run_tuned(tmp_path, tuning, function, size, *args, slot_bytes=8192):
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(tuning))
    name = f"/cobre-test-{secrets.token_hex(8)}"
    connects = [JoinTuned(name, rank, size, str(path), slot_bytes) for rank in range(size)]
    with RankGroup(connects, function, args) as group:
        return results_of(group.outcomes(120.0))


def buffers(comm, shared, dtype, count):
    make = comm.empty if shared else np.empty
    return make(count, dtype), make(count, dtype)


def all_lengths(comm, shared):
    for length in LENGTHS:
        blocks = [numbers(np.float64, length, 7, length, rank) for rank in range(comm.size)]
        expected = reduced(ReduceOp.SUM, blocks)
        send, recv = buffers(comm, shared, np.float64, length)
        send[:], recv[:] = blocks[comm.rank], -1
        assert_same_bytes(comm.allreduce(send, recv), expected, f"{length}")
        assert_same_bytes(send, blocks[comm.rank], f"{length}, send")
        assert_same_bytes(comm.allreduce(send, send), expected, f"{length} in place")
        recv[:] = blocks[comm.rank]
        assert_same_bytes(comm.allreduce_shared(recv), expected, f"{length} shared result")
        everything = np.concatenate(blocks)
        counts = np.full(comm.size, length)
        target = comm.empty(everything.size) if shared else np.empty(everything.size)
        target[:] = -1
        comm.allgatherv(recv, target, counts)
        assert_same_bytes(target, everything, f"{length} gathered")
        own = slice(comm.rank * length, (comm.rank + 1) * length)
        target[:] = -1
        target[own] = blocks[comm.rank]
        comm.allgatherv(target[own], target, counts)
        assert_same_bytes(target, everything, f"{length} gathered in place")
        root = length % comm.size
        recv[:] = blocks[comm.rank]
        comm.broadcast(recv, root)
        assert_same_bytes(recv, blocks[root], f"{length} broadcast")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithm_gives_the_bits_of_the_plain_loop(tmp_path, algorithm, shared, size):
    run_tuned(tmp_path, ALGORITHMS[algorithm], all_lengths, size, shared)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("algorithm", ["direct", "scatter", "streaming"])
def test_large_chunks_on_own_cores_arrive_whole(tmp_path, algorithm, size):
    """Copied out by asking for lines ahead, and reduced in the pieces of two ranks."""
    chunks = {name: 1 << 17 for name in SMALL if name.endswith("chunk")}
    tuning = {**ALGORITHMS[algorithm], **chunks, "spin_pauses": 7}
    run_tuned(tmp_path, tuning, all_lengths, size, False, slot_bytes=1 << 17)


@pytest.mark.parametrize("slot_bytes", [4096, 12288])
def test_chain_in_slots_of_any_size(tmp_path, slot_bytes):
    tuning = {**ALGORITHMS["chain"], "chain_chunk": 1 << 20}
    run_tuned(tmp_path, tuning, all_lengths, 3, False, slot_bytes=slot_bytes)


def rounds_and_parts(comm, shared, length):
    """How many exchange rounds an allreduce takes, and how many parts of a chain."""
    send, recv = buffers(comm, shared, np.float64, length)
    send[:] = comm.rank
    block = int(comm._context[context.CONTROL]) + comm.rank * layout.CONTROL_BYTES
    parts = ctypes.c_int64.from_address(block + layout.STEPS)
    comm.barrier()
    before = int(comm._context[context.EPOCH]), parts.value
    comm.allreduce(send, recv)
    return int(comm._context[context.EPOCH]) - before[0], parts.value - before[1]


# An allreduce of a slot, 8192 bytes, is two chunks. What is said of rounds is said of the
# algorithms in ``kernels/allreduce.py``; of them, only a chain counts parts.
ROUNDS = {
    "direct": 1,
    "scatter": 3,
    "scatter past the caches": 3,
    "streaming": 2,
    "streaming past the caches": 2,
}


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tuning_forces_the_algorithm(tmp_path, algorithm, size):
    found = run_tuned(tmp_path, ALGORITHMS[algorithm], rounds_and_parts, size, False, 1024)
    if algorithm.startswith("chain"):
        assert found == [(2, 2)] * size
        # A block is two parts for each rank, and each has a round before it.
        blocks = run_tuned(
            tmp_path, ALGORITHMS[algorithm], rounds_and_parts, size, False, 3 * size * 1024
        )
        assert blocks == [(4, 6 * size)] * size
    elif algorithm == "reading":
        # The probe, the trial, and two rounds; or three by slots, where reading is forbidden.
        assert found in ([(4, 0)] * size, [(5, 0)] * size)
    else:
        assert found == [(ROUNDS[algorithm], 0)] * size
    inline = run_tuned(tmp_path, ALGORITHMS[algorithm], rounds_and_parts, size, False, 6)
    assert inline == [(1, 0)] * size


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shared_arrays_take_as_many_rounds_for_any_payload(tmp_path, size):
    short, long = (
        run_tuned(tmp_path, ALGORITHMS["scatter"], rounds_and_parts, size, True, length)
        for length in (1024, 9 * 1024)
    )
    assert short == long


def rounds_of_both_ways(comm, shared):
    """Directly, and through slots where rank 0 has found that these take less time."""
    found = []
    for offer in (0, -1):
        if comm.rank == 0:
            comm._context[context.OFFER] = offer
        found.append(rounds_and_parts(comm, shared, 9 * 1024)[0])
        all_lengths(comm, shared)
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_slots_are_used_for_shared_arrays_where_they_take_less_time(tmp_path, size):
    found = run_tuned(tmp_path, ALGORITHMS["scatter"], rounds_of_both_ways, size, True)
    assert found == [found[0]] * size
    directly, by_slots = found[0]
    # A probe, two rounds; or the probe, a chunk of a slot each, and the gathering of the last.
    assert directly == 3
    assert by_slots == 1 + 72 // 4 + 1, found


def all_types(comm, shared):
    for dtype, op in reductions():
        # In the line of the arrival word, in one slot, in many chunks.
        for length in (3, 8192 // dtype.itemsize, 1500):
            blocks = [numbers(dtype, length, 3, length, rank) for rank in range(comm.size)]
            send = buffers(comm, shared, dtype, length)[0]
            send[:] = blocks[comm.rank]
            result = comm.allreduce(send, filled(dtype, length), op)
            expected = reduced(op, blocks)
            signs = op in (ReduceOp.SUM, ReduceOp.PROD)
            what = f"{length} x {dtype} {op.name}"
            assert_same_numbers(result, expected, what, sign_of_zero=signs)
            result = comm.allreduce_shared(send, op)
            assert_same_numbers(result, expected, f"{what} shared", sign_of_zero=signs)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithm_reduces_every_dtype_and_operation(tmp_path, algorithm, size):
    run_tuned(tmp_path, ALGORITHMS[algorithm], all_types, size, False)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_dtype_and_operation_is_reduced_where_it_lies(tmp_path, size):
    run_tuned(tmp_path, ALGORITHMS["scatter"], all_types, size, True)


def mixed_buffers(comm):
    """Some ranks pass shared arrays and some private ones; each rank in its own way."""
    for turn in range(48):
        if comm.rank == 0:
            # Where they are, and through slots.
            comm._context[context.OFFER] = -(turn >> 1 & 1)
        length = (1500, 4097)[turn & 1]
        blocks = [numbers(np.float64, length, turn, rank) for rank in range(comm.size)]
        own, other = buffers(comm, True, np.float64, length)
        kind = (turn * 5 + comm.rank * (turn // 3 + 1)) % 5
        send = own if kind in (0, 1, 4) else np.empty(length)
        send[:] = blocks[comm.rank]
        recv = {0: other, 1: np.empty(length), 2: other, 3: np.empty(length), 4: own}[kind]
        comm.allreduce(send, recv)
        assert_same_bytes(recv, reduced(ReduceOp.SUM, blocks), f"turn {turn}, kind {kind}")
        counts = [length] * comm.size
        send[:] = blocks[comm.rank]
        gathered = comm.allgatherv(send, np.empty(length * comm.size), counts)
        assert_same_bytes(gathered, np.concatenate(blocks), f"turn {turn}, gathered")
        send[:] = blocks[comm.rank]
        comm.broadcast(send, turn % comm.size)
        assert_same_bytes(send, blocks[turn % comm.size], f"turn {turn}, broadcast")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("algorithm", ["scatter", "streaming", "chain", "reading"])
def test_private_and_shared_buffers_may_meet(tmp_path, algorithm, size):
    run_tuned(tmp_path, ALGORITHMS[algorithm], mixed_buffers, size)


def sender_goes_on_at_once(comm, shared):
    """Who returns from a collective may change its buffers, whoever still reads them."""
    length = 4097
    send, recv = buffers(comm, shared, np.float64, length)
    for turn in range(100):
        if comm.rank == 0:
            # As above.
            comm._context[context.OFFER] = -(turn & 1)
        send[:] = turn + comm.rank
        comm.allreduce(send, recv)
        send[:] = -1e9
        expected = comm.size * turn + comm.size * (comm.size - 1) // 2
        assert (recv == expected).all(), turn
        root = turn % comm.size
        recv[:] = turn if comm.rank == root else -1
        comm.broadcast(recv, root)
        assert (recv == turn).all(), turn
        recv[:] = -2


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(
    ("algorithm", "shared"),
    [("scatter", True), ("streaming", True), ("chain", True), ("reading", False)],
)
def test_buffers_belong_to_the_program_again_on_return(tmp_path, algorithm, shared, size):
    run_tuned(tmp_path, ALGORITHMS[algorithm], sender_goes_on_at_once, size, shared)


def records_of_any_size(comm):
    for dtype in (np.dtype("S5"), np.dtype("V7"), np.dtype([("a", "i4"), ("b", "f8")])):
        for lengths in ([0, 3, 700], [2000, 0, 1], [5, 5, 5]):
            counts = (lengths * comm.size)[: comm.size]
            blocks = [records(dtype, count, 1, r) for r, count in enumerate(counts)]
            recv = filled(dtype, sum(counts))
            comm.allgatherv(blocks[comm.rank], recv, counts)
            assert_same_bytes(recv, np.concatenate(blocks), f"{dtype} {counts}")


@pytest.mark.parametrize("algorithm", ["scatter", "streaming", "reading"])
def test_allgatherv_moves_records_in_chunks_that_do_not_divide_them(tmp_path, algorithm):
    run_tuned(tmp_path, ALGORITHMS[algorithm], records_of_any_size, 3)
