"""The road past mpi4py: what it takes, refuses and tells; large messages in pieces."""

import numpy as np
from mpi4py import MPI

from cobre_net.mpi import communicator, fast
from cobre_shm import ReduceOp
from cobre_shm.errors import CollectiveFailed, CommError, InvalidCommunicator
from cobre_shm.kernels import mpi_words
from cobre_shm.testing.conformance.expect import expect_error
from tests.mpi.programs.checks import BLOCKS, RANK, SIZE, in_rank_order, make, run_checks


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


run_checks(globals())
