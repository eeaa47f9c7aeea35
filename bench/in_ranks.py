"""What the gates of the collectives compare, measured inside one launch: ``test_collectives.py``.

    python -m cobre_shm.spawn -n 2 bench/in_ranks.py OUT [--payloads 65536] [--rounds 9]

Every rank runs it; rank 0 writes a JSON object to OUT. Each quantity has a list of microseconds,
one for each round; all are measured in each round, one after the other, so that ratios are made of
neighbours. The traps are those of ``bench/collectives.py``: sources are written, destinations
touched, and send buffers changed before each call from 64 KiB on, before the copies that they are
compared with too. Shared arrays come in rounds of their own, after the others: once a communicator
has any, large collectives on private buffers begin by asking who uses them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from collectives import bind_to_core
from machine import volley

from cobre_shm import Communicator, create_communicator, jit

ROUNDS = 9
SMALL_CALLS = 4000
SMALL_CALLS_ON_SHARED_CORES = 400
PAYLOADS = (64 << 10, 1 << 20, 16 << 20)
COPIED_BYTES = 32 << 20
WAIT_SECS = 1.0
_LINE_BYTES = 128


# Not cached: numba would keep what it has taken in of other files when they change.
@numba.njit
def barriers(handle: int, turns: int) -> int:
    for _ in range(turns):
        status = jit.barrier(handle)
        if status:
            return status
    return jit.OK


@numba.njit
def reductions(handle: int, send: Any, recv: Any, turns: int) -> int:
    for _ in range(turns):
        status = jit.allreduce(handle, send, recv, jit.SUM)
        if status:
            return status
    return jit.OK


@numba.njit
def dispatched(number: int) -> int:
    """Do nothing, as what the numba dispatcher calls."""
    return number


@numba.njit
def dispatched_arrays(send: Any, recv: Any, op: int) -> int:
    return op


def bare() -> None:
    """Do nothing, as the interpreter calls it."""


def per_turn(call: Callable[..., Any], args: tuple[Any, ...], turns: int) -> float:
    begun = time.perf_counter()
    for _ in range(turns):
        call(*args)
    return (time.perf_counter() - begun) / turns * 1e6


class Quantities:
    """All that is measured on one communicator."""

    def __init__(self, comm: Communicator, payloads: list[int]) -> None:
        self._payloads = payloads
        self._comm, self._handle = comm, jit.handle(comm)
        self._region = comm.create_shared_region(4 * _LINE_BYTES // 8, np.int64)
        self._one, self._result = np.ones(1), np.zeros(1)
        self._shared: dict[int, Any] = {}
        self._turns = SMALL_CALLS
        if comm.size > len(os.sched_getaffinity(0)):
            self._turns = SMALL_CALLS_ON_SHARED_CORES
        self._small = self._small_ones()
        # Compiled, or loaded, before anything is timed.
        for measure in self._small.values():
            measure()

    def _small_ones(self) -> dict[str, Callable[[], float]]:
        comm, handle, turns = self._comm, self._handle, self._turns
        one, result = self._one, self._result
        small = {
            "bare": lambda: per_turn(bare, (), turns),
            "dispatched": lambda: per_turn(dispatched, (1,), turns),
            "dispatched_arrays": lambda: per_turn(dispatched_arrays, (one, result, 0), turns),
            "barrier": lambda: per_turn(comm.barrier, (), turns),
            "allreduce_8": lambda: per_turn(comm.allreduce, (one, result), turns),
            "jit_barrier": lambda: self._jitted(barriers, handle, turns),
            "jit_allreduce_8": lambda: self._jitted(reductions, handle, one, result, turns),
        }
        if comm.size == 2:
            small["ping_pong"] = self._ping_pong
        return small

    def _ping_pong(self) -> float:
        words = self._region.array
        words[:] = 0
        self._comm.barrier()
        base = words.ctypes.data
        lines = [base + _LINE_BYTES * rank for rank in (self._comm.rank, 1 - self._comm.rank)]
        begun = time.perf_counter()
        volley(*lines, self._comm.rank == 0, self._turns)
        found = (time.perf_counter() - begun) / self._turns * 1e6
        self._comm.barrier()
        return found

    def _jitted(self, loop: Callable[..., int], *args: Any) -> float:
        begun = time.perf_counter()
        status = loop(*args)
        found = (time.perf_counter() - begun) / args[-1] * 1e6
        jit.check(self._comm, status)
        return found

    def private_round(self) -> dict[str, float]:
        """Measure small calls, and large ones on private buffers, once."""
        found = {}
        for name, measure in self._small.items():
            self._comm.barrier()
            found[name] = measure()
        for nbytes in self._payloads:
            send, recv = self._filled(np.empty(nbytes // 8)), self._filled(np.empty(nbytes // 8))
            copy, allreduce = (
                partial(np.copyto, recv, send),
                partial(self._comm.allreduce, send, recv),
            )
            found[f"copy_{nbytes}"] = self._large(send, copy)
            found[f"allreduce_{nbytes}"] = self._large(send, allreduce)
        return found

    def shared_round(self) -> dict[str, float]:
        """Measure the shared result, and a copy beside it, once."""
        found = {}
        for nbytes in self._payloads:
            if nbytes not in self._shared:
                self._shared[nbytes] = self._filled(self._comm.empty(nbytes // 8))
            send, recv = self._filled(np.empty(nbytes // 8)), self._filled(np.empty(nbytes // 8))
            shared = self._shared[nbytes]
            copy, allreduce = (
                partial(np.copyto, recv, send),
                partial(self._comm.allreduce_shared, shared),
            )
            found[f"copy_beside_shared_{nbytes}"] = self._large(send, copy)
            found[f"allreduce_shared_{nbytes}"] = self._large(shared, allreduce)
        return found

    def _filled(self, array: Any) -> Any:
        array[:] = self._comm.rank + 1.5
        return array

    def _large(self, changed: Any, call: Callable[[], Any]) -> float:
        turns = max(2, COPIED_BYTES // changed.nbytes // max(1, self._comm.size // 2))
        change = partial(np.multiply, changed, 1.0000001, out=changed)
        self._together(change, call, 2)
        whole = self._together(change, call, turns)
        # Noise may make it negative, which is no time of a call: then nobody knows.
        found = whole - self._together(change, bare, turns)
        return found if found > 0 else math.nan

    def _together(self, change: Callable[[], Any], call: Callable[[], Any], turns: int) -> float:
        self._comm.barrier()
        begun = time.perf_counter()
        for _ in range(turns):
            change()
            call()
        self._comm.barrier()
        return (time.perf_counter() - begun) / turns * 1e6

    def wait(self) -> float:
        """Return the share of a core that rank 0 burns while it waits for the last rank."""
        self._comm.barrier()
        if self._comm.rank == self._comm.size - 1:
            time.sleep(WAIT_SECS)
            self._comm.barrier()
            return 0.0
        used, begun = time.process_time(), time.perf_counter()
        self._comm.barrier()
        return (time.process_time() - used) / (time.perf_counter() - begun)


def main() -> None:
    """Measure; rank 0 writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--payloads", type=int, nargs="*", default=PAYLOADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    with create_communicator() as comm:
        bind_to_core(comm.rank)
        quantities = Quantities(comm, args.payloads)
        found: dict[str, list[float]] = {}
        for measure in (quantities.private_round, quantities.shared_round):
            measure()
            rounds = [measure() for _ in range(args.rounds)]
            found.update({name: [round_[name] for round_ in rounds] for name in rounds[0]})
        if comm.size > 1:
            found["waiting"] = [quantities.wait() for _ in range(3)]
        if comm.rank == 0:
            args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
