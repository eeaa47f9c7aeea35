"""Reading the flight recorder: what a rank called, also after its death.

A rank writes the entry of collective s into place (s - 1) % 256 of its ring, the sequence word
first, and then stores ``recorded`` = s (release). Until it has returned it changes the words
waited, end and status, in this order. Nobody waits for readers, so a reader must tell what it
read in peace:

    A  recorded = r                   load                        <SYNC recorded>
       the entry r, status first, then the whole ring
    B  recorded = r'                  load, after the ring        <SYNC recorded>

- Entry q < r is complete: the rank finished it before it stored r.
- Entry r: a status other than "inside" was stored last, so what is read after it is final. With
  "inside", it had not returned when the status was read, whatever its end word says by then.
- Place q is written again by collective q + 256, which follows the store of ``recorded`` =
  q + 255 (a full fence, publishing an arrival, lies between). If r' < q + 255, that had not begun
  before B: q was read in peace.
- If r' = q + 255, the oldest place, it may have begun. It stores the new sequence word first, so
  q was read in peace if its sequence word still says q when it is loaded last of all.
- Older ones are dropped.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cobre_shm import layout
from cobre_shm.call_text import WITHOUT_ELEMENTS, words_text
from cobre_shm.datatypes import tag_itemsize
from cobre_shm.segment.segment import Segment

__all__ = ["Entry", "entries", "last_entry"]

_WORDS = struct.Struct("<8q")
_DONE, _INSIDE = 0, 1
# What kernels return (``kernels/context.py``), in words.
_STATUSES = {
    _DONE: "done",
    _INSIDE: "inside",
    2: "failed",
    3: "peer died",
    4: "mismatch",
    7: "peer not readable",
    8: "peer left",
}
# A reader that loses its core for the length of a whole ring tries again.
_ATTEMPTS = 4


class Entry(NamedTuple):
    """One collective of one rank.

    Attributes:
        sequence: Its number in this communicator, from 1.
        nbytes: Bytes that were exchanged, all elements together; 0 when the dtype is a record,
            whose size is not recorded, and when a region is only being made.
        call: Readable form of what was called.
        start_ns: Monotonic clock at the call.
        waited_ns: Time spent waiting, beyond spinning. Of a wait that goes on, the part until
            its last time slice (up to a second).
        end_ns: Monotonic clock at the return; 0: it has not returned.
        status: ``done``, ``inside``, or how it failed.
    """

    sequence: int
    nbytes: int
    call: str
    start_ns: int
    waited_ns: int
    end_ns: int
    status: str

    @property
    def is_inside(self) -> bool:
        """Whether the rank had not returned from it."""
        return self.end_ns == 0

    def __str__(self) -> str:
        state = "finished" if self.status == "done" else "was inside"
        return f"{state} collective {self.sequence}, {self.call}"


def last_entry(segment: Segment, rank: int) -> Entry | None:
    """Return the last collective that ``rank`` began, or None."""
    recorded = segment.words.load(segment.control(rank) + layout.RECORDED)  # <SYNC recorded>
    return _entry(_load_place(segment, rank, recorded)) if recorded > 0 else None


def entries(segment: Segment, rank: int) -> list[Entry]:
    """Return the last collectives of a rank that may be calling more of them, oldest first.

    At most 256; those that the rank replaced while they were read are left out.
    """
    for _ in range(_ATTEMPTS):
        found = _read_ring(segment, rank)
        if found:
            return found
    return []


def _read_ring(segment: Segment, rank: int) -> list[Entry]:
    words, block = segment.words, segment.control(rank)
    recorded = words.load(block + layout.RECORDED)  # <SYNC recorded>
    if recorded <= 0:
        return []
    newest = _load_place(segment, rank, recorded)
    copied = words.load_bytes(_ring(segment, rank), layout.RECORDER_BYTES)
    places = list(_WORDS.iter_unpack(copied))
    latest = words.load(block + layout.RECORDED)  # <SYNC recorded>: after the copy
    oldest = latest - layout.RECORDER_ENTRIES + 1
    if oldest > 0 and _load_place(segment, rank, oldest)[0] != oldest:
        oldest += 1
    kept = [
        _entry(place)
        for sequence in range(max(1, oldest, recorded - layout.RECORDER_ENTRIES), recorded)
        # In a damaged segment anything may stand there.
        if (place := places[(sequence - 1) % layout.RECORDER_ENTRIES])[0] == sequence
    ]
    if newest[0] == recorded and recorded >= oldest:
        kept.append(_entry(newest))
    return kept


def _ring(segment: Segment, rank: int) -> int:
    return layout.recorder_offset(segment.size) + rank * layout.RECORDER_BYTES


def _load_place(segment: Segment, rank: int, sequence: int) -> tuple[int, ...]:
    """The words of an entry's place, the status loaded first and the sequence last."""
    place = _ring(segment, rank) + (sequence - 1) % layout.RECORDER_ENTRIES * layout.ENTRY_BYTES
    backwards = [
        segment.words.load(place + offset) for offset in range(layout.ENTRY_BYTES - 8, -8, -8)
    ]
    return tuple(reversed(backwards))


def _entry(place: tuple[int, ...]) -> Entry:
    sequence, what, tag, count, start_ns, waited_ns, end_ns, status = place
    operation = what & 0xFF
    moves_elements = operation not in (*WITHOUT_ELEMENTS, layout.REGION)
    # The lengths that an allgatherv begins with are integers, whatever it is going to carry.
    item_bytes = 8 if operation == layout.COUNTS else tag_itemsize(tag)
    return Entry(
        sequence=sequence,
        nbytes=count * item_bytes if moves_elements else 0,
        call=words_text(what, tag, count),
        start_ns=start_ns,
        waited_ns=waited_ns,
        end_ns=0 if status == _INSIDE else end_ns,
        status=_STATUSES.get(status, f"status {status}"),
    )
