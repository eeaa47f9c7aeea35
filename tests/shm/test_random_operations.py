"""Long random sequences of all collectives, all dtypes, with late ranks; every result is checked.

An algorithm that reads a slot too early, or writes one too soon, is found here or nowhere. So that
a hundred thousand operations take seconds, nothing is computed for one of them: a payload is a
piece of a sequence with a period, at a place that depends on the operation and the rank, and so is
every result.
"""

import functools
import random
import time

import numpy as np
import pytest

from cobre_shm.datatypes import ReduceOp, is_reducible
from cobre_shm.kernels import context
from cobre_shm.testing.conformance.payloads import MOVABLE, records, reduced
from tests.support.ranks import results_of, run_ranks

KINDS = ("allreduce", "allgatherv", "broadcast", "barrier")
KIND_WEIGHTS = (5, 3, 3, 1)
# In bytes: inline, direct, scattered or chained, and now and then larger than a slot.
NBYTES = [0, 8, 16, 48, 64, 256, 1024, 4096, 8192, 40_000, 200_000, 300_000, 600_000]
WEIGHTS = [1, 12, 8, 8, 8, 8, 8, 8, 4, 1, 0.3, 0.2, 0.1]
MOST_BYTES = NBYTES[-1]
PERIOD = 7
DTYPES = [dtype for dtype in MOVABLE if dtype.itemsize <= 64]
REDUCIBLE = [d for d in DTYPES if any(is_reducible(d, op) for op in ReduceOp)]


def tiled(period, dtype):
    """Repeat a period so often that every place in it begins the largest payload."""
    times = MOST_BYTES // dtype.itemsize // PERIOD + 2
    # As bytes: numpy does not copy the padding of records.
    return np.tile(period.view(np.uint8), times).view(dtype)


def one_period(dtype):
    if dtype not in REDUCIBLE:
        return records(dtype, PERIOD, 1)
    numbers = np.arange(PERIOD) % 2 if dtype.kind == "b" else np.arange(PERIOD) + 1
    period = numbers.astype(dtype)
    if dtype.char in "gG":
        # All ranks must have the same bytes: a long double is 10 of 16, and the rest is padding.
        period.view(np.uint8).reshape(-1, 16)[:, 10:] = 0
    return period


@functools.cache
def sequence(dtype):
    return tiled(one_period(dtype), dtype)


@functools.cache
def reduced_sequence(dtype, op, size):
    blocks = [np.roll(one_period(dtype), -place(0, rank)) for rank in range(size)]
    return tiled(reduced(op, blocks), dtype)


def place(turn, rank):
    """Where in the period the payload of a rank begins: another for each turn and neighbour."""
    return (3 * turn + 5 * rank) % PERIOD


def payload(dtype, count, turn, rank):
    first = place(turn, rank)
    return sequence(dtype)[first : first + count]


def reduction(dtype, op, count, turn, size):
    # The places of all ranks move by the same from turn to turn.
    first = place(turn, 0)
    return reduced_sequence(dtype, op, size)[first : first + count]


class Agreed:
    """What all ranks draw alike, many turns at once."""

    def __init__(self, seed, turns, size):
        draw = np.random.default_rng(seed)
        self.kinds = draw.choice(len(KINDS), turns, p=np.array(KIND_WEIGHTS) / sum(KIND_WEIGHTS))
        self.dtypes = draw.integers(len(DTYPES), size=turns).tolist()
        self.nbytes = draw.choice(NBYTES, turns, p=np.array(WEIGHTS) / sum(WEIGHTS)).tolist()
        self.others = draw.integers(1 << 30, size=turns).tolist()
        self.roots = draw.integers(size, size=turns).tolist()
        self.in_place = (draw.random(turns) < 0.3).tolist()
        self.shares = draw.integers(3, size=(turns, size))


def random_operations(comm, turns, seed):
    agreed, own = Agreed(seed, turns, comm.size), random.Random(seed * 1000 + comm.rank)
    shared, room = comm.empty(MOST_BYTES, np.uint8), np.empty(MOST_BYTES * comm.size, np.uint8)
    comm.use_switch_points({"share_bytes": 4096})
    for turn in range(turns):
        if turn == turns // 2:
            comm.use_switch_points({"read_bytes": 8192})
        pause = own.random()
        if pause < 0.002:
            time.sleep(pause / 2)
        elif pause < 0.05:
            time.sleep(0)
        elif pause < 0.15 and comm.rank == 0:
            # Any way may be found to be the fastest.
            comm._context[context.OFFER] = own.getrandbits(context.KINDS * context.CLASSES)
        do_operation(comm, agreed, turn, shared if own.random() < 0.3 else None, room)
    return turns


def do_operation(comm, agreed, turn, shared, room):
    kind = KINDS[agreed.kinds[turn]]
    dtype = DTYPES[agreed.dtypes[turn]]
    other, root = agreed.others[turn], agreed.roots[turn]
    if kind == "barrier":
        comm.barrier()
        return
    if kind == "allreduce":
        dtype = REDUCIBLE[agreed.dtypes[turn] % len(REDUCIBLE)]
    count = agreed.nbytes[turn] // dtype.itemsize
    what = f"turn {turn}: {kind} {count} x {dtype}"
    mine = payload(dtype, count, turn, comm.rank)
    if kind == "broadcast":
        buf = placed(shared, mine)
        comm.broadcast(buf, root)
        assert is_same(buf, payload(dtype, count, turn, root)), f"{what} from {root}"
    elif kind == "allgatherv":
        lengths = [(count, count // 2, 0)[share] for share in agreed.shares[turn].tolist()]
        send = placed(shared, mine[: lengths[comm.rank]])
        total = sum(lengths)
        recv = room[: total * dtype.itemsize].view(dtype)
        room[: total * dtype.itemsize] = 0xA5
        comm.allgatherv(send, recv, lengths)
        end = 0
        for rank, length in enumerate(lengths):
            expected = payload(dtype, length, turn, rank)
            assert is_same(recv[end : end + length], expected), f"{what}, block of {rank}"
            end += length
    elif count:
        ops = [op for op in ReduceOp if is_reducible(dtype, op)]
        op = ops[other % len(ops)]
        send = placed(shared, mine)
        recv = send if agreed.in_place[turn] else np.full(count, 99).astype(dtype)
        comm.allreduce(send, recv, op)
        expected = reduction(dtype, op, count, turn, comm.size)
        assert (recv == expected).all(), f"{what} {op.name}"


def is_same(found, expected):
    return found.tobytes() == expected.tobytes()


def placed(shared, values):
    """Return a copy, in shared memory if there is some, at its beginning."""
    array = np.empty(values.nbytes, np.uint8) if shared is None else shared[: values.nbytes]
    array[:] = values.view(np.uint8)
    return array.view(values.dtype)


TURNS = {2: 36_000, 3: 28_000, 5: 19_000, 8: 12_000, 16: 5_000}


def test_a_hundred_thousand_operations_are_checked():
    assert sum(TURNS.values()) == 100_000


@pytest.mark.parametrize("size", TURNS)
def test_random_operations_give_the_right_values(size):
    seed = random.randrange(2**32)
    print("seed", seed)
    outcomes = run_ranks(random_operations, size, "shm", TURNS[size], seed, timeout=720.0)
    assert results_of(outcomes) == [TURNS[size]] * size
