"""What ranks say on stderr, and which of it a group says once."""

from __future__ import annotations

import sys
from contextlib import suppress

from cobre_shm import layout
from cobre_shm.segment.segment import Segment

__all__ = ["NO_FUTEX", "NO_ROBUST_LIST", "note_once", "say"]

# A bit of the segment's word, and the text.
NO_FUTEX = (
    1,
    "this system refuses futex between processes: ranks that wait long look up to 200 times a "
    "second whether it is over",
)
NO_ROBUST_LIST = (
    2,
    "this system refuses robust mutexes (set_robust_list): a rank's death is found in the process "
    "table, up to 0.2 s later",
)


def say(text: str) -> None:
    """Write a line on stderr, if there is one: a full disk is no reason to lose the group."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(f"cobre_shm: {text}", file=sys.stderr, flush=True)


def note_once(segment: Segment, note: tuple[int, str]) -> None:
    """Print one line, unless a rank of the group has done so."""
    bit, text = note
    with segment.control_lock():
        noted = segment.words.load(layout.HEADER_NOTED)
        segment.words.store(layout.HEADER_NOTED, noted | bit)
    if not noted & bit:
        say(text)
