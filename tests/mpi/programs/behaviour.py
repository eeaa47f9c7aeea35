"""What is this backend's alone: levels, order, windows, pieces, MPI's own reduction, forks."""

import contextlib
import errno
import gc
import io
import json
import os
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from mpi4py import MPI

from cobre_net.mpi import MpiRegion, communicator, ending, fast, grouping, membership, region
from cobre_net.mpi.flat import native_operation
from cobre_shm import InitializationFailed, MpiConfig, ReduceOp, create_communicator
from cobre_shm.communicator import Communicator
from cobre_shm.errors import CollectiveFailed, CommError, InvalidCommunicator, RankFailed
from cobre_shm.kernels import mpi_words
from cobre_shm.segment.segment import Segment
from cobre_shm.shm import ShmCommunicator
from cobre_shm.testing.conformance.expect import expect_error

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.Get_rank(), WORLD.Get_size()
rng = np.random.default_rng(7)
BLOCKS = [rng.normal(size=300_000) * 10.0 ** rng.integers(-9, 9, 300_000) for _ in range(SIZE)]


def make(**settings):
    return create_communicator(MpiConfig(**settings))


def recorded(module, name, results):
    """Have all that a function of ``module`` returns appended to ``results``."""
    function = getattr(module, name)

    def record(*args):
        results.append(function(*args))
        return results[-1]

    return mock.patch.object(module, name, record)


def in_rank_order(blocks):
    total = blocks[0].copy()
    for block in blocks[1:]:
        total += block
    return total


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


def check_communicators_are_given_back():
    """MPICH has 2,048 of them; each of ours takes several."""
    for turn in range(150):
        with make(hierarchical=turn % 10 == 0) as comm:
            comm.split_local().close()


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


def check_ranks_may_differ_in_what_is_in_place():
    """MPI wants MPI_IN_PLACE of all ranks or of none; the libraries look at their own argument."""
    for hierarchical in (False, True):
        with make(hierarchical=hierarchical) as comm:
            for count in (1, 1000, 200_000):
                expected = np.concatenate([block[:count] for block in BLOCKS])
                for _ in range(3):
                    recv = np.full(SIZE * count, -1.0)
                    send = BLOCKS[RANK][:count]
                    if RANK % 2:
                        recv[RANK * count : (RANK + 1) * count] = send
                        send = recv[RANK * count : (RANK + 1) * count]
                    comm.allgatherv(send, recv, [count] * SIZE)
                    assert recv.tobytes() == expected.tobytes(), count
                    # Without order, so that MPI reduces.
                    send = np.arange(count) * RANK
                    recv = send if RANK % 2 else np.empty_like(send)
                    comm.allreduce(send, recv, ReduceOp.MAX)
                    assert (recv == np.arange(count) * (SIZE - 1)).all(), count


def check_large_messages_go_in_pieces():
    with make(hierarchical=False) as comm:
        # The Python methods: the fast road took its limits at construction.
        comm._context = communicator._closed
        flat = comm._flat
        flat.piece_bytes, flat.reduce_bytes, flat.small_bytes = 1000, 3000, 16
        counts = [101 + 17 * rank for rank in range(SIZE)]
        gaps = [3 + sum(counts[:rank]) + rank for rank in range(SIZE)]
        expected = np.full(gaps[-1] + counts[-1], -1.0)
        for rank in range(SIZE):
            expected[gaps[rank] : gaps[rank] + counts[rank]] = BLOCKS[rank][: counts[rank]]
        recv = np.full(expected.size, -1.0)
        comm.allgatherv(BLOCKS[RANK][: counts[RANK]], recv, counts, gaps)
        assert recv.tobytes() == expected.tobytes()
        # Displacements may be large where the data is not, and on some ranks only.
        far = [5 * gap if RANK == 0 else gap for gap in gaps]
        flat.piece_bytes = 8 * sum(counts)
        wide = np.zeros(far[-1] + counts[-1])
        comm.allgatherv(BLOCKS[RANK][: counts[RANK]], wide, counts, far)
        for rank in range(SIZE):
            block = wide[far[rank] : far[rank] + counts[rank]]
            assert block.tobytes() == BLOCKS[rank][: counts[rank]].tobytes()
        flat.piece_bytes = 1000
        buf = BLOCKS[1][:777].copy() if RANK == 1 else np.zeros(777)
        assert comm.broadcast(buf, 1).tobytes() == BLOCKS[1][:777].tobytes()
        total = comm.allreduce(BLOCKS[RANK][:5001])
        assert total.tobytes() == in_rank_order(BLOCKS)[:5001].tobytes()


