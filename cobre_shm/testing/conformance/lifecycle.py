"""What a communicator is, from construction to ``close``."""

from __future__ import annotations

import copy
import os
import pickle
import time

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.errors import CollectiveFailed, InvalidCommunicator, RankFailed
from cobre_shm.testing.conformance.expect import (
    assert_every_collective_raises,
    assert_group_usable,
    expect_error,
)
from cobre_shm.testing.conformance.registry import conformance_check


@conformance_check()
def check_attributes_constant(comm: Communicator) -> None:
    """``rank``, ``size``, ``backend`` and ``is_leader`` say the same before and after use."""
    before = (comm.rank, comm.size, comm.backend, comm.is_leader)
    rank, size, backend, is_leader = before
    assert type(rank) is int, f"rank is a {type(rank).__name__}"
    assert type(size) is int, f"size is a {type(size).__name__}"
    assert type(backend) is str, f"backend is a {type(backend).__name__}"
    assert type(is_leader) is bool, f"is_leader is a {type(is_leader).__name__}"
    assert 0 <= rank < size, f"rank {rank} of {size}"
    assert backend, "backend has no name"
    ranks = comm.allgatherv(np.array([rank])).tolist()
    assert ranks == list(range(size)), f"the ranks are {ranks}"
    sizes = comm.allgatherv(np.array([size])).tolist()
    assert sizes == [size] * size, f"the sizes are {sizes}"
    after = (comm.rank, comm.size, comm.backend, comm.is_leader)
    assert after == before, f"{before} became {after}"


@conformance_check()
def check_is_communicator(comm: Communicator) -> None:
    """The object is a ``Communicator`` and shows its rank and size."""
    assert isinstance(comm, Communicator), f"{type(comm).__name__} is no Communicator"
    text = repr(comm)
    assert str(comm.rank) in text, f"{text} does not show rank {comm.rank}"
    assert str(comm.size) in text, f"{text} does not show size {comm.size}"


@conformance_check()
def check_copying_refused(comm: Communicator) -> None:
    """Neither a communicator nor a region can be copied or pickled: there is one for each rank."""
    with comm.create_shared_region(3) as region:
        for thing in (comm, region):
            for copied in (copy.copy, copy.deepcopy, pickle.dumps):
                name = f"{copied.__name__} of a {type(thing).__name__}"
                expect_error(TypeError, name, copied, thing)
    assert_group_usable(comm, "an attempt to copy it")


@conformance_check(fatal=True)
def check_close_every_collective_refused(comm: Communicator) -> None:
    """After ``close``, which may be called again, every collective raises InvalidCommunicator."""
    comm.barrier()
    comm.close()
    comm.close()
    assert_every_collective_raises(comm, InvalidCommunicator, "close")
    comm.close()


@conformance_check(fatal=True)
def check_with_statement_closes(comm: Communicator) -> None:
    """Leaving the ``with`` block closes the communicator."""
    with comm as entered:
        assert entered is comm, "the target of the with statement is another object"
        assert_group_usable(comm, "entering the with block")
    expect_error(InvalidCommunicator, "barrier behind the with block", comm.barrier)


@conformance_check(fatal=True)
def check_with_statement_passes_exception_on(comm: Communicator) -> None:
    """An exception closes the communicator and is not swallowed."""

    def leave_by_exception() -> None:
        with comm:
            comm.barrier()
            raise LookupError("of the program")

    error = expect_error(LookupError, "exception in a with block", leave_by_exception)
    assert error.args == ("of the program",), f"the exception became {error!r}"
    expect_error(InvalidCommunicator, "barrier behind the with block", comm.barrier)


@conformance_check(fatal=True, min_size=2)
def check_close_after_last_collective_harmless(comm: Communicator) -> None:
    """A rank may close as soon as its last collective returned, however slow its peers are."""
    for turn in range(comm.size):
        if comm.rank == turn:
            time.sleep(0.002)
        comm.barrier()
    result = comm.allgatherv(np.full(1000, comm.rank))
    comm.close()
    expected = np.repeat(np.arange(comm.size), 1000)
    assert (result == expected).all(), "the last allgatherv before close"


