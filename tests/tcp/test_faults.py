"""Connections that break, peers that do not keep to the protocol, and buffers that are full."""

import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cobre_net.tcp import TcpCommunicator, wire
from cobre_net.tcp.call import Call
from cobre_net.tcp.joining import join
from cobre_net.tcp.wire import HEAD, HEAD_BYTES, SEND, frame
from cobre_shm.datatypes import dtype_tag
from cobre_shm.errors import CollectiveFailed, CollectiveMismatch, RankFailed
from cobre_shm.layout import ALLREDUCE, BARRIER
from cobre_shm.selection.kinds import TcpConfig
from tests.support.backends import BACKENDS, COLLECTIVE_TIMEOUT_SECS, free_port
from tests.support.ranks import RankGroup, results_of, run_ranks

SECRET = "the secret of this test"
TAG = dtype_tag(np.dtype("f8"))
SMALL = Call(ALLREDUCE, 0, 0, TAG, 1000)
LARGE = Call(ALLREDUCE, 0, 0, TAG, 1_000_000)


@pytest.fixture(params=[2, 3], ids=["alone", "with a bystander"])
def besieged(request):
    """A coordinator, a raw connection that is rank 1, and perhaps an honest rank 2."""
    size, port = request.param, free_port()

    def config(rank):
        return TcpConfig("127.0.0.1", rank, size, port=port, secret=SECRET, timeout_secs=20)

    with ThreadPoolExecutor(3) as pool:
        future = pool.submit(TcpCommunicator, config(0))
        honest = pool.submit(TcpCommunicator, config(2)) if size > 2 else None
        link = join(config(1), SECRET.encode(), 0.1)
        link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 20, 0))
        comm = future.result(20)
        peer = honest.result(20) if honest else None
        # It calls what rank 0 is going to call.
        call = request.node.callspec.params.get("call", SMALL)
        waiting = pool.submit(failure_of, peer, call.elements) if peer else None
        yield comm, link.sock
        link.sock.close()
        # The bystander must learn of whatever the rank did, from the coordinator.
        failure_of(comm)
        if waiting is not None:
            assert isinstance(waiting.result(20), CollectiveFailed)
            peer.close()
        comm.close()


def failure_of(comm, elements=1000):
    """Call an allreduce that cannot succeed; return its error."""
    try:
        comm.allreduce(np.ones(elements))
    except CollectiveFailed as error:
        return error
    return None


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


END = {"fin": socket.socket.close, "rst": reset}


@pytest.mark.parametrize("end", END.values(), ids=END)
@pytest.mark.parametrize(
    ("call", "sent"),
    [(SMALL, 0), (SMALL, 3), (SMALL, 30), (SMALL, 500), (LARGE, 20), (LARGE, 700_000)],
)
def test_connection_that_ends_in_mid_frame_is_a_dead_rank(besieged, end, call, sent):
    comm, sock = besieged
    payload = call.elements * 8
    data = call.head(SEND, 1, min(payload, wire.FRAME_BYTES)) + bytes(payload)
    sock.sendall(data[:sent])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(failure_of, comm, call.elements)
        time.sleep(0.1)
        end(sock)
        error = waiting.result(20)
    # Who only gave up waiting would blame the time limit.
    assert type(error) is RankFailed
    assert error.rank == 1
    assert error.pid == os.getpid()
    assert error.context["host"] == socket.gethostname()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0" * 100, RankFailed),
        (b"\xff" * 100, RankFailed),
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(100), RankFailed),
        (struct.pack(">IB", 2**32 - 1, SEND | ALLREDUCE) + bytes(100), RankFailed),
        (struct.pack(">IB", 0, SEND | ALLREDUCE) + bytes(100), RankFailed),
        (struct.pack(">IB", 2**31, wire.ABORT) + bytes(100), RankFailed),
        (frame(wire.HELLO, bytes(26)) + bytes(100), RankFailed),
        (SMALL.head(SEND, 2, 8000) + bytes(8000), RankFailed),
        (SMALL.head(SEND, 1, 7999) + bytes(7999), RankFailed),
        (SMALL.head(wire.RESULT, 1, 8000) + bytes(8000), RankFailed),
        (Call(BARRIER).head(SEND, 1, 0), CollectiveMismatch),
        (Call(9).head(SEND, 1, 0), CollectiveMismatch),
        (LARGE.head(SEND, 1, wire.FRAME_BYTES) + bytes(wire.FRAME_BYTES), CollectiveMismatch),
    ],
)
def test_rank_that_does_not_keep_to_the_protocol_fails_the_group(besieged, data, kind):
    comm, sock = besieged
    sender = threading.Thread(target=send_what_is_taken, args=(sock, data))
    sender.start()
    error = failure_of(comm)
    sender.join()
    assert type(error) is kind
    if kind is RankFailed:
        assert error.rank == 1
        assert "no part of the protocol" in str(error)
    else:
        assert error.calls[0] == "allreduce(1000 x float64, SUM)"


def send_what_is_taken(sock, data):
    try:
        sock.sendall(data)
    except OSError:
        # The coordinator has heard enough.
        return


