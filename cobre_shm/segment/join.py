"""Joining: from a name to a group in which every rank is attached and the name is gone.

Actors: ranks 0..size-1 of the same user on one machine, perhaps a launcher.

1. The segment is made by the launcher before it starts the ranks, or by rank 0. The others look
   for it until it is there and ready (magic word); see ``finding.py``.
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

As long as there is a name, a careless process of this user can cut the file off. Touching mapped
memory that is gone would be SIGBUS, so who waits reads the words from the file, and finds an end
instead. The few microseconds in which a rank claims its block remain.

A failure (a rank dies, a wrong size, two processes with one rank, nobody comes in time) poisons
the group, so that all ranks that wait here raise.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.failpoints import reach
from cobre_shm.reminder import Reminder
from cobre_shm.segment.failure import failure
from cobre_shm.segment.finding import LOOK_SECS, find_or_create
from cobre_shm.segment.libc import is_futex_refused, is_robust_list_known
from cobre_shm.segment.notes import NO_ROBUST_LIST, note_once, say
from cobre_shm.segment.poison import Poison, poison, read_poison
from cobre_shm.segment.process import is_alive, start_time
from cobre_shm.segment.refusal import system_error
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.stacks import offer_stack
from cobre_shm.segment.words import CutOff

__all__ = ["join", "leave"]

_PROCESS_CHECK_SECS = 0.1

# Seconds without any new rank after which one gives up, and after which one says so.
Times = tuple[float, float]
# Rank 0's choice of the tuning words, made when all ranks are attached.
Tune = Callable[[Segment], Sequence[int]]


def join(
    name: str,
    rank: int,
    size: int,
    slot_bytes: int,
    timeout: float,
    tune: Tune | None = None,
    made: Segment | None = None,
    stall_warn: float = math.inf,
) -> Segment:
    """Attach to the group ``name`` as ``rank`` and wait for all ranks.

    Args:
        name: POSIX name, or ``fd:N`` for an inherited descriptor.
        rank: Of this process.
        size: Number of ranks.
        slot_bytes: Bytes of a slot, if rank 0 makes the segment.
        timeout: Seconds without any new rank after which it gives up; may be ``inf``.
        tune: Called on rank 0 when all ranks are attached; returns the tuning words of the header.
        made: The segment, if this process has made it already.
        stall_warn: Seconds after which who waits says so on stderr; may be ``inf``.

    Raises:
        InitializationFailed: With ``context["code"]`` NameInUse, IncompatibleSegment,
            SizeMismatch, DuplicateRank, JoinTimeout, RankFailed, CutOff or SystemError; nothing
            is left.
        AllocationFailed: The memory is not there.
    """
    try:
        reach("begin", rank)
        segment, is_ours = made, made is not None
        if segment is None:
            segment, is_ours = find_or_create(name, rank, size, slot_bytes, timeout, stall_warn)
        return _enter(segment, is_ours, rank, size, (timeout, stall_warn), tune)
    except CutOff as error:
        raise _cut_off(name, error) from error
    except OSError as error:
        raise system_error(name, error) from error


def _enter(
    segment: Segment, is_ours: bool, rank: int, size: int, times: Times, tune: Tune | None
) -> Segment:
    """Take the rank's place in the segment and wait for the others."""
    try:
        segment.check_whole()
        _claim(segment, rank, size)
    except BaseException as error:
        # The others would wait for it as long as its process lives.
        if not isinstance(error, InitializationFailed | CutOff):
            poison(segment, layout.INTERRUPTED, rank)
        _abandon(segment, is_ours)
        raise
    try:
        _wait_for_all(segment, rank, times, tune)
    except CutOff:
        segment.give_up_memory()
        leave(segment, rank, unlink=True)
        raise
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


