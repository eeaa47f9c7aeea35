"""What is this backend's alone: levels, nodes, errors, MPI's own reduction, forks."""

import contextlib
import errno
import io
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from mpi4py import MPI

from cobre_net.mpi import ending, grouping, membership
from cobre_net.mpi.flat import native_operation
from cobre_shm import InitializationFailed, MpiConfig, ReduceOp, create_communicator
from cobre_shm.communicator import Communicator
from cobre_shm.errors import CollectiveFailed, InvalidCommunicator, RankFailed
from cobre_shm.segment.segment import Segment
from cobre_shm.shm import ShmCommunicator
from cobre_shm.testing.conformance.expect import expect_error
from tests.mpi.programs.checks import BLOCKS, RANK, SIZE, WORLD, in_rank_order, make, run_checks


def recorded(module, name, results):
    """Have all that a function of ``module`` returns appended to ``results``."""
    function = getattr(module, name)

    def record(*args):
        results.append(function(*args))
        return results[-1]

    return mock.patch.object(module, name, record)


def check_levels_give_the_same_bits():
    ways = {
        "flat: so configured": {"hierarchical": False},
        "one node": {},
        "2 nodes": {"node": 2 * RANK // SIZE},
        "3 nodes": {"node": (RANK + 1) // 2},
        "flat: the ranks are not placed node by node": {"node": RANK % 2},
        "flat: every rank is alone on its node": {"node": RANK},
    }
    expected = in_rank_order(BLOCKS)
    assert (in_rank_order(BLOCKS[::-1]) != expected).any()
    for levels, settings in ways.items():
        with make(**settings) as comm:
            assert comm.levels == levels, comm.levels
            counts = [3 * rank for rank in range(SIZE)]
            gathered = comm.allgatherv(BLOCKS[RANK][: counts[RANK]], None, counts)
            parts = [block[:count] for block, count in zip(BLOCKS, counts, strict=True)]
            assert gathered.tobytes() == np.concatenate(parts).tobytes(), levels
            for root in range(SIZE):
                buf = BLOCKS[root][:99].copy() if root == RANK else np.zeros(99)
                assert comm.broadcast(buf, root).tobytes() == BLOCKS[root][:99].tobytes(), levels
            for count in (1, 700, 300_000):
                for op in (ReduceOp.SUM, ReduceOp.MAX):
                    total = comm.allreduce(BLOCKS[RANK][:count], op=op)
                    if op is ReduceOp.SUM:
                        assert total.tobytes() == expected[:count].tobytes(), (levels, count)
                    else:
                        assert (total == np.max([b[:count] for b in BLOCKS], axis=0)).all()


def check_levels_that_are_impossible_are_refused_when_demanded():
    copies, nodes = [], []
    with (
        recorded(membership, "duplicate", copies),
        recorded(grouping, "find_nodes", nodes),
    ):
        error = expect_error(
            InitializationFailed, "round robin", make, hierarchical=True, node=RANK % 2
        )
    assert "not placed node by node" in error.message
    # They are few: MPICH has room for two thousand.
    assert [*copies, *(each.comm for each in nodes)] == [MPI.COMM_NULL] * 3


def check_any_communicator_of_mpi4py():
    """The program's own messages never meet ours; ranks are those of its communicator."""
    backwards = WORLD.Split(0, -RANK)
    pending = backwards.Ibcast(np.array([RANK]), SIZE - 1)
    with make(comm=backwards, hierarchical=False) as comm:
        assert comm.rank == SIZE - 1 - RANK
        ranks = comm.allgatherv(np.array([RANK]))
        assert ranks.tolist() == list(range(SIZE))[::-1]
    pending.Wait()
    half = WORLD.Split(RANK % 2, RANK)
    with make(comm=half) as comm:
        assert comm.size == half.Get_size()
        assert comm.allreduce(np.array([1]))[0] == comm.size
    half.Free()
    backwards.Free()


def check_what_is_no_communicator_is_refused():
    between = WORLD.Split(RANK % 2, RANK).Create_intercomm(0, WORLD, (RANK + 1) % 2)
    for comm, found in [
        (between, "it is Intercomm"),
        (WORLD.Split(MPI.UNDEFINED), "it is MPI.COMM_NULL"),
        ("MPI.COMM_WORLD", "it is str"),
    ]:
        error = expect_error(InitializationFailed, found, make, comm=comm)
        assert f"is not an intracommunicator of mpi4py: {found}" in error.message
    between.Free()


def check_errors_come_back_whatever_the_program_wants_of_its_own():
    fatal = WORLD.Dup()
    fatal.Set_errhandler(MPI.ERRORS_ARE_FATAL)
    with make(comm=fatal, hierarchical=False) as comm:
        assert comm._comm.Get_errhandler() == MPI.ERRORS_RETURN
    fatal.Free()


def check_one_node_does_all_that_shm_does():
    """Shared arrays and plans too, not only what MPI has."""
    with make() as comm:
        own = ("abort", "close")
        public = {name for name in vars(Communicator) if not name.startswith("_")}
        for name in public.difference(own):
            theirs = getattr(ShmCommunicator, name)
            if callable(theirs) and theirs is not getattr(Communicator, name):
                assert getattr(comm, name).__self__ is comm._group, name
        send, total = comm.full(5, 1.0), comm.zeros(5)
        plan = comm.allreduce_init(send, total)
        assert plan() is total
        assert total.tolist() == [SIZE] * 5
        once = comm.allreduce_shared(send)
        assert once.tolist() == [SIZE] * 5
        assert not once.flags.writeable
    expect_error(InvalidCommunicator, "closed", plan)


def check_groups_of_the_nodes_take_their_settings():
    with tempfile.TemporaryDirectory() as folder:
        tuning = Path(folder, "tuning.json")
        tuning.write_text(json.dumps({"spin_pauses": 7}))
        with make(hugepages="never", numa_interleave=True, tuning=str(tuning)) as comm:
            taken = comm._group._config
            assert (taken.hugepages, taken.numa_interleave) == ("never", True)
            assert taken.tuning == str(tuning)
            assert comm.allreduce(np.ones(3)).tolist() == [SIZE] * 3


def check_rank_that_cannot_join_its_node_is_told_to_all():
    """Its peers would wait for it in the segment, for ever."""
    refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    for node in (None, 2 * RANK // SIZE):
        with contextlib.ExitStack() as stack:
            if RANK == 1:
                stack.enter_context(mock.patch.object(Segment, "inherit", side_effect=refused))
            comm = make(node=node)
        with comm:
            assert comm.levels.startswith("flat: a node could not form a group: "), comm.levels
            assert os.strerror(errno.EMFILE) in comm.levels
            assert comm.allreduce(np.ones(3)).tolist() == [SIZE] * 3
    with tempfile.TemporaryDirectory() as folder:
        tuning = Path(folder, "tuning.json")
        tuning.write_text("{}")
        config = MpiConfig(tuning=str(tuning))
        if RANK == 1:
            tuning.unlink()
        with create_communicator(config) as comm:
            assert str(tuning) in comm.levels or RANK != 1, comm.levels
            assert comm.levels.startswith("flat: a node could not form a group: "), comm.levels
    # A job may end as long as it likes after that.
    assert not ending._left


def check_abort_tells_the_node_before_mpi_ends_the_job():
    """They see who aborted, and with what code, and not only a death."""

    def stay(code):
        assert code == 7

    end, ending.abort = ending.abort, stay
    comm = make(hierarchical=True)
    if RANK == 1:
        assert expect_error(SystemExit, "abort", comm.abort, 7).code == 7
    else:
        error = expect_error(RankFailed, "abort", comm.barrier)
        assert error.rank == 1
        assert "called abort(7)" in error.message, error.message
    comm.close()
    ending.abort = end


def check_uncaught_exception_tells_the_node_before_mpi_ends_the_job():
    end, ending.abort = ending.abort, lambda _: None
    comm = make(hierarchical=True)
    if RANK == 1:
        error = LookupError("of rank 1")
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            sys.excepthook(LookupError, error, None)
        assert "LookupError: of rank 1" in printed.getvalue()
    else:
        error = expect_error(RankFailed, "exception", comm.barrier)
        assert "raised an exception" in error.message, error.message
        assert "LookupError: of rank 1" in error.context["traceback"]
    comm.close()
    ending.abort = end


def check_mismatch_within_a_node_is_of_the_whole_group():
    """The ranks of one node differ: they hear of it with their ranks, and all is lost for them."""
    comm = make(node=2 * RANK // SIZE)
    if RANK < SIZE // 2:
        call = comm.barrier if RANK else partial(comm.allreduce, np.ones(3, "i8"))
        error = expect_error(CollectiveFailed, "of one node", call)
        assert "Within the node of ranks 0 to" in str(error), error
        again = expect_error(CollectiveFailed, "lost", comm.barrier)
        assert str(again) == str(error)
    WORLD.Barrier()
    comm.close()


def check_errors_come_back_from_all_that_is_ours():
    with make(node=2 * RANK // SIZE) as comm:
        ours = [comm._comm, comm._ending, comm._grouping.node, comm._grouping._leaders]
        for found in ours:
            assert found is None or found.Get_errhandler() == MPI.ERRORS_RETURN, found


def check_reduction_of_mpi():
    assert native_operation(np.dtype("f8"), ReduceOp.SUM, deterministic=True) is None
    assert native_operation(np.dtype("f8"), ReduceOp.MAX, deterministic=False) is None
    assert native_operation(np.dtype("i8"), ReduceOp.MAX, deterministic=True) is not None
    with make(deterministic=False) as comm:
        assert comm.levels == "flat: MPI's own reduction was asked for"
        for count in (1, 700, 300_000):
            exact = np.sum([np.abs(block[:count]) for block in BLOCKS], axis=0)
            again = np.array(BLOCKS[RANK][:count])
            # Intel MPI gives other bits for the same operands from one call to the next.
            for total in comm.allreduce(BLOCKS[RANK][:count]), comm.allreduce(again, again):
                error = np.abs(total - in_rank_order(BLOCKS)[:count])
                assert (error <= 1e-14 * SIZE * exact).all()


def check_forked_child_is_no_rank():
    with make() as comm:
        child = os.fork()
        if child == 0:
            try:
                comm.barrier()
            except InvalidCommunicator:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        comm.barrier()


run_checks(globals())