def test_worker_notices_a_coordinator_that_does_not_keep_to_the_protocol():
    """Roles exchanged: a raw coordinator, an honest worker."""
    from cobre_net.tcp.reception import gather

    results = {
        "noise": b"\xff" * 100,
        "other sequence": SMALL.head(wire.RESULT, 2, 8000) + bytes(8000),
        "too long": SMALL.head(wire.RESULT, 1, 8008) + bytes(8008),
        "other call": LARGE.head(wire.RESULT, 1, 8000) + bytes(8000),
        "a part": SMALL.head(SEND, 1, 8000) + bytes(8000),
    }
    for what, data in results.items():
        port = free_port()
        with ThreadPoolExecutor(2) as pool:
            settings = {"port": port, "secret": SECRET, "timeout_secs": 20}
            worker = pool.submit(TcpCommunicator, TcpConfig("127.0.0.1", 1, 2, **settings))
            (link,) = gather(TcpConfig("127.0.0.1", 0, 2, **settings), SECRET.encode(), 1.0)
            comm = worker.result(20)
            waiting = pool.submit(failure_of, comm)
            deadline = time.monotonic() + 20
            while link.take(memoryview(bytearray(HEAD_BYTES + 8000))) == 0:
                assert time.monotonic() < deadline
            link.sock.sendall(data)
            error = waiting.result(20)
            assert type(error) is RankFailed, what
            assert error.rank == 0
            link.close()
            comm.close()


def test_head_is_what_the_picture_says():
    head = Call(2, 1, 3, 4, 5).head(SEND, 6, 100, 7)
    assert len(head) == HEAD_BYTES == 41
    assert HEAD.unpack(head) == (137, SEND | 2, 6, 1 | 3 << 32, 4, 5, 7)


def squeeze(comm):
    """Make the send buffers as small as the kernel lets them be."""
    for link in comm._star.links:
        link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def move_much_through_little(comm, nbytes):
    squeeze(comm)
    count = nbytes // 8 // comm.size
    mine = np.full(count, float(comm.rank))
    gathered = comm.allgatherv(mine)
    for rank in range(comm.size):
        assert (gathered[rank * count : (rank + 1) * count] == rank).all()
    total = comm.allreduce(np.full(count, comm.rank + 1.0))
    assert (total == comm.size * (comm.size + 1) / 2).all()
    for root in range(comm.size):
        data = np.full(count, float(root) if comm.rank == root else -1.0)
        comm.broadcast(data, root)
        assert (data == root).all()
    # The short road also meets full buffers.
    for turn in range(50):
        small = comm.allreduce(np.full(4000, float(turn)))
        assert (small == turn * comm.size).all()


@pytest.mark.parametrize("size", [2, 4])
def test_full_buffers_in_both_directions_are_no_deadlock(size):
    results_of(run_ranks(move_much_through_little, size, "tcp", 8 << 20, timeout=360.0))


@pytest.mark.slow
def test_a_gibibyte_through_four_kibibytes_is_no_deadlock():
    results_of(run_ranks(move_much_through_little, 2, "tcp", 1 << 30, timeout=840.0))


def uneven_parts(comm):
    """One rank contributes nearly all, while the others wait with nothing or little."""
    for heavy in range(comm.size):
        counts = [400_000 if rank == heavy else rank % 2 for rank in range(comm.size)]
        mine = np.full(counts[comm.rank], comm.rank * 1.0)
        gathered = comm.allgatherv(mine, None, counts)
        assert gathered.tolist() == np.repeat(np.arange(comm.size) * 1.0, counts).tolist()


def test_uneven_parts_flow():
    results_of(run_ranks(uneven_parts, 4, "tcp"))


def interrupted_in_the_middle(comm, culprit):
    """A signal handler raises while much is on its way."""
    comm.barrier()
    if comm.rank == culprit:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        while True:
            comm.allreduce(np.ones(2_000_000))
    except KeyboardInterrupt:
        return "interrupted"
    except CollectiveFailed as error:
        return error


@pytest.mark.parametrize("culprit", [0, 1])
def test_interrupt_in_the_middle_of_a_large_payload_blames_the_right_rank(culprit):
    outcomes = run_ranks(interrupted_in_the_middle, 3, "tcp", culprit)
    for outcome in outcomes:
        if outcome.rank == culprit:
            assert outcome.result == "interrupted"
        else:
            assert type(outcome.result) is RankFailed
            assert outcome.result.rank == culprit, str(outcome.result)


def warn_of_late(comm, late, go):
    """Another group, whose patience is short; one rank comes when ``go`` exists."""
    from tests.support.backends import free_port as port_of

    port = np.array([port_of()])
    comm.broadcast(port)
    config = TcpConfig("127.0.0.1", comm.rank, comm.size, port=int(port[0]), secret=SECRET)
    with TcpCommunicator(config) as impatient:
        impatient.barrier()
        # Only now: ranks may come together slowly.
        impatient._star._stall_warn = 2.0
        while comm.rank == late and not go.exists():
            time.sleep(0.01)
        impatient.barrier()


@pytest.mark.parametrize("late", [0, 2])
def test_late_rank_is_named_once_by_one_rank(late, tmp_path):
    go = tmp_path / "go"
    connects = BACKENDS["tcp"].make_group(3, COLLECTIVE_TIMEOUT_SECS)
    with RankGroup(connects, warn_of_late, (late, go)) as group:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(map(group.output, range(3))):
            time.sleep(0.01)
        # For another rank to say it too.
        time.sleep(1.0)
        go.touch()
        outcomes = group.outcomes(90)
    results_of(outcomes)
    lines = [line for outcome in outcomes for line in outcome.output.splitlines()]
    assert len(lines) == 1, lines
    assert f"rank {late} (pid {outcomes[late].pid} on" in lines[0]
    assert "barrier" in lines[0]
