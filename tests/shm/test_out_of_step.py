"""Ranks that are out of step by an exception on one of them: all are told, and none goes on."""

import json
import secrets
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from cobre_shm import layout
from cobre_shm.errors import CollectiveMismatch, InvalidBufferSize, InvalidCommunicator, RankFailed
from cobre_shm.kernels import context
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator, collectives, membership
from tests.support.processes import appear
from tests.support.ranks import results_of, run_ranks


class Late(Exception):
    pass


def reduce_and_be_interrupted(comm, moment, at):
    """Rank 0 is interrupted at a moment of block ``at`` of three, and calls again."""
    send = np.ones(5 * comm.slot_bytes // 4, np.float16)
    reduce, run, blocks = collectives.reduce_with_numpy, comm._run, []

    def interrupt(*words):
        blocks.append(words)
        if len(blocks) == at:
            raise Late
        return reduce(*words)

    def run_and_interrupt(*words):
        run(*words)
        interrupt(*words[-2:])

    if comm.rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            if moment == "behind the exchange":
                reduce = _nothing
                patch.setattr(comm, "_run", run_and_interrupt)
            else:
                patch.setattr(collectives, "reduce_with_numpy", interrupt)
            with pytest.raises(Late):
                comm.allreduce(send)
    try:
        return comm.allreduce(send).max()
    except RankFailed as error:
        return error.rank


def _nothing(*_):
    pass


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("moment", ["behind the exchange", "in the reduction"])
def test_reduction_that_is_left_between_two_blocks_fails_the_group(moment, at):
    assert results_of(run_ranks(reduce_and_be_interrupted, 2, "shm", moment, at)) == [0, 0]


def interrupt_between(comm, method, at):
    """Rank 0 is interrupted behind the first collective of a call that has several."""
    frozen = comm.create_shared_region(100)
    calls = {
        "allgatherv": lambda: comm.allgatherv(np.ones(3)),
        "array": lambda: comm.empty(3),
        "frozen region": frozen.freeze,
        "region": lambda: comm.create_shared_region(100),
        "split": comm.split_local,
        "shared result": lambda: comm.allreduce_shared(np.ones(100_000)),
    }
    run, done = comm._run, []

    def run_and_interrupt(*words):
        run(*words)
        done.append(words)
        if len(done) == at:
            raise Late

    if comm.rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comm, "_run", run_and_interrupt)
            # The fences of a region are plans, which take the fast road.
            fence = collectives.BARRIER, 0, layout.FREEZE, 0, 0
            patch.setattr(frozen, "_freeze", lambda: run_and_interrupt(*fence))
            with pytest.raises(Late):
                calls[method]()
    with pytest.raises(RankFailed, match="interrupted") as caught:
        calls[method]()
    return caught.value.rank


_SEVERAL = ["allgatherv", "array", "frozen region", "region", "split", "shared result"]


@pytest.mark.parametrize("method", _SEVERAL)
def test_call_that_is_left_between_two_collectives_fails_the_group(method):
    assert results_of(run_ranks(interrupt_between, 2, "shm", method, 1)) == [0, 0]


def be_left(comm):
    with pytest.raises(RankFailed, match="closed its communicator") as caught:
        comm.barrier()
    return caught.value.rank


def close_and_be_interrupted(comm, place):
    if comm.rank == 1:
        return be_left(comm)
    with pytest.MonkeyPatch.context() as patch:
        if place == "claim":
            patch.setattr(membership, "CLAIM", _LateKernel(membership.CLAIM))
        else:
            patch.setattr(comm, "_give_back", _raise_late)
        with pytest.raises(Late):
            comm.close()
    comm.close()
    with pytest.raises(InvalidCommunicator, match="closed"):
        comm.barrier()
    return 0


class _LateKernel:
    """A kernel behind whose return, before anybody knows what it returned, a signal comes."""

    def __init__(self, kernel):
        self._kernel = kernel

    def call(self, *args):
        self._kernel.call(*args)
        raise Late


def _raise_late():
    raise Late


@pytest.mark.parametrize("place", ["claim", "give back"])
def test_interrupted_close_can_be_repeated_and_is_told(place):
    assert results_of(run_ranks(close_and_be_interrupted, 2, "shm", place)) == [0, 0]


def close_while_it_closes(comm, place):
    """A handler, or another thread, closes the communicator while it is being closed."""
    if comm.rank == 1:
        return be_left(comm)
    with pytest.MonkeyPatch.context() as patch:
        if place == "handler":
            patch.setattr(comm, "_give_back", lambda: (patch.undo(), comm.close()))
        else:
            patch.setattr(membership, "CLAIM", _Meanwhile(membership.CLAIM, comm.close))
        comm.close()
    with pytest.raises(InvalidCommunicator, match="closed"):
        comm.barrier()
    return 0


