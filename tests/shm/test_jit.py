"""Collectives inside jitted functions: the same results, and the same errors at the boundary."""

import os
import signal
import time

import numba
import numpy as np
import pytest

from cobre_shm import jit, jit_support, layout
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    InvalidBufferSize,
    InvalidCommunicator,
    InvalidDatatype,
    InvalidRoot,
    RankFailed,
)
from cobre_shm.jit_support import JitSupport
from cobre_shm.local import LocalCommunicator
from cobre_shm.segment.recorder import last_entry
from tests.support.ranks import results_of, run_ranks


@numba.njit(cache=True)
def all_of_them(handle, turns, send, recv, buf, everything, counts, displs, op):
    for turn in range(turns):
        send[:] = turn + 1
        status = jit.allreduce(handle, send, recv, op)
        if status:
            return status
        buf[:] = turn
        status = jit.broadcast(handle, buf, turn % counts.size)
        if status:
            return status
        status = jit.allgatherv(handle, send, everything, counts, displs)
        if status:
            return status
        status = jit.barrier(handle)
        if status:
            return status
    return jit.OK


@numba.njit(cache=True)
def barriers(handle, turns):
    for _ in range(turns):
        status = jit.barrier(handle)
        if status:
            return status
    return jit.OK


@numba.njit(cache=True)
def reduce_once(handle, send, recv, op):
    return jit.allreduce(handle, send, recv, op)


def run_all_of_them(comm, length):
    counts = np.full(comm.size, length)
    displs = np.arange(comm.size) * length
    send, recv, buf = np.empty(length), np.empty(length), np.full(length, -1.0)
    everything = np.zeros(length * comm.size)
    args = (500, send, recv, buf, everything, counts, displs, jit.SUM)
    jit.check(comm, all_of_them(jit.handle(comm), *args))
    assert (recv == 500 * comm.size).all()
    assert (buf == 499).all()
    assert (everything == 500).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 6, 100, 20_000])
def test_jitted_collectives_give_the_values_of_the_methods(size, length):
    results_of(run_ranks(run_all_of_them, size, "shm", length))


@pytest.mark.parametrize("length", [100, 100_000])
def test_jitted_collectives_work_on_the_local_backend(length):
    with LocalCommunicator() as comm:
        run_all_of_them(comm, length)


def test_interrupted_collective_of_one_rank_can_be_followed_by_others(monkeypatch):
    real = JitSupport._take_over
    monkeypatch.setattr(JitSupport, "_take_over", _interrupt)
    with LocalCommunicator() as comm:
        handle, send = jit.handle(comm), np.ones(100_000)
        # So long a payload comes back unfinished, from time to time, to look for signals.
        with pytest.raises(Late):
            jit.check(comm, reduce_once(handle, send, np.zeros_like(send), jit.SUM))
        for length in (1, 10):
            recv = np.zeros(length)
            jit.check(comm, reduce_once(handle, np.full(length, 3.0), recv, jit.SUM))
            assert (recv == 3).all()
    monkeypatch.setattr(JitSupport, "_take_over", real)
    with LocalCommunicator() as comm:
        run_all_of_them(comm, 100_000)


class Late(Exception):
    pass


def _interrupt(*_):
    raise Late


def test_backend_that_jitted_code_cannot_call_says_so():
    results_of(run_ranks(without_a_handle, 2, "tcp"))


def without_a_handle(comm):
    with pytest.raises(InvalidCommunicator, match="tcp cannot be called inside jitted code"):
        jit.handle(comm)


def every_dtype(comm):
    handle = jit.handle(comm)
    for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "c8", "c16", "?"):
        send = (np.arange(7) % 3 + comm.rank).astype(code)
        for op in (jit.SUM, jit.PROD, jit.MIN, jit.MAX):
            recv = np.zeros(7, code)
            try:
                expected = comm.allreduce(send, None, ReduceOp(op))
            except InvalidDatatype:
                status = reduce_once(handle, send, recv, op)
                with pytest.raises(InvalidDatatype):
                    jit.check(comm, status)
                continue
            jit.check(comm, reduce_once(handle, send, recv, op))
            assert (recv == expected).all(), (code, op)