def _pids(comm: Communicator) -> list[int]:
    pids: list[int] = comm.allgatherv(np.array([os.getpid()])).tolist()
    return pids


def _assert_blamed(comm: Communicator, culprit: int, pid: int, deed: str) -> None:
    """Assert that the next collective raises RankFailed, which names the culprit."""
    failure = expect_error(RankFailed, f"rank {culprit} {deed}", comm.barrier)
    assert failure.rank == culprit, f"rank {failure.rank} is blamed, not {culprit}"
    assert failure.pid == pid, f"process {failure.pid} is blamed, not {pid}"
    assert_every_collective_raises(comm, CollectiveFailed, f"rank {culprit} {deed}")


@conformance_check(fatal=True, min_size=2, outlives_peers=True)
def check_close_before_last_collective_fails_peers(comm: Communicator) -> None:
    """When one rank has left, peers that need it raise RankFailed, which names it."""
    pids = _pids(comm)
    leaving = comm.size - 1
    if comm.rank == leaving:
        comm.close()
        assert_every_collective_raises(comm, InvalidCommunicator, "close")
    else:
        _assert_blamed(comm, leaving, pids[leaving], "left")
    comm.close()


@conformance_check(fatal=True, outlives_peers=True)
def check_abort_fails_all_ranks(comm: Communicator) -> None:
    """One rank that aborts ends its process; its waiting peers raise RankFailed, naming it."""
    pids = _pids(comm)
    aborting = comm.size - 1
    if comm.rank == aborting:
        error = expect_error(SystemExit, "abort", comm.abort, 7)
        assert error.code == 7, f"abort(7) ends the process with code {error.code}"
        if comm.size > 1:
            assert_every_collective_raises(comm, CollectiveFailed, "its abort")
    else:
        _assert_blamed(comm, aborting, pids[aborting], "aborted")
    comm.close()


@conformance_check()
def check_split_local_ranks(comm: Communicator) -> None:
    """The ranks of one node, in the order of the whole group; rank 0 of them is the leader."""
    node = comm.split_local()
    assert 1 <= node.size <= comm.size, f"{node.size} of {comm.size} ranks on this node"
    assert 0 <= node.rank < node.size, f"rank {node.rank} of {node.size}"
    assert comm.is_leader == (node.rank == 0), f"is_leader on local rank {node.rank}"
    members = node.allgatherv(np.array([comm.rank])).tolist()
    assert members == sorted(set(members)), f"the node holds ranks {members}"
    assert members[node.rank] == comm.rank, f"local rank {node.rank} of {members}"
    node.close()


@conformance_check()
def check_split_local_independent(comm: Communicator) -> None:
    """Operations on the group and on the node do not disturb each other, nor does closing."""
    node = comm.split_local()
    for turn in range(20):
        mine = node.allreduce(np.array([turn]))
        whole = comm.allreduce(np.array([turn]))
        assert mine.tolist() == [turn * node.size], f"sum over the node: {mine.tolist()}"
        assert whole.tolist() == [turn * comm.size], f"sum over the group: {whole.tolist()}"
    node.close()
    assert_group_usable(comm, "closing the communicator of the node")
    expect_error(InvalidCommunicator, "barrier on the closed node communicator", node.barrier)


@conformance_check()
def check_split_local_repeated(comm: Communicator) -> None:
    """Communicators can be split off and closed any number of times."""
    for turn in range(10):
        with comm.split_local() as node:
            buf = np.array([turn if node.rank == 0 else -1])
            node.broadcast(buf)
            assert buf.tolist() == [turn], f"split {turn}: {buf.tolist()}"
    assert_group_usable(comm, "ten splits")
