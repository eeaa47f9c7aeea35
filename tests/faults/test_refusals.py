"""What the kernel may refuse to a container: what is lost then, and that nothing else is."""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cobre_shm import layout
from cobre_shm.errors import RankFailed
from cobre_shm.kernels import context
from cobre_shm.kernels.switches import ALLOWED, NOT_ALLOWED
from cobre_shm.kernels.waiting import SLEEPERS
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from cobre_shm.tuning import NEVER
from tests.faults import programs, refusing
from tests.support.ranks import results_of, run_ranks

_SYS_SET_ROBUST_LIST = 273
_NOT_PERMITTED = "seccomp filters are not permitted here"
_READS_FORBIDDEN = "this system does not let ranks read each other's memory"


def refused_or_skipped(names, code):
    """Install a filter in this rank; return whether it is permitted."""
    try:
        refusing.refuse(names, code)
    except OSError:
        return False
    return True


def forget_held_mutexes():
    """Have the kernel mark nothing when this thread ends, as if it knew no robust mutexes."""
    ctypes.CDLL(None).syscall(_SYS_SET_ROBUST_LIST, None, 24)


def die_unmarked(comm, victim):
    forget_held_mutexes()
    assert programs.work_until_failure(comm, 1, turns=20) is None
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return programs.work_until_failure(comm, 1)


def die_unguarded(comm, name, victim):
    """The group is made in another thread, which the kernel must not watch."""
    made = []
    config = ShmConfig(name=name, rank=comm.rank, size=comm.size)
    thread = threading.Thread(target=lambda: made.append(ShmCommunicator(config)))
    thread.start()
    thread.join()
    (other,) = made
    # The thread is gone and its rank is not.
    assert programs.work_until_failure(other, 1, turns=20) is None
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    found = programs.work_until_failure(other, 1)
    other.close()
    return found


@pytest.mark.parametrize("victim", [0, 2])
def test_death_is_found_in_the_process_table_where_mutexes_are_not_marked(victim):
    outcomes = run_ranks(die_unmarked, 3, "shm", victim)
    assert_blamed(outcomes, victim)


@pytest.mark.parametrize("victim", [0, 2])
def test_death_is_found_of_a_rank_that_another_thread_made(victim):
    outcomes = run_ranks(die_unguarded, 3, "shm", Segment.random_name(), victim)
    assert_blamed(outcomes, victim)


def assert_blamed(outcomes, victim):
    assert outcomes[victim].signal == signal.SIGKILL
    for outcome in outcomes:
        if outcome.rank != victim:
            assert outcome.error is None, outcome.traceback
            error, later = outcome.result
            assert type(error) is type(later) is RankFailed
            assert (error.rank, error.pid) == (victim, outcomes[victim].pid)


def wait_without_futex(comm, late, code):
    if not refused_or_skipped(["futex_wait", "futex_wake"], code):
        return None
    assert ctypes.CDLL(None, use_errno=True).syscall(202, None, 0, 0, None, None, 0) == -1
    assert ctypes.get_errno() == code
    # A rank may leave the first barrier when the late one has slept for a while.
    begun = time.monotonic()
    comm.barrier()
    if comm.rank == late:
        time.sleep(1.0)
    cpu = time.process_time()
    comm.barrier()
    waited, burnt = time.monotonic() - begun, time.process_time() - cpu
    assert programs.work_until_failure(comm, 20_000, turns=20) is None
    return waited, burnt


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_ranks_wait_for_each_other_where_futex_is_refused(code):
    outcomes = run_ranks(wait_without_futex, 3, "shm", 1, code)
    if None in results_of(outcomes):
        pytest.skip(_NOT_PERMITTED)
    for waiting in (outcomes[0], outcomes[2]):
        waited, burnt = waiting.result
        assert waited > 0.8
        # Returning at once from every sleep would take all of it.
        assert burnt < 0.2 * waited
    (note,) = "".join(outcome.output for outcome in outcomes).splitlines()
    assert note.startswith("cobre_shm: this system refuses futex between processes: ")


