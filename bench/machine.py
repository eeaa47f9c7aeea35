"""The physical limits of this machine, as they are in this minute: ``python bench/machine.py``.

    ping_pong_us    a cache line from one core to another and back; nothing that lets two cores
                    agree is faster than half of it
    switch_us       from one process to another on the same core, by sched_yield
    copy_us         all ranks at once copy so many bytes between buffers of their own, through the
                    cache or past it, whichever is faster; nothing that gives each rank that much
                    is faster

A virtual machine's cores move between hyperthreads of one core and distant cores, which changes the
first by a factor of twenty; so it is measured again beside each figure that depends on it.
``--ranks`` and ``--payloads`` say for how many ranks and which sizes the copies are.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from cobre_shm.kernels.atomics import load_acquire, pause, store_release
from cobre_shm.kernels.copying import copy_bytes, copy_streaming, streaming_fence
from cobre_shm.kernels.system import yield_processor
from cobre_shm.spawn.parent import die_with

REPEATS = 7
TURNS = 20_000
COPY_SECS = 0.01
_LINE_WORDS = 16


@numba.njit(nogil=True)
def volley(mine: int, other: int, serves: bool, turns: int) -> None:
    """Be one of two players: write the own word when the other's has come; by addresses."""
    for turn in range(1, turns + 1):
        if serves:
            store_release(mine, turn)
        while load_acquire(other) < turn:
            pause()
        if not serves:
            store_release(mine, turn)


@numba.njit(nogil=True)
def _volley_on_one_core(mine: int, other: int, serves: bool, turns: int) -> None:
    for turn in range(1, turns + 1):
        if serves:
            store_release(mine, turn)
        while load_acquire(other) < turn:
            yield_processor()
        if not serves:
            store_release(mine, turn)


@numba.njit(nogil=True)
def _copies(targets: Any, sources: Any, nbytes: int, turns: int, streams: bool) -> None:
    for _ in range(turns):
        for i in range(targets.size):
            if streams:
                copy_streaming(targets[i], sources[i], nbytes)
            else:
                copy_bytes(targets[i], sources[i], nbytes)
    streaming_fence()


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _seconds_on(cpus: list[int], works: list[Callable[[], None]]) -> float:
    """Seconds of the slowest of several threads, each on a core, that start together."""
    start, seconds = threading.Barrier(len(works)), [0.0] * len(works)

    def run(number: int) -> None:
        os.sched_setaffinity(0, {cpus[number % len(cpus)]})
        start.wait()
        begun = time.perf_counter()
        works[number]()
        seconds[number] = time.perf_counter() - begun

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(seconds)


def _two_words() -> tuple[Any, int, int]:
    memory = np.zeros(4 * _LINE_WORDS, dtype=np.int64)
    first = memory.ctypes.data
    return memory, first, first + 8 * 2 * _LINE_WORDS


def ping_pong_us(turns: int = TURNS) -> float:
    """A cache line's way to another core and back, in microseconds; nan with one core."""
    cpus = _cpus()
    if len(cpus) < 2:
        return float("nan")
    found = []
    for _ in range(REPEATS):
        memory, one, two = _two_words()
        serve = functools.partial(volley, one, two, True, turns)
        answer = functools.partial(volley, two, one, False, turns)
        found.append(_seconds_on(cpus, [serve, answer]) / turns * 1e6)
        del memory
    return statistics.median(found)


def switch_us(turns: int = 2000) -> float:
    """From one process to another on the same core, in microseconds."""
    shared = mmap.mmap(-1, 4096)
    address = np.frombuffer(shared, dtype=np.int64).ctypes.data
    one, two = address, address + 1024
    _volley_on_one_core(one, two, True, 0)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    words = np.frombuffer(shared, dtype=np.int64)
    found = []
    end_with_us = die_with(os.getpid())
    try:
        for _ in range(REPEATS):
            words[:] = 0
            child = os.fork()
            if child == 0:
                end_with_us()
                _volley_on_one_core(two, one, False, turns + 1)
                os._exit(0)
            try:
                # The first turn waits until the child runs.
                _volley_on_one_core(one, two, True, 1)
                begun = time.perf_counter()
                _second_half(one, two, turns)
                found.append((time.perf_counter() - begun) / turns / 2 * 1e6)
            finally:
                # In compiled code, where ^C does not reach it, it would wait for us for ever.
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    finally:
        os.sched_setaffinity(0, before)
    return statistics.median(found)


@numba.njit(nogil=True)
def _second_half(mine: int, other: int, turns: int) -> None:
    for turn in range(2, turns + 2):
        store_release(mine, turn)
        while load_acquire(other) < turn:
            yield_processor()


def copy_us(nbytes: int, ranks: int) -> float:
    """What ``ranks`` ranks need to copy ``nbytes`` each, all at once, in microseconds."""
    cpus = _cpus()
    threads = min(ranks, len(cpus))
    each = -(-ranks // threads)
    sources = [np.full(nbytes, 3, dtype=np.uint8) for _ in range(threads * each)]
    targets = [np.full(nbytes, 1, dtype=np.uint8) for _ in range(threads * each)]
    best = float("inf")
    for streams in (False, True):
        works = []
        turns = 1
        for again in range(2):
            works = [
                functools.partial(
                    _copies,
                    np.array([a.ctypes.data for a in targets[i::threads]]),
                    np.array([a.ctypes.data for a in sources[i::threads]]),
                    nbytes,
                    turns,
                    streams,
                )
                for i in range(threads)
            ]
            if again == 0:
                _seconds_on(cpus, works)
                once = _seconds_on(cpus, works)
                turns = max(1, min(100_000, int(COPY_SECS / max(once, 1e-7))))
        seconds = statistics.median(_seconds_on(cpus, works) for _ in range(3))
        best = min(best, seconds / turns * 1e6)
    return best


def limits(ranks: int, payloads: list[int]) -> dict[str, Any]:
    """Return all limits, as one JSON object."""
    # Before there are threads.
    switch = switch_us()
    return {
        "ping_pong_us": ping_pong_us(),
        "switch_us": switch,
        "copy_us": {str(nbytes): copy_us(nbytes, ranks) for nbytes in payloads},
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Print the limits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--payloads", default="8192,65536,1048576,16777216")
    args = parser.parse_args()
    print(json.dumps(limits(args.ranks, [int(p) for p in args.payloads.split(",") if p])))


if __name__ == "__main__":
    main()
