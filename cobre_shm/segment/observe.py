"""What can be said of a running group by reading its segment and the process table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cobre_shm import layout
from cobre_shm.segment.poison import read_poison
from cobre_shm.segment.process import is_alive, process_state
from cobre_shm.segment.recorder import Entry, entries, last_entry
from cobre_shm.segment.segment import Segment

__all__ = ["GroupFacts", "RankFacts", "command_line", "has_ended", "observe"]

# Some rank is behind at every moment of a healthy run: the one that arrives last. It is late when
# others have waited for it for as long as the first slice in which they sleep.
_LATE_SECS = 0.02
_LIVING = ("running", "sleeping", "in the kernel", "stopped", "traced")
_FAILURES = {
    **{kind: f"rank {{rank}} {deed}" for kind, deed in layout.DEEDS.items()},
    layout.DIED: "rank {rank} died",
    layout.TIMED_OUT: "rank {rank} gave up waiting",
    layout.STOPPED: "the launcher stopped it (signal {value})",
    layout.CONFLICT: "pid {value} asked to be rank {rank} too",
    layout.DAMAGED: "the words by which the ranks meet are damaged",
}


@dataclass(frozen=True)
class RankFacts:
    """One rank at one moment.

    Attributes:
        rank: Its number.
        pid: Of its process; None before it has joined.
        state: ``absent`` before it has joined, ``closed`` after ``close()``; otherwise of its
            process: ``running``, ``sleeping``, ``in the kernel``, ``stopped``, ``traced``,
            ``zombie`` or ``gone``.
        exit_code: Reported by the launcher, minus a signal; None while it is not known.
        is_late: Others have waited for it and still do.
        epoch: Number of exchange rounds that it has entered.
        sequence: Number of collectives that it has begun.
        call: The last one in readable form; None before the first.
        is_inside: Whether it is inside that one.
        since_secs: Since it entered that one, or since it returned from it.
        waiting_share: Part of the time spent waiting beyond spinning, over the last collectives
            (256 at most) and until now; None when it does not run.
        bytes_per_sec: Of the payloads of these collectives; None when it does not run.
    """

    rank: int
    pid: int | None
    state: str
    exit_code: int | None
    is_late: bool
    epoch: int
    sequence: int
    call: str | None
    is_inside: bool
    since_secs: float | None
    waiting_share: float | None
    bytes_per_sec: float | None


@dataclass(frozen=True)
class GroupFacts:
    """A group at one moment.

    Attributes:
        name: Of its segment, which may have been removed long ago.
        launcher: Pid of the launcher; None without one.
        program: Command line of the launcher or, without one, of a rank that runs.
        size: Number of ranks.
        has_joined: Whether all ranks have come together.
        has_ended: Whether no rank takes part any more, nor will.
        failure: The group's first failure in words, or None.
        ranks: In order.
    """

    name: str
    launcher: int | None
    program: list[str]
    size: int
    has_joined: bool
    has_ended: bool
    failure: str | None
    ranks: list[RankFacts]


def observe(segment: Segment) -> GroupFacts:
    """Look at a group. Takes as long as a rank must be behind to be called late, 20 ms."""
    late = _late_ranks(segment)
    ranks = [_look_at(segment, rank, is_late=rank in late) for rank in range(segment.size)]
    return GroupFacts(
        name=segment.name,
        launcher=segment.creator[0] if segment.launched else None,
        program=command_line(segment),
        size=segment.size,
        has_joined=segment.words.load(layout.HEADER_JOINED) == 1,  # <SYNC joined>
        has_ended=has_ended(segment),
        failure=_failure(segment),
        ranks=ranks,
    )


def has_ended(segment: Segment) -> bool:
    """Whether no rank takes part any more, nor will."""
    return all(_is_over(segment, rank) for rank in range(segment.size))


def command_line(segment: Segment) -> list[str]:
    """What the launcher, or else the first rank that runs, was started with; empty if unknown."""
    processes = [_process(segment, rank) for rank in range(segment.size)]
    # Ranks that were forked show the command line of what they were forked from.
    for pid, start in [segment.creator, *processes] if segment.launched else processes:
        if is_alive(pid, start):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            # A forked rank's is padded: it has written over one that was longer.
            return [word.decode(errors="replace") for word in words.rstrip(b"\0").split(b"\0")]
    return []


def _process(segment: Segment, rank: int) -> tuple[int, int]:
    block = segment.control(rank)
    return segment.words.load(block + layout.PID), segment.words.load(block + layout.START)


def _is_over(segment: Segment, rank: int) -> bool:
    words, block = segment.words, segment.control(rank)
    if words.load(block + layout.EXITED):  # <SYNC exited>
        return True
    if words.load(block + layout.STATE) == layout.CLOSED:  # <SYNC state>
        return True
    pid, start = _process(segment, rank)
    # Who has not claimed its block can still come while somebody keeps the segment for it.
    return not (is_alive(pid, start) if pid else segment.creator_is_alive())


def _failure(segment: Segment) -> str | None:
    first = read_poison(segment)
    if first is None:
        return None
    return _FAILURES[first.kind].format(rank=first.rank, value=first.value)


def _epochs(segment: Segment) -> list[int]:
    return [segment.arrived(rank) for rank in range(segment.size)]


def _late_ranks(segment: Segment) -> set[int]:
    """The ranks behind an epoch that others had reached, and still wait in, some time ago."""
    before = _epochs(segment)
    time.sleep(_LATE_SECS)
    after = _epochs(segment)
    newest = max(before)
    waiting = [
        rank
        for rank in range(segment.size)
        if before[rank] == after[rank] == newest
        and (entry := last_entry(segment, rank)) is not None
        and entry.is_inside
    ]
    # In a group that has failed, nobody waits any more.
    if not waiting or read_poison(segment) is not None:
        return set()
    return {rank for rank in range(segment.size) if after[rank] < newest}


def _look_at(segment: Segment, rank: int, *, is_late: bool) -> RankFacts:
    words, block = segment.words, segment.control(rank)
    pid, start = _process(segment, rank)
    state = _state(segment, rank, pid, start)
    recorded = entries(segment, rank)
    last = recorded[-1] if recorded else None
    now = time.monotonic_ns()
    is_living = state in _LIVING
    exited = words.load(block + layout.EXITED)  # <SYNC exited>
    return RankFacts(
        rank=rank,
        pid=pid or None,
        state=state,
        exit_code=words.load(block + layout.EXIT_CODE) if exited == layout.TOLD else None,
        is_late=is_late,
        epoch=segment.arrived(rank),
        sequence=last.sequence if last else 0,
        call=last.call if last else None,
        is_inside=last is not None and last.is_inside,
        since_secs=(now - (last.end_ns or last.start_ns)) / 1e9 if last else None,
        waiting_share=_waiting_share(recorded, now) if is_living else None,
        bytes_per_sec=_bytes_per_sec(recorded, now) if is_living else None,
    )


def _state(segment: Segment, rank: int, pid: int, start: int) -> str:
    state = segment.words.load(segment.control(rank) + layout.STATE)  # <SYNC state>
    if state == layout.CLOSED:
        return "closed"
    return process_state(pid, start) if pid else "absent"


def _waiting_share(recorded: list[Entry], now: int) -> float:
    if not recorded:
        return 0.0
    window = max(1, now - recorded[0].start_ns)
    return min(1.0, sum(entry.waited_ns for entry in recorded) / window)


def _bytes_per_sec(recorded: list[Entry], now: int) -> float:
    if not recorded:
        return 0.0
    window = max(1, now - recorded[0].start_ns)
    return sum(entry.nbytes for entry in recorded if not entry.is_inside) * 1e9 / window