def die_without_futex_waitv(comm, victim, code):
    if not refused_or_skipped(["futex_waitv"], code):
        return None
    waited, burnt = programs.wait_for_late_rank(comm, victim, 1.0)
    if comm.rank != victim:
        # Returning at once from every sleep would take all of it.
        assert burnt < 0.2 * waited
    found = programs.depart(comm, victim, "kill_self")
    assert comm._context[context.WATCH_LIST] == 0
    return found


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_death_is_found_where_one_cannot_sleep_on_several_words(code):
    outcomes = run_ranks(die_without_futex_waitv, 3, "shm", 1, code)
    if outcomes[0].result is None and outcomes[0].error is None:
        pytest.skip(_NOT_PERMITTED)
    assert_blamed(outcomes, 1)


def close_before_sleepers_without_futex(comm, code):
    comm.barrier()
    segment = comm._segment
    mark = segment.words.address + segment.control(comm.rank) + layout.DEATH_MUTEX
    ctypes.c_uint32.from_address(mark).value |= SLEEPERS
    if not refused_or_skipped(["futex_wait", "futex_wake"], code):
        return None
    comm.close()
    return True


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_rank_closes_though_it_may_not_wake_who_watches_it(code):
    """Otherwise the C library would end the process."""
    results = results_of(run_ranks(close_before_sleepers_without_futex, 2, "shm", code))
    if None in results:
        pytest.skip(_NOT_PERMITTED)
    assert results == [True, True]


def die_without_futex(comm, victim):
    if not refused_or_skipped(["futex_wait", "futex_wake"], errno.ENOSYS):
        return None
    return die_unmarked(comm, victim)


def test_death_is_found_where_futex_is_refused():
    outcomes = run_ranks(die_without_futex, 3, "shm", 1)
    if outcomes[0].result is None and outcomes[0].error is None:
        pytest.skip(_NOT_PERMITTED)
    assert_blamed(outcomes, 1)


def large_collectives(comm):
    """Right results of what ranks do by reading each other's memory; whether they still may."""
    send = np.arange(30_000) + float(comm.rank)
    total = comm.allreduce(send)
    assert (total == comm.size * np.arange(30_000) + sum(range(comm.size))).all()
    gathered = comm.allgatherv(send, counts=[send.size] * comm.size)
    assert (gathered.reshape(comm.size, -1)[:, 0] == np.arange(comm.size)).all()
    comm.broadcast(send, 1)
    assert (send == np.arange(30_000) + 1.0).all()
    return int(comm._context[context.PEER_READS])


def read_no_peer(comm, refused):
    permitted = comm.rank != refused or refused_or_skipped(["process_vm_readv"], errno.EPERM)
    # Where it is not, no rank may begin what another one leaves out.
    if comm.allreduce(np.array([int(permitted)]))[0] < comm.size:
        return None
    comm.use_switch_points({"read_bytes": 4096})
    return large_collectives(comm)


@pytest.mark.parametrize("refused", [0, 2])
def test_no_rank_reads_another_where_one_of_them_may_not(refused):
    results = results_of(run_ranks(read_no_peer, 3, "shm", refused))
    if None in results:
        pytest.skip(_NOT_PERMITTED)
    assert results == [NOT_ALLOWED] * 3


def reduce_without_slots(comm):
    """More than a kernel does at once: it comes back after its probe has tried to read."""
    permitted = refused_or_skipped(["process_vm_readv"], errno.EPERM)
    if comm.allreduce(np.array([int(permitted)]))[0] < comm.size:
        return None
    comm.use_switch_points({"share_bytes": NEVER, "read_bytes": 4096})
    array = comm.full(17 << 20, comm.rank + 1.0)
    comm.allreduce(array, array)
    return np.unique(array).tolist()


def test_collective_goes_on_as_it_began_where_its_probe_finds_that_nobody_may_read():
    results = results_of(run_ranks(reduce_without_slots, 2, "shm"))
    if None in results:
        pytest.skip(_NOT_PERMITTED)
    assert results == [[3.0]] * 2


_READS = """
import os, sys
import numpy as np
import cobre_shm
from cobre_shm.kernels import context
with cobre_shm.create_communicator() as comm:
    comm.use_switch_points({"read_bytes": 4096})
    total = comm.allreduce(np.ones(10_000))
    print(int(total[0]), comm._context[context.PEER_READS], flush=True)
"""


