"""The assertions of the checks: plain ``assert`` with the rank and the element in the message."""

from __future__ import annotations

import hashlib
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cobre_shm.communicator import Array, Communicator
from cobre_shm.testing.conformance.payloads import native

__all__ = [
    "Delays",
    "assert_every_collective_raises",
    "assert_group_usable",
    "assert_refused",
    "assert_same_bytes",
    "assert_same_everywhere",
    "assert_same_numbers",
    "expect_error",
    "memory_of",
]

ErrorT = TypeVar("ErrorT", bound=BaseException)


# In one of so many calls Python may enlarge a table of its own, that of interned strings say.
_MEASURED_CALLS = 3


def memory_of(call: Callable[[], object]) -> int:
    """Return how many bytes a call allocates at most at one time; of several calls the least."""
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    found = []
    for _ in range(_MEASURED_CALLS):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        call()
        found.append(tracemalloc.get_traced_memory()[1] - before)
    if not was_tracing:
        tracemalloc.stop()
    return min(found)


class Delays:
    """Short random pauses, another sequence on every rank."""

    def __init__(self, comm: Communicator, *, seed: int, share: float = 0.05) -> None:
        self._random = random.Random(seed * 1000 + comm.rank)
        self._share = share

    def maybe_sleep(self) -> None:
        """Sleep for up to a quarter of a millisecond, in the given share of the calls."""
        if self._random.random() < self._share:
            time.sleep(self._random.random() * 2.5e-4)


def expect_error(
    kind: type[ErrorT], what: str, call: Callable[..., object], *args: Any, **kwargs: Any
) -> ErrorT:
    """Assert that ``call`` with these arguments raises ``kind``; return the exception."""
    try:
        call(*args, **kwargs)
    except kind as error:
        return error
    except Exception as error:
        raise AssertionError(
            f"{what}: expected {kind.__name__}, got {type(error).__name__}: {error}"
        ) from error
    raise AssertionError(f"{what}: expected {kind.__name__}, but nothing was raised")


def assert_group_usable(comm: Communicator, what: str) -> None:
    """Assert that the next collective works."""
    result = comm.allreduce(np.array([comm.rank + 1, 1], np.int64))
    expected = [comm.size * (comm.size + 1) // 2, comm.size]
    assert result.tolist() == expected, (
        f"after {what}: rank {comm.rank} got {result.tolist()} from an allreduce, "
        f"expected {expected}"
    )


def assert_refused(
    comm: Communicator,
    kind: type[BaseException],
    what: str,
    call: Callable[..., object],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Assert that this mistaken call is found locally and leaves the group usable.

    Once every rank makes it, then each rank alone, while its peers go on to the next collective.
    """
    expect_error(kind, f"rank {comm.rank}: {what}", call, *args, **kwargs)
    assert_group_usable(comm, what)
    for culprit in range(comm.size):
        if comm.rank == culprit:
            expect_error(kind, f"rank {comm.rank} alone: {what}", call, *args, **kwargs)
        assert_group_usable(comm, f"{what} on rank {culprit}")


def assert_every_collective_raises(
    comm: Communicator, kind: type[BaseException], state: str
) -> None:
    """Assert that each collective raises ``kind``; ``state`` says why it should."""
    what = f"rank {comm.rank} after {state}"
    block = np.zeros(2)
    counts = [2] * comm.size
    expect_error(kind, f"{what}: allgatherv", comm.allgatherv, block, None, counts)
    expect_error(kind, f"{what}: allgatherv without counts", comm.allgatherv, block)
    room = np.zeros(sum(counts))
    # Either may raise: a plan that is made now, or its first call.
    expect_error(kind, f"{what}: plan", lambda: comm.allgatherv_init(block, room, counts)())
    expect_error(kind, f"{what}: allreduce", comm.allreduce, block)
    expect_error(kind, f"{what}: allreduce_shared", comm.allreduce_shared, block)
    expect_error(kind, f"{what}: broadcast", comm.broadcast, block)
    expect_error(kind, f"{what}: barrier", comm.barrier)
    expect_error(kind, f"{what}: create_shared_region", comm.create_shared_region, 4)
    expect_error(kind, f"{what}: empty", comm.empty, 4)
    expect_error(kind, f"{what}: zeros", comm.zeros, 4)
    expect_error(kind, f"{what}: full", comm.full, 4, 1.0)
    expect_error(kind, f"{what}: split_local", comm.split_local)


def assert_same_bytes(actual: Array, expected: Array, what: str) -> None:
    """Assert equal dtype, size and bytes, padding included."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.size == expected.size, f"{what}: {actual.size} elements, not {expected.size}"
    if _bytes_of(actual).tobytes() == _bytes_of(expected).tobytes():
        return
    wrong = np.flatnonzero((_bytes_of(actual) != _bytes_of(expected)).any(axis=1))
    first = int(wrong[0])
    raise AssertionError(
        f"{what}: {wrong.size} of {actual.size} elements of {actual.dtype} differ; "
        f"element {first} has bytes {_bytes_of(actual)[first].tobytes()[:32].hex()}, "
        f"expected {_bytes_of(expected)[first].tobytes()[:32].hex()}"
    )


def assert_same_numbers(
    actual: Array, expected: Array, what: str, *, sign_of_zero: bool = True
) -> None:
    """Assert equal dtype, size and bits of every number; a NaN is a NaN.

    Two things are not compared, because no arithmetic defines them: sign and payload of a NaN
    and, where ``sign_of_zero`` is False, the sign of a zero. The bits that a long double only
    pads are left out as well.
    """
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.size == expected.size, f"{what}: {actual.size} elements, not {expected.size}"
    if actual.tobytes() == expected.tobytes():
        return
    left, right = _components(actual), _components(expected)
    wrong = (_significant(left) != _significant(right)).any(axis=1)
    if left.dtype.kind == "f":
        wrong &= ~(np.isnan(left) & np.isnan(right))
        if not sign_of_zero:
            wrong &= ~((left == 0) & (right == 0))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {left.size} numbers of {actual.dtype} differ; "
            f"number {first} is {left[first]!r}, expected {right[first]!r}"
        )


def assert_same_everywhere(comm: Communicator, what: str, *arrays: Array) -> None:
    """Assert that every rank holds the same bytes in ``arrays``."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        # The padding of a long double belongs to no number, so it may differ.
        exact = _significant(_components(array)) if array.dtype.kind in "fc" else _bytes_of(array)
        digest.update(exact.tobytes())
    mine = np.frombuffer(digest.digest(), np.uint64)
    everyone = comm.allgatherv(mine, np.zeros(comm.size, np.uint64), [1] * comm.size)
    different = [rank for rank in range(comm.size) if everyone[rank] != everyone[0]]
    assert not different, f"{what}: ranks {different} hold other bits than rank 0"


def _bytes_of(array: Array) -> NDArray[np.uint8]:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, flat.dtype.itemsize)


def _components(array: Array) -> Array:
    flat = np.ascontiguousarray(array).reshape(-1).astype(native(array.dtype), copy=False)
    if flat.dtype.kind != "c":
        return flat
    parts: Array = np.stack([flat.real, flat.imag], axis=1).reshape(-1)
    return parts


def _significant(array: Array) -> NDArray[np.uint8]:
    # The 80-bit format of x86: 10 bytes of number in 12 or 16 bytes of memory.
    is_padded = array.dtype.kind == "f" and np.finfo(array.dtype).nmant == 63
    return _bytes_of(array)[:, :10] if is_padded else _bytes_of(array)
