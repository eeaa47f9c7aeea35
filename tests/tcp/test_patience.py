"""Who waits, for how long, and what counts as a sign of life."""

import errno
import signal
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cobre_net.tcp import TcpCommunicator, link, wire
from cobre_net.tcp.call import Call
from cobre_net.tcp.joining import join
from cobre_net.tcp.patience import Patience
from cobre_net.tcp.reception import gather
from cobre_net.tcp.wire import HEAD_BYTES, RESULT, SEND, frame
from cobre_shm.datatypes import dtype_tag
from cobre_shm.errors import CollectiveTimeout, RankFailed
from cobre_shm.layout import ALLREDUCE, BARRIER, BROADCAST
from cobre_shm.selection.kinds import TcpConfig
from tests.support.backends import BACKENDS, free_port
from tests.support.processes import appear
from tests.support.ranks import RankGroup, results_of

SECRET = "the secret of this test"
TAG = dtype_tag(np.dtype("f8"))


def config(rank, size, port, **settings):
    return TcpConfig(
        "127.0.0.1", rank, size, port=port, secret=SECRET, **{"timeout_secs": 20, **settings}
    )


def come_one_after_the_other(comm, seconds, elements):
    """Each rank comes a while after the one before; the last one later than the limit allows."""
    comm.barrier()
    time.sleep(seconds * comm.rank)
    return comm.allreduce(np.ones(elements))[-1]


@pytest.mark.parametrize("elements", [1, 300_000])
def test_limit_runs_only_while_nobody_comes(elements):
    # A busy machine may be 4 s late for each, and nobody waits for less than 7 s in all.
    group = BACKENDS["tcp"].make_group(5, 6.0)
    with RankGroup(group, come_one_after_the_other, (1.8, elements)) as ranks:
        assert results_of(ranks.outcomes(90)) == [5.0] * 5