def test_every_dtype_and_operation_is_reduced_or_refused():
    results_of(run_ranks(every_dtype, 2))


def mistakes(comm):
    handle = jit.handle(comm)
    for status, kind in (
        (reduce_once(handle, np.zeros(2), np.zeros(3), jit.SUM), InvalidBufferSize),
        (broadcast_once(handle, np.zeros(2), comm.size), InvalidRoot),
        (
            gather_once(handle, np.zeros(2), np.zeros(2), np.array([2, 2]), np.array([0, 0])),
            InvalidBufferSize,
        ),
    ):
        with pytest.raises(kind) as caught:
            jit.check(comm, status)
        if kind is InvalidRoot:
            assert caught.value.root is None
            assert "the root given to jit.broadcast is not a rank" in caught.value.message
    comm.barrier()


@numba.njit(cache=True)
def broadcast_once(handle, buf, root):
    return jit.broadcast(handle, buf, root)


@numba.njit(cache=True)
def gather_once(handle, send, recv, counts, displs):
    return jit.allgatherv(handle, send, recv, counts, displs)


def test_local_mistake_is_a_status_and_leaves_the_group_usable():
    results_of(run_ranks(mistakes, 2))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda h: reduce_once(h, np.zeros((4, 4))[:, ::2], np.zeros((4, 2)), 0),
            "send must be a C-contiguous array",
        ),
        (
            lambda h: reduce_once(h, np.zeros(2), np.zeros(2, np.float32), 0),
            "recv is array.float32",
        ),
        (lambda h: broadcast_once(h, np.empty(2, object), 0), "pyobject"),
    ],
    ids=["not contiguous", "two dtypes", "objects"],
)
def test_buffers_that_cannot_be_are_refused_by_the_compiler(call, reason):
    with LocalCommunicator() as comm, pytest.raises(numba.TypingError, match=reason):
        call(jit.handle(comm))


@pytest.mark.parametrize(
    "call",
    [
        lambda h: barriers(h, 1),
        lambda h: reduce_once(h, np.zeros(2), np.zeros(2), jit.SUM),
        lambda h: broadcast_once(h, np.zeros(2), 0),
        lambda h: gather_once(h, np.zeros(1), np.zeros(1), np.ones(1, int), np.zeros(1, int)),
    ],
)
def test_code_that_was_compiled_with_another_version_is_refused(call):
    with LocalCommunicator() as comm:
        other = jit.handle(comm) ^ 1 << 60
        with pytest.raises(InvalidCommunicator, match="another version of cobre_shm"):
            jit.check(comm, call(other))


def test_closed_communicator_does_nothing_in_jitted_code():
    with LocalCommunicator() as comm:
        handle = jit.handle(comm)
        jit.check(comm, reduce_once(handle, np.ones(2), np.zeros(2), jit.SUM))
    recv = np.zeros(2)
    status = reduce_once(handle, np.ones(2), recv, jit.SUM)
    assert not recv.any()
    with pytest.raises(InvalidCommunicator, match="closed"):
        jit.check(comm, status)


def differing(comm):
    length = 5 + (comm.rank == 1)
    status = reduce_once(jit.handle(comm), np.zeros(length), np.zeros(length), jit.SUM)
    with pytest.raises(CollectiveMismatch, match="allreduce"):
        jit.check(comm, status)
    with pytest.raises(CollectiveMismatch):
        jit.check(comm, barriers(jit.handle(comm), 1))


def test_mismatch_is_raised_at_the_boundary_of_every_rank():
    results_of(run_ranks(differing, 3))


def dying(comm):
    if comm.rank == 1:
        barriers(jit.handle(comm), 100)
        os._exit(3)
    with pytest.raises(RankFailed) as raised:
        jit.check(comm, barriers(jit.handle(comm), 1_000_000_000))
    assert raised.value.rank == 1


def test_death_of_a_peer_ends_a_jitted_loop():
    outcomes = run_ranks(dying, 3)
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]