class _Meanwhile:
    """A kernel behind whose first return another thread calls something, which is refused."""

    def __init__(self, kernel, function):
        self._kernel, self._function = kernel, function

    def call(self, *args):
        status = self._kernel.call(*args)
        if self._function is not None:
            function, self._function = self._function, None
            with ThreadPoolExecutor(1) as pool, pytest.raises(InvalidCommunicator, match="thread"):
                pool.submit(function).result()
        return status


@pytest.mark.parametrize("place", ["handler", "thread"])
def test_communicator_is_closed_once(place):
    assert results_of(run_ranks(close_while_it_closes, 2, "shm", place)) == [0, 0]


def test_close_of_what_has_not_joined_is_nothing():
    ShmCommunicator.__new__(ShmCommunicator).close()


def raise_an_error_of_ours(comm):
    """A handler raises an error of ours where those that a rank alone sees are looked for."""
    if comm.rank == 0:
        comm.allgatherv = _raise_ours
        with pytest.raises(InvalidCommunicator, match="a handler's"):
            comm._gather_after_counts(np.ones(3), None, None)
        del comm.allgatherv
    with pytest.raises(RankFailed, match="interrupted") as caught:
        comm.allgatherv(np.ones(3))
    return caught.value.rank


def _raise_ours(*_):
    raise InvalidCommunicator("a handler's")


def test_error_that_is_none_of_the_call_is_not_taken_for_a_mistake_in_it():
    assert results_of(run_ranks(raise_an_error_of_ours, 2, "shm")) == [0, 0]


def forget_a_refused_call(comm):
    recv = np.empty(0)
    kept = weakref.ref(recv)
    with suppress(InvalidBufferSize):
        comm.allgatherv(np.ones(3), recv)
    del recv
    return kept() is None


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_call_that_is_refused_behind_the_counts_keeps_nothing(backend):
    assert results_of(run_ranks(forget_a_refused_call, 2, backend)) == [True, True]


def fail_with_an_array(comm):
    send = np.ones(3)
    kept = weakref.ref(send)
    if comm.rank == 1:
        comm.close()
        return True
    with suppress(RankFailed):
        _reduce_in_trouble(comm, send)
    del send
    with pytest.raises(RankFailed) as caught:
        comm.barrier()
    return kept() is None and caught.value.__context__ is None


def _reduce_in_trouble(comm, send):
    try:
        raise KeyError
    except KeyError:
        comm.allreduce(send)


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_group_that_failed_keeps_nothing_of_the_call(backend):
    assert results_of(run_ranks(fail_with_an_array, 2, backend)) == [True, True]


def be_refused_and_interrupted(comm, refused):
    """A thread that is refused, for another is inside, is interrupted before it knows."""
    if comm.rank == 0:
        assert appear([refused])
        return comm.barrier()
    other = threading.Thread(target=comm.barrier)
    other.start()
    deadline = time.monotonic() + 30
    while not comm._context[context.BUSY] and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "BARRIER", _LateKernel(collectives.BARRIER))
        with pytest.raises(Late):
            comm._barrier(0)
    refused.touch()
    other.join()
    return comm.barrier()


def test_refused_thread_that_is_interrupted_fails_nobody(tmp_path):
    results_of(run_ranks(be_refused_twice, 2, "shm", tmp_path / "refused"))


def be_refused_twice(comm, refused):
    be_refused_and_interrupted(comm, refused)
    if comm.rank == 0:
        comm.barrier()
    return comm.allreduce(np.ones(1))[0]


def abort_without_a_code(comm):
    for code in ("no luck", None, 1.0):
        with pytest.raises(TypeError):
            comm.abort(code)
    return comm.allreduce(np.ones(1))[0]


def test_refused_code_of_abort_leaves_the_group_as_it_is():
    assert results_of(run_ranks(abort_without_a_code, 2, "shm")) == [2, 2]


def reduce_and_forget(comm):
    send = np.ones(100_000)
    comm.allreduce_shared(send)
    if comm.rank == 0:
        # As an exception between making a result and keeping it would.
        comm._results.clear()
    with pytest.raises(CollectiveMismatch, match="a new result"):
        comm.allreduce_shared(send)


def test_new_result_is_another_call_than_the_reduction():
    results_of(run_ranks(reduce_and_forget, 2, "shm"))


def test_no_tuning_lets_a_rank_spin_without_looking(tmp_path):
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"spin_pauses": 1 << 40}))
    name = f"/cobre-test-{secrets.token_hex(8)}"
    with ShmCommunicator(ShmConfig(name=name, rank=0, size=1, tuning=str(file))) as comm:
        state = comm._context
        assert state[context.SPIN_LIMIT] <= state[context.SPIN_LIMIT_MAX] < 1 << 20