def send_slowly(sock, data, seconds):
    """Send ``data`` in ten pieces over so many seconds."""
    step = -(-len(data) // 10)
    for place in range(0, len(data), step):
        sock.sendall(data[place : place + step])
        time.sleep(seconds / 10)


def test_rank_that_waits_is_told_that_another_one_only_is_slow():
    """Rank 1 has sent its part; rank 2 takes longer for its own than the limit, in small pieces."""
    port, elements = free_port(), 12_000
    call = Call(ALLREDUCE, 0, 0, TAG, elements)
    with ThreadPoolExecutor(3) as pool:
        ranks = [
            pool.submit(TcpCommunicator, config(rank, 3, port, timeout_secs=2.0)) for rank in (0, 1)
        ]
        slow = join(config(2, 3, port), SECRET.encode(), 0.1)
        comms = [rank.result(20) for rank in ranks]
        sums = [pool.submit(comm.allreduce, np.ones(elements)) for comm in comms]
        part = call.head(SEND, 1, 8 * elements) + np.ones(elements).tobytes()
        send_slowly(slow.sock, part, 2.5)
        for each in sums:
            assert (each.result(20) == 3).all()
        slow.close()
        for comm in comms:
            comm.close()


def test_heartbeats_do_not_keep_a_rank_from_sending():
    """The coordinator's buffers are full, and it says that it is there."""
    call = Call(ALLREDUCE, 0, 0, TAG, 4000)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as pool:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        port = listener.getsockname()[1]
        worker = pool.submit(TcpCommunicator, config(1, 2, port))
        at = config(0, 2, port, bind_addr=f"fd:{listener.fileno()}")
        (centre,) = gather(at, SECRET.encode(), 1.0)
        comm = worker.result(20)
        comm._star.links[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        total = pool.submit(comm.allreduce, np.ones(4000))
        time.sleep(0.3)
        beat = frame(wire.HEARTBEAT)
        centre.sock.sendall(beat + beat[:2])
        time.sleep(0.3)
        part = bytearray(HEAD_BYTES + 32_000)
        place = 0
        while place < len(part):
            place += centre.take(memoryview(part)[place:])
        centre.sock.sendall(beat[2:] + call.head(RESULT, 1, 32_000) + part[HEAD_BYTES:])
        assert (total.result(10) == 1).all()
        centre.close()
        comm.close()


@pytest.mark.parametrize("elements", [1, 1_000_000])
def test_heartbeats_keep_a_rank_waiting_and_probes_do_not(elements):
    """Over the limit by heartbeats, and then not again by probes."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as pool:
        port = listener.getsockname()[1]
        worker = pool.submit(TcpCommunicator, config(1, 2, port, timeout_secs=3.0))
        at = config(0, 2, port, bind_addr=f"fd:{listener.fileno()}")
        (centre,) = gather(at, SECRET.encode(), 1.0)
        comm = worker.result(20)
        total = pool.submit(comm.allreduce, np.ones(elements))
        for _ in range(17):
            time.sleep(0.2)
            centre.heartbeat()
        assert not total.done()
        deadline = time.monotonic() + 60
        while not total.done() and time.monotonic() < deadline:
            centre.probe()
            time.sleep(0.2)
        error = total.exception(0)
        assert type(error) is CollectiveTimeout
        assert error.missing_ranks == [0]
        centre.close()
        comm.close()


@pytest.mark.parametrize("elements", [1000, 100_000])
@pytest.mark.parametrize("sent", [0, 3, 30, 5000])
def test_rank_that_stops_in_its_part_is_named(sent, elements):
    port = free_port()
    call = Call(ALLREDUCE, 0, 0, TAG, elements)
    with ThreadPoolExecutor(1) as pool:
        coordinator = pool.submit(TcpCommunicator, config(0, 2, port, timeout_secs=0.5))
        raw = join(config(1, 2, port), SECRET.encode(), 0.1)
        comm = coordinator.result(20)
        raw.sock.sendall((call.head(SEND, 1, 8 * elements) + bytes(8 * elements))[:sent])
        with pytest.raises(CollectiveTimeout) as caught:
            comm.allreduce(np.ones(elements))
        assert caught.value.missing_ranks == [1]
        assert "rank 1 (pid" in str(caught.value)
        raw.close()
        comm.close()


def test_unknown_tag_is_refused_before_a_whole_head_has_come():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        coordinator = pool.submit(TcpCommunicator, config(0, 2, port))
        raw = join(config(1, 2, port), SECRET.encode(), 0.1)
        comm = coordinator.result(20)
        raw.sock.sendall(struct.pack(">IB", 1, 17))
        with pytest.raises(RankFailed, match="no part of the protocol"):
            comm.barrier()
        raw.close()
        comm.close()


def test_rank_that_stands_still_before_a_large_result_is_not_taken_for_a_dead_host(monkeypatch):
    """It has called and then does not read for long, as one that was stopped."""
    port, elements = free_port(), 100_000
    call = Call(BROADCAST, 0, 0, TAG, elements)
    with ThreadPoolExecutor(1) as pool:
        coordinator = pool.submit(TcpCommunicator, config(0, 2, port))
        raw = join(config(1, 2, port), SECRET.encode(), 0.1)
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        comm = coordinator.result(20)
        monkeypatch.setattr(link, "_USER_TIMEOUT_MS", 1000)
        raw.sock.sendall(call.head(SEND, 1, 0))
        # All of it is with the kernel when this returns.
        comm.broadcast(np.ones(elements))
        waiting = pool.submit(comm.barrier)
        time.sleep(3.0)
        assert not waiting.done()
        raw.sock.sendall(Call(BARRIER).head(SEND, 2, 0))
        waiting.result(20)
        raw.close()
        comm.close()


class Full:
    """A stream whose disk is full."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        pass


def test_line_that_names_a_late_rank_and_cannot_be_written_is_no_failure(monkeypatch):
    patience = Patience(0, 20.0, 0.0, str)
    monkeypatch.setattr(sys, "stderr", Full())
    time.sleep(0.01)
    patience.look([1], "barrier")


def wait_under_a_timer(comm, waiting, elements, waited):
    """Call what never comes whole, while a timer interrupts every system call, as a profiler."""
    comm.barrier()
    if comm.rank != waiting:
        assert appear([waited])
        return
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(CollectiveTimeout):
            comm.allreduce(np.ones(elements))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    waited.touch()


@pytest.mark.parametrize("waiting", [0, 1])
@pytest.mark.parametrize("elements", [1, 300_000])
def test_limit_runs_while_a_timer_interrupts(waiting, elements, tmp_path):
    group = BACKENDS["tcp"].make_group(2, 1.0)
    with RankGroup(group, wait_under_a_timer, (waiting, elements, tmp_path / "waited")) as ranks:
        results_of(ranks.outcomes(60))