def waiting_for_nobody(comm):
    if comm.rank == 0:
        with pytest.raises(CollectiveTimeout):
            jit.check(comm, barriers(jit.handle(comm), 1))
    else:
        while not comm._segment.words.load(layout.HEADER_POISON):
            time.sleep(0.01)


def test_time_limit_holds_in_jitted_code():
    results_of(run_ranks(waiting_for_nobody, 2, collective_timeout=5.0))


def test_interrupt_while_a_kernel_is_prepared_comes_out_and_the_next_call_works(monkeypatch):
    def interrupt(dtype, op):
        raise KeyboardInterrupt

    with LocalCommunicator() as comm:
        handle, send, recv = jit.handle(comm), np.full(3, 2.0), np.zeros(3)
        with monkeypatch.context() as patch:
            patch.setattr(jit_support, "reduction_address", interrupt)
            with pytest.raises(KeyboardInterrupt):
                jit.check(comm, multiplied(handle, send, recv))
        jit.check(comm, multiplied(handle, send, recv))
        assert recv.tolist() == [2.0] * 3


@numba.njit
def multiplied(handle, send, recv):
    return jit.allreduce(handle, send, recv, jit.PROD)


def interrupted(comm):
    if comm.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    pids = comm.allgatherv(np.array([os.getpid()]))
    before = last_entry(comm._segment, comm.rank).sequence
    if comm.rank == 0:
        with pytest.raises(KeyboardInterrupt):
            jit.check(comm, barriers(jit.handle(comm), 1))
    else:
        # Not before it waits, and back only when it has left: it would end with our arrival.
        while last_entry(comm._segment, 0).sequence == before:
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGINT)
        while not comm._segment.words.load(layout.HEADER_POISON):
            time.sleep(0.01)
        with pytest.raises(RankFailed, match="interrupted"):
            comm.barrier()


def test_interrupt_ends_a_jitted_wait():
    results_of(run_ranks(interrupted, 2))


def closes(comm):
    handle = jit.handle(comm)
    jit.check(comm, barriers(handle, 3))
    comm.close()
    with pytest.raises(InvalidCommunicator):
        jit.check(comm, barriers(handle, 1))


def test_closed_communicator_is_refused():
    results_of(run_ranks(closes, 2))


def test_functions_outside_jitted_code_say_what_to_call():
    with pytest.raises(RuntimeError, match="communicator's method"):
        jit.allreduce(0, np.zeros(1), np.zeros(1), jit.SUM)


def test_failure_in_python_is_the_status_failed_and_is_raised_once(monkeypatch):
    def broken(dtype, op):
        raise OSError("no room for kernels")

    send, recv = np.full(3, 2.0), np.zeros(3)
    monkeypatch.setattr(jit_support, "reduction_address", broken)
    with LocalCommunicator() as comm:
        handle = jit.handle(comm)
        assert multiplied(handle, send, recv) == jit.FAILED
        with pytest.raises(OSError, match="no room for kernels"):
            jit.check(comm, jit.FAILED)
        # What was kept has been raised: for the same status nothing is left.
        with pytest.raises(ValueError, match="status 100 is of no jitted collective"):
            jit.check(comm, jit.FAILED)
    assert recv.tolist() == [0.0] * 3


@pytest.mark.parametrize("has_handle", [True, False])
def test_status_of_no_collective_is_a_mistake_of_the_caller(has_handle):
    with LocalCommunicator() as comm:
        if has_handle:
            jit.handle(comm)
        jit.check(comm, jit.OK)
        for status in (1, -1, jit.FAILED, 106):
            with pytest.raises(ValueError, match=f"status {status} is of no jitted collective"):
                jit.check(comm, status)