def leave(segment: Segment, rank: int, *, unlink: bool = False, stay_mapped: bool = False) -> None:
    """Close this rank's part: peers see CLOSED, the death mutex is free, the memory unmapped.

    Args:
        segment: It.
        rank: Whose part.
        unlink: Remove the name too.
        stay_mapped: Leave the memory to a thread that is still inside a collective.

    Called by another thread than the one that joined, or where futex is refused, the mutex cannot
    be given back; then the mapping stays until the process ends, for the kernel will write into it.
    """
    reach("close", rank)
    block = segment.control(rank)
    segment.words.store(block + layout.STATE, layout.CLOSED)  # <SYNC state>
    segment.wake_all()
    if unlink:
        with suppress(OSError):
            segment.unlink()
    # Unlocking wakes a rank that watches the mutex. Where that is refused, the C library would end
    # the process.
    if not is_futex_refused():
        segment.death_mutex(rank).unlock()
    if stay_mapped:
        segment.close_descriptor()
    else:
        segment.close()


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
    start = start_time(os.getpid())
    with segment.control_lock():
        owner = words.load(block + layout.PID)
        if owner == 0:
            words.store(block + layout.START, start)
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
    offer_stack(segment, rank)
    # The kernel watches threads: only the main thread lives as long as the process.
    if threading.current_thread() is threading.main_thread():
        is_marked = segment.death_mutex(rank).try_lock() and is_robust_list_known()
        words.store(block + layout.GUARDED, int(is_marked))
        if not is_marked:
            note_once(segment, NO_ROBUST_LIST)
    words.store(block + layout.STATE, layout.ATTACHED)  # <SYNC state>
    reach("attached", rank)


def _abandon(segment: Segment, is_ours: bool) -> None:
    if is_ours:
        with suppress(OSError):
            segment.unlink()
    segment.close()


def _wait_for_all(segment: Segment, rank: int, times: Times, tune: Tune | None) -> None:
    if rank == 0:
        # A rank that has failed meanwhile is not absent, and its group is none.
        _wait_until(
            segment, rank, times, lambda: not _absent(segment) and read_poison(segment) is None
        )
        segment.unlink()
        # From here on nobody comes to the file by a name.
        segment.check_whole()
        for index, value in enumerate(tune(segment) if tune else ()):
            # Published by <SYNC joined>.
            segment.words.store(layout.HEADER_TUNING + 8 * index, value)
        reach("joined", 0)
        segment.words.store(layout.HEADER_JOINED, 1)  # <SYNC joined>
    else:
        _wait_until(
            segment,
            rank,
            times,
            lambda: segment.words.load(layout.HEADER_JOINED) == 1,  # <SYNC joined>
        )


def _wait_until(segment: Segment, rank: int, times: Times, is_done: Callable[[], bool]) -> None:
    timeout, stall_warn = times
    progress, since, looked = -1, time.monotonic(), time.monotonic()
    reminder = Reminder(stall_warn)
    while True:
        now, loss = time.monotonic(), None
        with segment.without_mapping():
            if is_done():
                return
            segment.check_whole()
            first = read_poison(segment)
            absent = _absent(segment)
            present = segment.size - len(absent)
            if now - looked > _PROCESS_CHECK_SECS:
                looked = now
                loss = _loss(segment)
        if first is not None:
            raise _join_failed(segment, first, timeout)
        if loss is not None:
            poison(segment, *loss)
        elif present != progress:
            progress, since, reminder = present, now, Reminder(stall_warn)
        elif now - since > timeout:
            poison(segment, layout.TIMED_OUT, rank)
        elif reminder.is_due(now - since) and all(other in absent for other in range(rank)):
            text = f"{present} rank(s) have waited {now - since:.0f} s to join, for {absent}"
            say(f"{text} of segment {segment.name}")
        time.sleep(LOOK_SECS)


def _absent(segment: Segment) -> list[int]:
    states = [
        segment.words.load(segment.control(rank) + layout.STATE)  # <SYNC state>
        for rank in range(segment.size)
    ]
    return [rank for rank, state in enumerate(states) if state == layout.ABSENT]


def _loss(segment: Segment) -> tuple[int, int] | None:
    """Kind of poison, and rank, of somebody who has died or left."""
    words = segment.words
    for rank in range(segment.size):
        block = segment.control(rank)
        pid = words.load(block + layout.PID)
        if words.load(block + layout.STATE) == layout.CLOSED:  # <SYNC state>
            return layout.LEFT, rank
        if pid and not is_alive(pid, words.load(block + layout.START)):
            return layout.DIED, rank
    return None if segment.creator_is_alive() else (layout.DIED, 0)


def _cut_off(name: str, error: CutOff) -> InitializationFailed:
    return InitializationFailed(
        "shm",
        f"Segment {name} was cut off while the ranks joined: {error}",
        operation="attach",
        source=error,
        context={"code": "CutOff", "segment": name},
        suggestion="Find what truncates files in /dev/shm, and start again.",
    )


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
