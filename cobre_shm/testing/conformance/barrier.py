"""``barrier``: nobody returns before everybody has entered."""

from __future__ import annotations

import socket
import time

import numpy as np

from cobre_shm.communicator import Communicator
from cobre_shm.testing.conformance.expect import Delays
from cobre_shm.testing.conformance.registry import conformance_check


def _ranks_of_this_clock(comm: Communicator) -> list[int]:
    """Return the ranks whose monotonic clock is this one's: those on the same machine."""
    name = np.zeros(64, np.uint8)
    text = socket.gethostname().encode()[:64]
    name[: len(text)] = np.frombuffer(text, np.uint8)
    names = comm.allgatherv(name).reshape(comm.size, 64)
    return [rank for rank in range(comm.size) if (names[rank] == name).all()]


@conformance_check()
def check_barrier_returns_after_all_entered(comm: Communicator) -> None:
    """No rank leaves before the last one came, whoever is late; by the method and by a plan."""
    peers = _ranks_of_this_clock(comm)
    ways = (comm.barrier, comm.barrier_init())
    delays = Delays(comm, seed=5, share=0.5)
    for turn in range(20 * comm.size):
        if turn % comm.size == comm.rank:
            time.sleep(0.001)
        delays.maybe_sleep()
        entered = time.monotonic_ns()
        # Each rank is late to both ways.
        ways[turn // comm.size % 2]()
        left = time.monotonic_ns()
        times = comm.allgatherv(np.array([entered, left])).reshape(comm.size, 2)[peers]
        last, first = int(times[:, 0].max()), int(times[:, 1].min())
        assert first >= last, f"barrier {turn}: a rank left {last - first} ns before another came"


@conformance_check()
def check_barrier_many_in_a_row(comm: Communicator) -> None:
    """Barriers follow each other without anything between them."""
    for _ in range(2000):
        comm.barrier()
