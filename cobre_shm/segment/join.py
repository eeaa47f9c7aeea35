"""Joining: from a name to a group in which every rank is attached and the name is gone.

Actors: ranks 0..size-1 of the same user on one machine, perhaps a launcher.

1. The segment is made by the launcher before it starts the ranks, or by rank 0. The others look
   for it until it is there and ready (magic word).
2. Each rank claims its control block under the control lock: pid and start time. A block that has
   a pid is taken; nobody else writes it.
3. It takes the death mutex of its block, if it is the main thread of its process, and stores
   ATTACHED <SYNC state>.
4. Rank 0 waits until all are ATTACHED, removes the name and stores joined = 1 <SYNC joined>. The
   others wait for that. So once any rank returns from here, nothing is left to leak.

Where the file system of POSIX objects is too small, the launcher makes a memfd instead and the
name is ``fd:N``, a descriptor that each rank has inherited. Then step 1 is a check of what is
there, for it was made ready before any rank was started: nobody looks for it, and there is no name
in step 4. Everything else is the same. A process finds its own pid in its block when it uses its
descriptor a second time: that is an error of its own and does not harm the group.

A segment whose creator is dead is no group: who looks for one goes on looking. Rank 0 removes it,
and so does a rank that looked in vain, when all of its processes are dead; likewise one of this
user that is not made ready in time, whose creator was killed in the middle. A segment with a
living process is left alone.

A failure (a rank dies, a wrong size, two processes with one rank, nobody comes in time) poisons
the group, so that all ranks that wait here raise.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.failpoints import reach
from cobre_shm.segment.failure import failure
from cobre_shm.segment.poison import Poison, poison, read_poison
from cobre_shm.segment.process import is_alive, start_time
from cobre_shm.segment.segment import Segment, remove_unready, system_error
from cobre_shm.segment.unnamed import descriptor_of

__all__ = ["join", "leave"]

# A creator needs microseconds between the name and the magic word. Longer: it was killed there.
_UNREADY_SECS = 2.0
_LOOK_SECS = 0.002


def join(
    name: str,
    rank: int,
    size: int,
    slot_bytes: int,
    timeout: float,
    tune: Callable[[Segment], Sequence[int]] | None = None,
) -> Segment:
    """Attach to the group ``name`` as ``rank`` and wait for all ranks.

    Args:
        name: POSIX name, or ``fd:N`` for an inherited descriptor.
        rank: Of this process.
        size: Number of ranks.
        slot_bytes: Bytes of a slot, if rank 0 makes the segment.
        timeout: Seconds without any new rank after which it gives up; may be ``inf``.
        tune: Called on rank 0 when all ranks are attached; returns the tuning words of the header.

    Raises:
        InitializationFailed: With ``context["code"]`` NameInUse, IncompatibleSegment,
            SizeMismatch, DuplicateRank, JoinTimeout, RankFailed or SystemError; nothing is left.
        AllocationFailed: The memory is not there.
    """
    try:
        return _join(name, rank, size, slot_bytes, timeout, tune)
    except OSError as error:
        raise system_error(name, error) from error


def _join(
    name: str,
    rank: int,
    size: int,
    slot_bytes: int,
    timeout: float,
    tune: Callable[[Segment], Sequence[int]] | None,
) -> Segment:
    segment, is_ours = _find_or_create(name, rank, size, slot_bytes, timeout)
    try:
        _claim(segment, rank, size)
    except BaseException:
        _abandon(segment, is_ours)
        raise
    try:
        _wait_for_all(segment, rank, timeout, tune)
    except BaseException as error:
        if not isinstance(error, InitializationFailed):
            poison(segment, layout.INTERRUPTED, rank)
        with suppress(OSError):
            if not segment.creator_is_alive():
                segment.unlink()
        leave(segment, rank, unlink=is_ours)
        raise
    # The descriptor stays open: without a name, /proc/PID/fd is the way in for a monitor.
    return segment


def leave(segment: Segment, rank: int, *, unlink: bool = False) -> None:
    """Close this rank's part: peers see CLOSED, the death mutex is free, the memory unmapped.

    Called by another thread than the one that joined, the mutex cannot be given back; then the
    mapping stays until the process ends, for the kernel will write into it.
    """
    reach("close", rank)
    block = segment.control(rank)
    segment.words.store(block + layout.STATE, layout.CLOSED)  # <SYNC state>
    segment.wake_all()
    if unlink:
        with suppress(OSError):
            segment.unlink()
    segment.death_mutex(rank).unlock()
    segment.close()


def _find_or_create(
    name: str, rank: int, size: int, slot_bytes: int, timeout: float
) -> tuple[Segment, bool]:
    """Return the segment, and whether this process made it."""
    if descriptor_of(name) is not None:
        return Segment.inherit(name), False
    begun = time.monotonic()
    while True:
        if rank == 0:
            try:
                return Segment.create(name, size, slot_bytes=slot_bytes), True
            except FileExistsError:
                pass
        segment = Segment.open(name)
        waited = time.monotonic() - begun
        if segment is not None:
            try:
                if segment.creator_is_alive() and (segment.launched or rank != 0):
                    return segment, False
                if rank == 0:
                    _refuse_living(segment)
                    _remove_dead(segment)
                    continue
                if waited > timeout and not segment.living_process():
                    _remove_dead(segment)
            except BaseException:
                segment.close()
                raise
            segment.close()
        elif waited > (_UNREADY_SECS if rank == 0 else timeout) and remove_unready(name):
            _notice(name, "which was never made ready")
            continue
        if waited > timeout:
            raise InitializationFailed(
                "shm",
                f"Rank {rank} found no segment {name} within {timeout:g} s: rank 0 has not made it",
                operation="attach",
                context={"code": "JoinTimeout", "segment": name, "missing_ranks": [0]},
                suggestion="Start all ranks with the same COBRE_SHM_NAME, rank 0 among them.",
            )
        time.sleep(_LOOK_SECS)


def _refuse_living(segment: Segment) -> None:
    pid = segment.living_process()
    if pid:
        name, uid = segment.name, os.geteuid()
        segment.close()
        raise InitializationFailed(
            "shm",
            f"Segment {name} is in use by pid {pid} (uid {uid})",
            operation="create",
            context={"code": "NameInUse", "segment": name, "pid": pid, "uid": uid},
            suggestion="Choose another COBRE_SHM_NAME, or end that run.",
        )


def _remove_dead(segment: Segment) -> None:
    segment.unlink()
    _notice(segment.name, f"left by a dead run (pid {segment.creator[0]})")
    segment.close()


def _notice(name: str, what: str) -> None:
    print(f"cobre_shm: removed segment {name}, {what}", file=sys.stderr, flush=True)


def _claim(segment: Segment, rank: int, size: int) -> None:
    words = segment.words
    if segment.size != size:
        poison(segment, layout.CONFLICT, rank, os.getpid())
        raise InitializationFailed(
            "shm",
            f"Rank {rank} was started for {size} ranks, but the group of segment "
            f"{segment.name} has {segment.size}",
            operation="attach",
            context={"code": "SizeMismatch", "size": size, "group_size": segment.size},
            suggestion="Give all ranks the same COBRE_SHM_SIZE.",
        )
    block = segment.control(rank)
    with segment.control_lock():
        owner = words.load(block + layout.PID)
        if owner == 0:
            words.store(block + layout.START, start_time(os.getpid()))
            words.store(block + layout.PID, os.getpid())
    if owner == os.getpid() and segment.is_unnamed:
        raise InitializationFailed(
            "shm",
            f"Segment {segment.name} has served a communicator of this process already, and "
            "serves only one",
            operation="attach",
            context={"code": "NameInUse", "segment": segment.name, "pid": owner},
            suggestion="Make one communicator, and others from it with split_local()",
        )
    if owner:
        poison(segment, layout.CONFLICT, rank, os.getpid())
        raise InitializationFailed(
            "shm",
            f"Rank {rank} of segment {segment.name} is taken by pid {owner}; "
            f"pid {os.getpid()} asked for it too",
            operation="attach",
            context={"code": "DuplicateRank", "rank": rank, "pids": [owner, os.getpid()]},
            suggestion="Give each rank its own COBRE_SHM_RANK.",
        )
    reach("claimed", rank)
    # The kernel watches threads: only the main thread lives as long as the process.
    if threading.current_thread() is threading.main_thread():
        words.store(block + layout.GUARDED, int(segment.death_mutex(rank).try_lock()))
    words.store(block + layout.STATE, layout.ATTACHED)  # <SYNC state>
    reach("attached", rank)


def _abandon(segment: Segment, is_ours: bool) -> None:
    if is_ours:
        with suppress(OSError):
            segment.unlink()
    segment.close()


def _wait_for_all(
    segment: Segment,
    rank: int,
    timeout: float,
    tune: Callable[[Segment], Sequence[int]] | None,
) -> None:
    words = segment.words
    if rank == 0:
        _wait_until(segment, rank, timeout, lambda: not _absent(segment))
        for index, value in enumerate(tune(segment) if tune else ()):
            words.store(layout.HEADER_TUNING + 8 * index, value)  # published by <SYNC joined>
        segment.unlink()
        reach("joined", 0)
        words.store(layout.HEADER_JOINED, 1)  # <SYNC joined>
    else:
        _wait_until(
            segment,
            rank,
            timeout,
            lambda: words.load(layout.HEADER_JOINED) == 1,  # <SYNC joined>
        )


def _wait_until(segment: Segment, rank: int, timeout: float, is_done: Callable[[], bool]) -> None:
    progress, since, looked = -1, time.monotonic(), time.monotonic()
    while not is_done():
        first = read_poison(segment)
        if first is not None:
            raise _join_failed(segment, first, timeout)
        now = time.monotonic()
        if now - looked > 0.1:
            looked = now
            _poison_if_somebody_died(segment)
        absent = _absent(segment)
        if segment.size - len(absent) != progress:
            progress, since = segment.size - len(absent), now
        elif now - since > timeout:
            poison(segment, layout.TIMED_OUT, rank)
        time.sleep(_LOOK_SECS)


def _absent(segment: Segment) -> list[int]:
    states = [
        segment.words.load(segment.control(rank) + layout.STATE)  # <SYNC state>
        for rank in range(segment.size)
    ]
    return [rank for rank, state in enumerate(states) if state == layout.ABSENT]


def _poison_if_somebody_died(segment: Segment) -> None:
    words = segment.words
    for rank in range(segment.size):
        block = segment.control(rank)
        pid = words.load(block + layout.PID)
        if words.load(block + layout.STATE) == layout.CLOSED:  # <SYNC state>
            poison(segment, layout.LEFT, rank)
        elif pid and not is_alive(pid, words.load(block + layout.START)):
            poison(segment, layout.DIED, rank)
    if not segment.creator_is_alive():
        poison(segment, layout.DIED, 0)


def _join_failed(segment: Segment, first: Poison, timeout: float) -> InitializationFailed:
    if first.kind == layout.TIMED_OUT:
        absent = _absent(segment)
        return InitializationFailed(
            "shm",
            f"Ranks {absent} did not join segment {segment.name} within {timeout:g} s",
            operation="attach",
            context={"code": "JoinTimeout", "segment": segment.name, "missing_ranks": absent},
            suggestion="Start all ranks; COBRE_SHM_TIMEOUT_SECS bounds the wait for each of them.",
        )
    if first.kind == layout.CONFLICT:
        owner = segment.words.load(segment.control(first.rank) + layout.PID)
        return InitializationFailed(
            "shm",
            f"Pid {first.value} asked to join segment {segment.name} as rank {first.rank}, which "
            f"does not fit the group (pid {owner or 'none'} has that rank, {segment.size} ranks)",
            operation="attach",
            context={"code": "DuplicateRank", "rank": first.rank, "pids": [owner, first.value]},
            suggestion="Give each rank its own COBRE_SHM_RANK and all the same COBRE_SHM_SIZE.",
        )
    cause = failure(segment, first, timeout)
    return InitializationFailed(
        "shm",
        f"The group did not come together: {cause.message}",
        operation="attach",
        source=cause,
        context={**cause.context, "code": "RankFailed"},
    )