def check_fast_road_takes_what_the_methods_take():
    """The first call of a kind takes the Python method, the second the road: same results."""
    counts, displs = [rank + 1 for rank in range(SIZE)], [4 * rank for rank in range(SIZE)]
    expected = np.full(4 * SIZE, -1.0)
    for rank in range(SIZE):
        expected[4 * rank : 4 * rank + rank + 1] = BLOCKS[rank][: rank + 1]
    own = BLOCKS[RANK][: RANK + 1]
    layouts = [(counts, displs), (np.array(counts), displs), (tuple(counts), np.array(displs))]
    with make(hierarchical=False) as comm:
        for _ in range(2):
            for layout in layouts:
                recv = np.full(4 * SIZE, -1.0)
                assert comm.allgatherv(own, recv, *layout) is recv
                assert recv.tobytes() == expected.tobytes()
            # In place, on all ranks, and packed.
            recv = np.full(4 * SIZE, -1.0)
            recv[4 * RANK : 4 * RANK + RANK + 1] = own
            comm.allgatherv(recv[4 * RANK : 4 * RANK + RANK + 1], recv, counts, displs)
            assert recv.tobytes() == expected.tobytes()
            packed = np.empty(sum(counts))
            comm.allgatherv(own, packed, counts)
            assert packed.tobytes() == expected[expected != -1].tobytes()
            for count in (1, 5000):
                total = in_rank_order(BLOCKS)[:count]
                send = BLOCKS[RANK][:count].reshape(1, -1).copy()
                assert comm.allreduce(send).tobytes() == total.tobytes()
                assert comm.allreduce(send, op=ReduceOp.SUM).shape == send.shape
                assert comm.allreduce(send, send, ReduceOp.SUM) is send
                assert send.tobytes() == total.tobytes()
                biggest = comm.allreduce(np.array([RANK, -RANK]), None, ReduceOp.MAX)
                assert biggest.tolist() == [SIZE - 1, 0]
            for root in range(SIZE):
                buf = np.array([(root, 0.5)] if root == RANK else [(0, 0)], "i4,f8")
                assert comm.broadcast(buf, root=root) is buf
                assert buf.tolist() == [(root, 0.5)]


def check_fast_road_refuses_what_the_methods_refuse():
    with make(hierarchical=False) as comm:
        one, both = np.ones(1), np.ones(SIZE)
        ones, displs = [1] * SIZE, list(range(SIZE))
        comm.allgatherv(one, both, ones, displs)
        comm.allreduce(one, one.copy(), ReduceOp.SUM)
        comm.broadcast(one)
        fixed, area = np.ones(4), np.ones(9)
        fixed.flags.writeable = False
        wrong = [
            lambda: comm.allgatherv(one, both, [1.0] * SIZE, displs),
            lambda: comm.allgatherv(one, both, ones, [-1, *displs[1:]]),
            lambda: comm.allgatherv(one, both, [2**70, *ones[1:]], displs),
            lambda: comm.allgatherv(one, both, ones[1:], displs),
            lambda: comm.allgatherv(one, both[1:], ones, displs),
            lambda: comm.allgatherv(one, fixed, ones, displs),
            lambda: comm.allgatherv(np.ones(2), both, ones, displs),
            lambda: comm.allgatherv(one.astype("f4"), both, ones, displs),
            lambda: comm.allreduce(area[:4], area[2:6]),
            lambda: comm.allreduce(fixed, fixed),
            lambda: comm.allreduce(area[::2], np.ones(5)),
            lambda: comm.allreduce(one, np.ones(2)),
            lambda: comm.allreduce(one[:0], one[:0]),
            lambda: comm.broadcast(np.ones((3, 3)).T),
            lambda: comm.broadcast(one, SIZE),
            lambda: comm.broadcast(one, -1),
            lambda: comm.broadcast(one, True),
            lambda: comm.broadcast(np.array([None])),
            lambda: comm.barrier(1),
            lambda: comm.broadcast(one, 0, 0),
            lambda: comm.allreduce(one, nonsense=one),
        ]
        for call in wrong:
            try:
                call()
            except (CommError, TypeError):
                continue
            raise AssertionError(call)
        assert comm.allreduce(one)[0] == SIZE
    for call in (comm.barrier, lambda: comm.allreduce(one), lambda: comm.broadcast(one)):
        expect_error(InvalidCommunicator, "closed", call)