@pytest.mark.parametrize("method", ["zygote", "spawn"])
def test_ranks_of_the_launcher_read_each_other_under_yama_too(tmp_path, method):
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    if yama.exists() and int(yama.read_text()) > 1:
        pytest.skip("kernel.yama.ptrace_scope lets nobody read another process")
    script = tmp_path / "program.py"
    script.write_text(_READS)
    done = subprocess.run(
        [sys.executable, "-m", "cobre_shm.spawn", "-n", "2", "--start-method", method, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == f"2 {ALLOWED}\n" * 2, done.stderr


_OPENS = """
import os
from cobre_shm.shm import membership
opened = []
membership.allow_reading_by = opened.append
import cobre_shm
with cobre_shm.create_communicator() as comm:
    print(opened == [os.getppid()], flush=True)
"""


@pytest.mark.parametrize(("read_bytes", "opens"), [(1 << 21, True), (1 << 62, False)])
def test_memory_that_no_peer_would_read_stays_closed(tmp_path, read_bytes, opens):
    (tmp_path / "tuning.json").write_text(json.dumps({"read_bytes": read_bytes}))
    setting = f"COBRE_SHM_TUNING={tmp_path / 'tuning.json'}"
    launcher = [sys.executable, "-m", "cobre_shm.spawn", "-n", "2", "--start-method", "spawn"]
    done = subprocess.run(
        [*launcher, "-x", setting, "-c", _OPENS],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == f"{opens}\n" * 2, done.stderr


def broadcast_a_file_cut_off(comm, path):
    """The root's buffer is a mapped file that has become shorter."""
    comm.use_switch_points({"read_bytes": 4096})
    if large_collectives(comm) == NOT_ALLOWED:
        return None
    buf = np.empty(1 << 20, np.uint8)
    if comm.rank == 1:
        buf = np.memmap(path, np.uint8, "w+", shape=buf.size)
        os.truncate(path, 4096)
    try:
        comm.broadcast(np.asarray(buf), 1)
    except RankFailed as error:
        return str(error), error.rank
    return "nothing failed", -1


def test_memory_that_cannot_be_read_fails_on_all_ranks_and_says_whose(tmp_path):
    results = results_of(run_ranks(broadcast_a_file_cut_off, 3, "shm", tmp_path / "buffer"))
    if None in results:
        pytest.skip(_READS_FORBIDDEN)
    assert len({rank for _, rank in results}) == 1
    for text, rank in results:
        assert rank in (0, 2)
        assert f"Rank {rank} could not read memory of rank 1 (pid " in text


_PROGRAM = """
import os, sys
import numpy as np
import cobre_shm
with cobre_shm.create_communicator() as comm:
    total = comm.allreduce(np.ones(1000))
    region = comm.create_shared_region(10)
    region.fence()
    region.close()
    print(int(total[0]), flush=True)
    comm.barrier()
    if len(sys.argv) > 1 and comm.rank == 1:
        os.kill(os.getpid(), 9)
    comm.barrier()
"""


@pytest.mark.parametrize(("code", "how"), [("ENOSYS", "ends"), ("EPERM", "dies")])
def test_launcher_works_where_the_newer_system_calls_are_refused(tmp_path, code, how):
    script = tmp_path / "program.py"
    script.write_text(_PROGRAM)
    calls = "memfd_create,pidfd_open,set_robust_list"
    launcher = [sys.executable, "-m", "cobre_shm.spawn", "-n", "2", str(script)]
    done = subprocess.run(
        [sys.executable, refusing.__file__, code, calls, *launcher, *["die"] * (how == "dies")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    if done.returncode == refusing.NOT_PERMITTED:
        pytest.skip(_NOT_PERMITTED)
    assert done.stdout.count("2\n") == 2, done.stderr
    # Once each; the launcher repeats last words, with two spaces before them.
    notes = [line.split(": ") for line in done.stderr.splitlines() if line.startswith("cobre_shm")]
    assert sorted(note[1] for note in notes if "this system refuses" in note[1]) == [
        "this system refuses pidfd_open",
        "this system refuses robust mutexes (set_robust_list)",
    ]
    if how == "ends":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 128 + signal.SIGKILL, done.stderr
        assert "SIGKILL" in done.stderr
