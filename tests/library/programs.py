"""What the workers of these tests run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from cobre_shm import create_communicator

STILL = 3600.0


class Unheard(Exception):
    """An exception that needs two arguments, and so cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Speechless(Exception):
    """An exception whose text cannot be made."""

    def __str__(self):
        raise KeyError


class Refusal(Exception):
    """An exception of a program."""


def add_up(factor, offset=0.0):
    with create_communicator() as comm:
        total = comm.allreduce(np.arange(3.0) + comm.rank) * factor + offset
        return comm.rank, comm.size, comm.backend, total


def speak_and_add_up():
    """Write to both streams, before the group is joined and between its collectives."""
    for stream in (1, 2):
        os.write(stream, b"spoken\n" * 1000)
    with create_communicator() as comm:
        for stream in (1, 2):
            os.write(stream, b"spoken\n" * 1000)
        return float(comm.allreduce(np.ones(1))[0])


def surroundings():
    return {key: value for key, value in os.environ.items() if "RANK" in key or "SIZE" in key}, (
        sys.argv,
        os.getpgid(0) == os.getpid(),
        sys.modules["__main__"].__dict__.get("__file__"),
    )


def echo(*values):
    return values


def shape_of_region():
    with create_communicator() as comm:
        region = comm.create_shared_region(1000)
        region.array[comm.rank :: comm.size] = comm.rank
        region.fence()
        total = float(region.array.sum())
        region.close()
        return total


def end(rank, how):
    """Have one rank end in some way while the others wait for it."""
    with create_communicator() as comm:
        comm.barrier()
        if comm.rank == rank:
            _WAYS[how]()
        comm.barrier()


def raise_and_end_late():
    """The others know of rank 0's exception well before it has come out."""
    try:
        end(0, "raise")
    except ValueError:
        time.sleep(1.0)
        raise


def leave_and_save_at_the_end(folder):
    """Rank 0 leaves while the other waits for it, and has something to save when it is ended."""
    with create_communicator() as comm:
        if comm.rank:
            comm.barrier()

        def save(*_):
            (Path(folder) / "saved").touch()
            os._exit(0)

        signal.signal(signal.SIGTERM, save)
    time.sleep(STILL)


def stay_away_and_object_to_the_end():
    """Rank 1 does not come in time, and raises when it is told to end."""
    with create_communicator() as comm:
        # Not so soon in joining: the workers import numpy first.
        comm._config = replace(comm._config, timeout_secs=3.0)
        if comm.rank:

            def object_(*_):
                raise Refusal("not yet")

            signal.signal(signal.SIGTERM, object_)
            time.sleep(STILL)
        comm.barrier()


def end_without_communicator(how, rank):
    """The same, where the others know nothing of each other."""
    if os.environ["RANK"] == str(rank):
        _WAYS[how]()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(STILL)


def _raise(error):
    raise error


_WAYS = {
    "raise": lambda: _raise(ValueError("the reason")),
    "refuse": lambda: _raise(Refusal("no", 3)),
    "unheard": lambda: _raise(Unheard("this", "that")),
    "say nothing": lambda: _raise(Speechless("this")),
    "file": lambda: Path("/no/such/file").read_text(),
    "exit": lambda: sys.exit(3),
    "leave": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "fill": lambda: [b"x" * 10_000_000 for _ in range(1000)],
    "crash": lambda: ctypes.string_at(0),
}


def pids_in(folder):
    """Leave a file with this pid, and stay."""
    with create_communicator() as comm:
        (folder / f"{comm.rank}").write_text(str(os.getpid()))
        comm.barrier()
        if comm.rank == 0:
            (folder / "ready").touch()
            time.sleep(STILL)
        comm.barrier()
