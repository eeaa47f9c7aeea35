"""What a machine does to its processes: starves them, limits them, uses their pids again."""

import contextlib
import functools
import mmap
import os
import resource
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.errors import AllocationFailed, CobreError, RankFailed
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.faults.test_system_calls import Held
from tests.stress.test_exchange import sums_of_turns
from tests.support.ranks import results_of, run_ranks

ROOT = Path(__file__).parents[2]
# Only ends tests that hang: no outcome depends on it.
WATCHDOG_SECS = 720


# Processor time


def starve(comm, turns, hungry, seconds):
    """Collectives on one processor that a busy process wants too; one rank gets what is left."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    hog = None
    if comm.rank == hungry:
        program = (
            f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: 0"
        )
        hog = subprocess.Popen([sys.executable, "-c", program])
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        return sums_of_turns(comm, turns, seed=turns)
    finally:
        if hog is not None:
            hog.wait()


@pytest.mark.parametrize(
    ("size", "turns", "seconds"),
    [(3, 40, 1.0), pytest.param(64, 60, 20.0, marks=pytest.mark.slow)],
)
def test_starved_rank_is_late_and_not_dead(size, turns, seconds):
    outcomes = run_ranks(starve, size, "shm", turns, size - 1, seconds, timeout=WATCHDOG_SECS)
    assert results_of(outcomes) == [turns] * size


# Clocks


def jump_the_clock(comm, late):
    """Collectives while the time of day jumps by years, to and fro."""
    jumps = iter(lambda: secrets.randbelow(2) * 10**9, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(jumps)))
        patch.setattr(time, "time_ns", lambda: next(jumps) * 10**9)
        config = ShmConfig(name=Segment.random_name(), rank=0, size=1, timeout_secs=5)
        ShmCommunicator(config).close()
        if comm.rank == late:
            time.sleep(0.6)
        comm.barrier()
        with comm.split_local() as group:
            return float(group.allreduce(np.ones(1))[0])


def test_time_of_day_does_not_matter():
    outcomes = run_ranks(jump_the_clock, 3, "shm", 1, collective_timeout=20.0)
    assert results_of(outcomes) == [3.0] * 3
    assert all(outcome.output == "" for outcome in outcomes)


# Limits


@contextlib.contextmanager
def free_descriptors(count):
    """Let this process open so many files more and no others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filling = []
    probe = os.open(os.devnull, os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 64, hard))
        with contextlib.suppress(OSError):
            while True:
                filling.append(os.dup(probe))
        for _ in range(count):
            os.close(filling.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in [probe, *filling]:
            os.close(fd)


@contextlib.contextmanager
def free_mappings(count):
    """Let this process map so many things more and no others."""
    filling = []
    protections = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
    try:
        with contextlib.suppress(OSError):
            while True:
                # Neighbours of one kind would become one mapping.
                protection = protections[len(filling) % 2]
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                filling.append(mmap.mmap(-1, mmap.PAGESIZE, flags=flags, prot=protection))
        for _ in range(count):
            filling.pop().close()
        yield
    finally:
        for mapping in filling:
            mapping.close()


def meet_limits(comm, limit, counts):
    """Make groups and regions with so many things free; how each attempt ended."""
    endings = []
    for count in counts:
        name = Segment.random_name()
        for attempt in (
            lambda name=name: ShmCommunicator(ShmConfig(name=name, rank=0, size=1)).close(),
            lambda: comm.create_shared_region(1000).close(),
            lambda: comm.split_local().close(),
        ):
            before = Held(name[1:])
            error = None
            with limit(count):
                try:
                    attempt()
                except (CobreError, MemoryError) as caught:
                    error = caught
            told = "" if error is None else str(error) or type(error).__name__
            del error
            assert Held(name[1:]) == before, (count, told)
            endings.append(told)
        comm.barrier()
    return endings


@pytest.mark.parametrize(
    ("limit", "counts", "words"),
    [
        (free_descriptors, range(8), "Too many open files"),
        # Tens of thousands of mappings are made for each attempt.
        pytest.param(free_mappings, (0, 40), "Cannot allocate memory", marks=pytest.mark.slow),
    ],
)
def test_limit_that_is_met_is_a_clear_error_and_nothing_is_left(limit, counts, words):
    (endings,) = results_of(run_ranks(meet_limits, 1, "shm", limit, counts))
    assert any(words in told for told in endings), endings
    # With a few free everything works.
    assert endings[-3:] == ["", "", ""]


def run_out_of_address_space(comm, victim):
    """One rank may map little more than it has: what it and the others are told."""
    told = []
    if comm.rank == victim:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (64 << 20), hard))
    try:
        comm.create_shared_region(256 << 20, np.uint8)
    except AllocationFailed as error:
        told.append(str(error))
    comm.barrier()
    if comm.rank == victim:
        np.ones(1 << 30)
    try:
        comm.barrier()
    except RankFailed as error:
        told.append((error.rank, error.context["traceback"]))
    return told


def test_rank_that_runs_out_of_memory_fails_the_others_with_its_traceback():
    outcomes = run_ranks(run_out_of_address_space, 3, "shm", 1)
    assert isinstance(outcomes[1].error, MemoryError)
    for outcome in (outcomes[0], outcomes[2]):
        refused, (rank, text) = outcome.result
        assert "refused on another rank" in refused
        assert rank == 1
        assert "in run_out_of_address_space" in text
        assert "MemoryError" in text


# Process ids


@functools.cache
def with_own_pids():
    """What to put before a command that shall be PID 1, or None where that is not permitted."""
    if shutil.which("unshare") is None:
        return None
    for options in (["-pf", "--mount-proc"], ["-rpf", "--mount-proc"]):
        prefix = ["unshare", *options]
        test = "echo 100 > /proc/sys/kernel/ns_last_pid"
        done = subprocess.run([*prefix, "sh", "-c", test], capture_output=True, check=False)
        if done.returncode == 0:
            return prefix
    return None


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_process_that_got_the_pid_of_a_dead_rank_is_not_taken_for_it(times):
    prefix = with_own_pids()
    if prefix is None:
        pytest.skip("the system does not permit a pid namespace whose next pid can be chosen")
    name = f"/cobre-test-{secrets.token_hex(8)}"
    program = [sys.executable, "-m", "tests.faults.pid_reuse", name, str(times)]
    done = subprocess.run(
        [*prefix, *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WATCHDOG_SECS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "replaced, rank 1 failed\n" * times
    assert done.stderr.count(f"removed segment {name}, left by a dead run") == times
