"""A group's segment by its name: made by rank 0, found by the others, never taken for another's.

A segment whose creator is dead is no group: who looks for one goes on looking. Rank 0 removes it,
and so does a rank that looked in vain, when all of its processes are dead; likewise one of this
user that is not made ready in time, whose creator was killed in the middle. A segment with a
living process is left alone.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from cobre_shm.errors import InitializationFailed
from cobre_shm.reminder import Reminder
from cobre_shm.segment.leftovers import remove_unready
from cobre_shm.segment.notes import say
from cobre_shm.segment.process import start_text, start_time
from cobre_shm.segment.segment import Segment
from cobre_shm.segment.unnamed import descriptor_of

__all__ = ["LOOK_SECS", "find_or_create"]

LOOK_SECS = 0.002
# A creator needs microseconds between the name and the magic word. Longer: it was killed there.
_UNREADY_SECS = 2.0


def find_or_create(
    name: str, rank: int, size: int, slot_bytes: int, timeout: float, stall_warn: float
) -> tuple[Segment, bool]:
    """Return the segment, and whether this process made it; the rest as for ``join``."""
    if descriptor_of(name) is not None:
        return Segment.inherit(name), False
    begun, reminder = time.monotonic(), Reminder(stall_warn)
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
                with segment.without_mapping():
                    if segment.creator_is_alive() and (segment.launched or rank != 0):
                        return segment, False
                if rank == 0:
                    _refuse_living(segment)
                    _remove_dead(segment)
                    continue
                if waited > timeout and not _living_process(segment):
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
        if reminder.is_due(waited):
            say(f"rank {rank} has waited {waited:.0f} s for segment {name}, which rank 0 makes")
        time.sleep(LOOK_SECS)


def _living_process(segment: Segment) -> int:
    with segment.without_mapping():
        return segment.living_process()


def _refuse_living(segment: Segment) -> None:
    pid = _living_process(segment)
    if pid:
        name, uid, started = segment.name, os.geteuid(), "at an unknown time"
        segment.close()
        with suppress(OSError):
            started = start_text(start_time(pid))
        raise InitializationFailed(
            "shm",
            f"Segment {name} is in use by pid {pid} (uid {uid}, started {started})",
            operation="create",
            context={
                "code": "NameInUse",
                "segment": name,
                "pid": pid,
                "uid": uid,
                "started": started,
            },
            suggestion="Choose another COBRE_SHM_NAME, or end that run.",
        )


def _remove_dead(segment: Segment) -> None:
    segment.unlink()
    _notice(segment.name, f"left by a dead run (pid {segment.creator[0]})")
    segment.close()


def _notice(name: str, what: str) -> None:
    say(f"removed segment {name}, {what}")
