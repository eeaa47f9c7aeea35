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
    begun = time.monotonic()
    with pytest.raises(RankFailed) as raised:
        jit.check(comm, barriers(jit.handle(comm), 1_000_000_000))
    assert raised.value.rank == 1
    return time.monotonic() - begun


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