def read_only(array):
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h: reduce_once(h, np.ones(2), read_only(np.ones(2)), jit.SUM), "recv is read-only"),
        (lambda h: broadcast_once(h, read_only(np.ones(2)), 0), "buf is read-only"),
        (
            lambda h: gather_once(
                h, np.ones(1), read_only(np.ones(1)), np.ones(1, int), np.zeros(1, int)
            ),
            "recv is read-only",
        ),
        (
            lambda h: gather_once(
                h, np.ones(1), np.ones(1), np.ones(1, np.int32), np.zeros(1, int)
            ),
            "counts must be a vector of int64",
        ),
        (
            lambda h: gather_once(h, np.ones(1), np.ones(1), np.ones(1, int), np.zeros(1)),
            "displs must be a vector of int64",
        ),
        (
            lambda h: gather_once(
                h, np.ones(1), np.ones(1), np.ones((1, 1), int), np.zeros(1, int)
            ),
            "counts must be a vector of int64",
        ),
    ],
)
def test_compiler_says_what_is_wrong_with_an_argument(call, words):
    with LocalCommunicator() as comm, pytest.raises(numba.TypingError, match=words):
        call(jit.handle(comm))


def test_what_is_only_read_may_be_read_only():
    send = read_only(np.full(2, 3.0))
    with LocalCommunicator() as comm:
        recv, handle = np.zeros(2), jit.handle(comm)
        jit.check(comm, reduce_once(handle, send, recv, jit.SUM))
        assert recv.tolist() == [3.0, 3.0]
        counts, displs = read_only(np.array([2])), read_only(np.array([0]))
        jit.check(comm, gather_once(handle, send + 1, recv, counts, displs))
        assert recv.tolist() == [4.0, 4.0]


# Not cached: what stands beside this file would outlive a change of the rules.
@numba.njit
def gather_anew(handle, send, recv, counts, displs):
    return jit.allgatherv(handle, send, recv, counts, displs)


def told_apart(comm):
    """Each rule that buffers must keep, broken alone, by both ranks."""
    handle, two = jit.handle(comm), np.zeros(2)
    negative = [2, -1] if comm.rank == 0 else [-1, 2]
    sizes, layouts = "buffers of equal and sufficient size", "blocks in rank order inside recv"

    def gathered(counts, displs, length=4):
        return gather_anew(handle, two, np.zeros(length), np.array(counts), np.array(displs))

    for status, code, words in (
        (multiplied(handle, two, np.zeros(3)), jit.WRONG_SIZE, sizes),
        (multiplied(handle, np.zeros(0), np.zeros(0)), jit.WRONG_SIZE, sizes),
        (gathered([2], [0, 2]), jit.WRONG_SIZE, sizes),
        (gathered([2, 2], [0]), jit.WRONG_SIZE, sizes),
        (gathered([1, 1], [0, 2]), jit.WRONG_SIZE, sizes),
        (gathered([2, 2], [0, 1]), jit.WRONG_LAYOUT, layouts),
        (gathered([2, 2], [2, 0]), jit.WRONG_LAYOUT, layouts),
        (gathered([2, 2], [-1, 2]), jit.WRONG_LAYOUT, layouts),
        (gathered([2, 2], [0, 2], length=3), jit.WRONG_LAYOUT, layouts),
        (gathered(negative, [0, 2]), jit.WRONG_LAYOUT, layouts),
    ):
        assert status == code
        with pytest.raises(InvalidBufferSize) as caught:
            jit.check(comm, status)
        assert words in caught.value.message
    # None of them was begun, so the peers agree on the next.
    jit.check(comm, gathered([2, 2], [0, 2]))
    jit.check(comm, gathered([2, 2], [1, 4], length=6))


def test_wrong_size_is_told_from_wrong_layout():
    results_of(run_ranks(told_apart, 2))


def called_from_python(comm):
    """A barrier has no types to choose by, and so is the one that Python can call."""
    handle, one = jit.handle(comm), np.ones(1)
    jit.check(comm, jit.barrier(handle))
    assert jit.barrier(handle ^ 1 << 60) == jit.WRONG_BUILD
    calls = {
        "allreduce": lambda: jit.allreduce(handle, one, one.copy(), jit.SUM),
        "broadcast": lambda: jit.broadcast(handle, one, 0),
        "allgatherv": lambda: jit.allgatherv(
            handle, one, one.copy(), np.ones(1, int), np.zeros(1, int)
        ),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"jit.{name} is for jitted code"):
            call()
    # Refused before a peer was involved.
    comm.barrier()


def test_barrier_alone_can_be_called_from_python():
    results_of(run_ranks(called_from_python, 2))
