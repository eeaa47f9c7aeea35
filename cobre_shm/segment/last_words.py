"""The text that a failing rank leaves for the others: its traceback."""

from __future__ import annotations

from cobre_shm import layout
from cobre_shm.segment.segment import Segment

__all__ = ["read_last_words", "write_last_words"]

_LENGTH_BYTES = 8


def write_last_words(segment: Segment, rank: int, text: str) -> None:
    """Leave ``text``, the end of it if it is long. Before poisoning, which publishes it."""
    data = text.encode("utf-8", "replace")[_LENGTH_BYTES - layout.LAST_WORDS_BYTES :]
    offset = layout.last_words_offset(segment.size) + rank * layout.LAST_WORDS_BYTES
    segment.words.store_bytes(offset + _LENGTH_BYTES, data)
    segment.words.store(offset, len(data))


def read_last_words(segment: Segment, rank: int) -> str:
    """Return what a rank left, or nothing."""
    offset = layout.last_words_offset(segment.size) + rank * layout.LAST_WORDS_BYTES
    length = segment.words.load(offset)
    if not 0 < length <= layout.LAST_WORDS_BYTES - _LENGTH_BYTES:
        return ""
    return segment.words.load_bytes(offset + _LENGTH_BYTES, length).decode("utf-8", "replace")