def check_failure_on_the_fast_road_is_the_end():
    """An error of MPI is mapped, with class and code, and the communicator is lost."""
    comm = make(comm=MPI.COMM_SELF, hierarchical=False)
    comm.barrier()
    for theirs in (MPI.COMM_WORLD, MPI.COMM_SELF):
        # An error of no communicator is one of these.
        theirs.Set_errhandler(MPI.ERRORS_RETURN)
    comm._context[mpi_words.COMM] = fast._handle(MPI.COMM_NULL)
    error = expect_error(CollectiveFailed, "of the library", comm.barrier)
    assert error.context["mpi_error_class_name"] == "ERR_COMM", error.context
    assert error.context["mpi_error_code"] > 0
    again = expect_error(CollectiveFailed, "lost", comm.barrier)
    assert (type(again), str(again)) == (type(error), str(error))
    comm._flat.comm.Free()


def window_count():
    return sum(len(windows) for _, found in region._windows for windows in found)


def check_windows_of_two_communicators_in_two_threads():
    """Neither sees those of the other, which its peers may have in another order."""
    first, second = make(hierarchical=False), make(hierarchical=False)
    order = [first, second] if first.rank % 2 else [second, first]
    threads = [threading.Thread(target=make_regions, args=(comm,)) for comm in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for comm in order:
        comm.close()
    with make(hierarchical=False):
        assert window_count() == 0


def make_regions(comm):
    for turn in range(40):
        with comm.create_shared_region(100) as shared:
            shared.fill_slice(comm.rank, np.array([turn]))
            shared.fence()
            assert (shared.array[: comm.size] == turn).all()
            shared.fence()


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


def check_windows_of_dropped_communicators_are_given_back():
    with make(hierarchical=False) as comm:
        dropped = comm.split_local()
        dropped.create_shared_region(10).close()
        del dropped
        gc.collect()
        with comm.split_local():
            assert window_count() == 0


def check_blocks_left_by_exceptions_cost_no_communicators():
    """MPICH has two thousand."""
    for _ in range(2100):
        with contextlib.suppress(ZeroDivisionError), make(hierarchical=False):
            raise ZeroDivisionError


def check_windows_are_given_back():
    with make(hierarchical=False) as comm:
        for turn in range(30):
            shared = comm.create_shared_region(1000)
            assert isinstance(shared, MpiRegion)
            assert not shared.array.any()
            shared.fence()
            shared.array[comm.rank] = turn
            if turn % 2:
                shared.close()
            del shared
        held = comm.create_shared_region(5, "i4").array
        assert window_count() == 1
    with make(hierarchical=False):
        assert window_count() == 1
    held[0] = 1
    del held
    with make(hierarchical=False):
        assert window_count() == 0


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


for name, check in list(globals().items()):
    if name.startswith("check_"):
        check()
        WORLD.Barrier()
if RANK == 0:
    print("done")
