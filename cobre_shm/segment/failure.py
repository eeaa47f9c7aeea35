"""From the words of a failed group to the exception that says who, how, and what it did last."""

from __future__ import annotations

import signal
import time

from cobre_shm import layout
from cobre_shm.errors import CollectiveFailed, CollectiveMismatch, CollectiveTimeout, RankFailed
from cobre_shm.reminder import named
from cobre_shm.segment.last_words import read_last_words
from cobre_shm.segment.poison import Poison
from cobre_shm.segment.process import is_alive, process_state
from cobre_shm.segment.recorder import last_entry
from cobre_shm.segment.segment import Segment

__all__ = ["failure", "mismatch", "missing_ranks", "named_ranks"]

# A launcher learns of an end within milliseconds, but only when the memory is free: of gigabytes,
# or on a busy machine, that may take seconds.
_EXIT_REPORT_SECS = 5.0


def missing_ranks(segment: Segment, epoch: int, steps: int = 0) -> list[int]:
    """The ranks for which those wait that are at ``epoch``, or wait for ``steps`` in a chain.

    In a chain each rank waits for the one before it, so the first of those that have done least
    keeps all others.
    """
    behind = [rank for rank in range(segment.size) if segment.arrived(rank) < epoch]
    if behind or not steps:
        return behind
    done = [segment.steps(rank) for rank in range(segment.size)]
    return [done.index(min(done))] if min(done) < steps else []


def named_ranks(segment: Segment, late: list[int]) -> str:
    """The late ranks with what each is doing, and has called last."""

    def describe(rank: int) -> str:
        block = segment.control(rank)
        pid, start = (segment.words.load(block + word) for word in (layout.PID, layout.START))
        did = last_entry(segment, rank) or "has called nothing yet"
        return f"rank {rank} (pid {pid}, {process_state(pid, start)}; {did})"

    return named(late, describe)


def mismatch(segment: Segment) -> CollectiveMismatch:
    """What each rank called last: all have published its first round, and call nothing more."""
    entries = [last_entry(segment, rank) for rank in range(segment.size)]
    return CollectiveMismatch([entry.call if entry else "nothing" for entry in entries])


def failure(segment: Segment, first: Poison, timeout: float) -> CollectiveFailed:
    """Return the exception for the group's first failure."""
    if first.kind == layout.TIMED_OUT:
        return _timed_out(segment, first.rank, timeout)
    if first.kind == layout.STOPPED:
        name = _signal_name(first.value)
        return CollectiveFailed(
            f"The launcher ended the group: {name}", context={"signal": first.value}
        )
    if first.kind == layout.DAMAGED:
        return CollectiveFailed(
            "The words by which the ranks meet are damaged: a process outside the group, or a "
            "stray pointer in one of its ranks, has written into the segment",
            context={"segment": segment.name},
        )
    return _rank_failed(segment, first)


def _timed_out(segment: Segment, rank: int, timeout: float) -> CollectiveTimeout:
    epochs = [segment.arrived(r) for r in range(segment.size)]
    missing = missing_ranks(segment, max(epochs), steps=1 << 62)
    return CollectiveTimeout(
        f"Nothing moved for {timeout:g} s; rank {rank} gave up waiting for "
        f"{named_ranks(segment, missing)}",
        missing_ranks=missing,
        seconds=timeout,
        suggestion="Set COBRE_SHM_TIMEOUT_SECS above the longest time between two collectives.",
    )


def _rank_failed(segment: Segment, first: Poison) -> RankFailed:
    rank, words, block = first.rank, segment.words, segment.control(first.rank)
    pid = words.load(block + layout.PID)
    status = _exit_status(segment, rank) if first.kind == layout.DIED else None
    if first.kind in layout.DEEDS:
        how = layout.DEEDS[first.kind].format(value=first.value)
    elif status is None:
        how = "died (only the cobre_shm.spawn launcher sees the signal or exit code)"
    elif status < 0:
        how = f"was killed by {_signal_name(-status)}"
    else:
        how = f"ended with exit code {status}"
    entry = last_entry(segment, rank)
    did = f"it {entry}" if entry else "it had called no collective"
    process = f" (pid {pid})" if pid else ", which had not joined,"
    text = read_last_words(segment, rank) if first.kind == layout.RAISED else ""
    quoted = "".join(f"\n  | {line}" for line in text.splitlines())
    return RankFailed(
        f"Rank {rank}{process} {how}; {did}{quoted}",
        rank=rank,
        pid=pid,
        signal=-status if status is not None and status < 0 else None,
        exit_code=status if status is not None and status >= 0 else None,
        context={"last_call": str(entry) if entry else None, "traceback": text or None},
    )


def _exit_status(segment: Segment, rank: int) -> int | None:
    """What the launcher says of a dead rank; it may learn of the death later than its peers."""
    block = segment.control(rank)
    deadline = time.monotonic() + _EXIT_REPORT_SECS
    while not (exited := segment.words.load(block + layout.EXITED)):  # <SYNC exited>
        if not segment.launched or not is_alive(*segment.creator) or time.monotonic() > deadline:
            return None
        time.sleep(0.001)
    return segment.words.load(block + layout.EXIT_CODE) if exited == layout.TOLD else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
