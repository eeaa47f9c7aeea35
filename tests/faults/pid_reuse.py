"""Give the pid of a dead rank to another process; run as PID 1 of a pid namespace of its own.

python -m tests.faults.pid_reuse NAME TIMES

Prints one line per turn: what became of a stale segment, and of a rank that waits for the dead.
"""

import ctypes
import os
import signal
import sys
import time

from cobre_shm.errors import RankFailed
from cobre_shm.segment.process import start_time
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator

_SYS_SET_ROBUST_LIST = 273


def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def take(pid):
    """Start a process that has this pid, and another start time."""
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(pid - 1))
    time.sleep(0.02)  # a start time is a number of ticks of 10 ms
    taken = fork(signal.pause)
    assert taken == pid, (taken, pid)
    return taken


def die_in_a_barrier(config):
    with ShmCommunicator(config) as comm:
        comm.barrier()
        signal.pause()


def look_at_a_stale_segment(name):
    def leave():
        Segment.create(name, 2, slot_bytes=4096)
        signal.pause()

    creator = fork(leave)
    while (segment := Segment.open(name)) is None or not segment.living_process():
        time.sleep(0.001)
    start = segment.creator[1]
    segment.close()
    kill(creator)
    namesake = take(creator)
    assert start_time(namesake) != start
    with ShmCommunicator(ShmConfig(name=name, rank=0, size=1, timeout_secs=10)) as comm:
        comm.barrier()
    kill(namesake)
    return "replaced"


def wait_for_a_dead_rank(name):
    # Only the process table can tell: the kernel marks nothing.
    victim = fork(lambda: die_in_a_barrier(ShmConfig(name=name, rank=1, size=2)))
    with ShmCommunicator(ShmConfig(name=name, rank=0, size=2, timeout_secs=20)) as comm:
        comm.barrier()
        kill(victim)
        namesake = take(victim)
        try:
            comm.barrier()
        except RankFailed as error:
            return f"rank {error.rank} failed" if error.pid == victim else str(error)
        finally:
            kill(namesake)
    return "not noticed"


if __name__ == "__main__":
    name, times = sys.argv[1], int(sys.argv[2])
    ctypes.CDLL(None).syscall(_SYS_SET_ROBUST_LIST, None, 24)
    for _ in range(times):
        print(look_at_a_stale_segment(name), wait_for_a_dead_rank(name), sep=", ", flush=True)
