"""Long random sequences of all collectives, all dtypes, with late ranks; every result is checked.

An algorithm that reads a slot too early, or writes one too soon, is found here or nowhere.
"""

import random
import time

import numpy as np
import pytest

from cobre_shm.datatypes import ReduceOp, is_reducible
from tests.support.ranks import results_of, run_ranks

DTYPES = [np.dtype(code) for code in ("f8", "f4", "i8", "i4", "i2", "i1", "u8", "u4", "u1", "c16")]
# In bytes: inline, direct, scattered or chained, and now and then larger than a slot.
NBYTES = [0, 8, 16, 48, 64, 256, 1024, 4096, 8192, 40_000, 200_000, 300_000, 600_000]
WEIGHTS = [1, 12, 8, 8, 8, 8, 8, 8, 4, 1, 0.5, 0.5, 0.2]


def pattern(dtype, count, turn, rank):
    """Values of small integers, so that sums are exact and every element is told apart."""
    return ((np.arange(count) + 3 * turn + 5 * rank) % 7 + 1).astype(dtype)


def random_operations(comm, turns, seed):
    agreed, own = random.Random(seed), random.Random(seed * 1000 + comm.rank)
    shared = comm.empty(600_000, np.uint8)
    for turn in range(turns):
        kind = agreed.choices(("allreduce", "allgatherv", "broadcast", "barrier"), (5, 3, 3, 1))[0]
        dtype = agreed.choice(DTYPES)
        count = int(agreed.choices(NBYTES, WEIGHTS)[0]) // dtype.itemsize
        op = agreed.choice([op for op in ReduceOp if is_reducible(dtype, op)])
        root = agreed.randrange(comm.size)
        lengths = [agreed.choice((count, count // 2, 0)) for _ in range(comm.size)]
        in_place, in_heap = agreed.random() < 0.3, own.random() < 0.3
        pause = own.random()
        if pause < 0.01:
            time.sleep(pause / 10)
        elif pause < 0.05:
            time.sleep(0)
        what = f"turn {turn}: {kind} {count} x {dtype} {op.name} root {root}"
        if kind == "barrier":
            comm.barrier()
        elif kind == "broadcast":
            buf = pattern(dtype, count, turn, comm.rank)
            if in_heap:
                buf = placed(shared, buf)
            comm.broadcast(buf, root)
            assert (buf == pattern(dtype, count, turn, root)).all(), what
        elif kind == "allgatherv":
            send = pattern(dtype, lengths[comm.rank], turn, comm.rank)
            recv = np.zeros(sum(lengths), dtype)
            comm.allgatherv(placed(shared, send) if in_heap else send, recv, np.array(lengths))
            expected = [pattern(dtype, n, turn, r) for r, n in enumerate(lengths)]
            assert (recv == np.concatenate(expected)).all(), what
        elif count:
            send = pattern(dtype, count, turn, comm.rank)
            if in_heap:
                send = placed(shared, send)
            recv = send if in_place else np.zeros(count, dtype)
            comm.allreduce(send, recv, op)
            blocks = [pattern(dtype, count, turn, rank) for rank in range(comm.size)]
            combine = {"SUM": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum}
            expected = blocks[0]
            for block in blocks[1:]:
                expected = combine[op.name](expected, block)
            assert (recv == expected).all(), what
    return turns


def placed(shared, values):
    """Return ``values`` in shared memory, at its beginning."""
    array = shared[: values.nbytes].view(values.dtype)
    array[:] = values
    return array


TURNS = {2: 3000, 3: 2000, 5: 1200, 8: 800, 16: 300}


@pytest.mark.parametrize("size", TURNS)
def test_random_operations_give_the_right_values(size):
    seed = random.randrange(2**32)
    print("seed", seed)
    outcomes = run_ranks(random_operations, size, "shm", TURNS[size], seed, timeout=240.0)
    assert results_of(outcomes) == [TURNS[size]] * size


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5, 8, 16])
def test_twenty_thousand_random_operations_give_the_right_values(size):
    seed = random.randrange(2**32)
    print("seed", seed)
    outcomes = run_ranks(random_operations, size, "shm", 20_000, seed, timeout=1500.0)
    assert results_of(outcomes) == [20_000] * size
