import ast
import inspect

import pytest

from cobre_shm import layout
from cobre_shm.kernels import context

HEADER_WORDS = {
    "MAGIC": 8,
    "HEADER_VERSION": 8,
    "HEADER_LAYOUT_HASH": 8,
    "HEADER_SIZE": 8,
    "HEADER_SLOT_BYTES": 8,
    "HEADER_SEGMENT_BYTES": 8,
    "HEADER_CREATOR_PID": 8,
    "HEADER_CREATOR_START": 8,
    "HEADER_BOOT_ID": 16,
    "HEADER_NONCE": 16,
    "HEADER_LAUNCHED": 8,
    "HEADER_PID_NAMESPACE": 8,
    "HEADER_CONTROL_MUTEX": 40,
    "HEADER_POISON": 8,
    "HEADER_JOINED": 8,
    "HEADER_NOTED": 8,
    "HEADER_TUNING": 8 * layout.TUNING_WORDS,
}
CONTROL_WORDS = {
    "ARRIVAL": 2 * layout.ARRIVAL_BYTES,
    "WAITERS": 4,
    "STEPS": 8,
    "DEATH_MUTEX": 40,
    "PID": 8,
    "START": 8,
    "GUARDED": 8,
    "EXITED": 8,
    "EXIT_CODE": 8,
    "STATE": 8,
    "STACK_SIGNAL": 8,
    "RECORDED": 8,
}


@pytest.mark.parametrize(
    ("words", "limit"), [(HEADER_WORDS, layout.CONTROL), (CONTROL_WORDS, layout.CONTROL_BYTES)]
)
def test_fields_do_not_overlap_and_are_aligned(words, limit):
    end = 0
    for name, nbytes in words.items():
        offset = 0 if name == "MAGIC" else getattr(layout, name)
        assert offset >= end, name
        assert offset % min(nbytes, 8) == 0, name
        end = offset + nbytes
    assert end <= limit


def test_what_waiting_ranks_poll_has_cache_lines_of_its_own():
    line = layout.LINE_BYTES
    assert line == layout.ARRIVAL_BYTES
    assert line == layout.INLINE + layout.INLINE_BYTES
    arrivals = {layout.ARRIVAL // line, layout.ARRIVAL // line + 1}
    polled_and_written = {
        "waiters": {layout.WAITERS // line},
        "steps": {layout.STEPS // line},
        "death": {layout.DEATH_MUTEX // line},
        "launcher": {layout.EXITED // line, layout.EXIT_CODE // line},
        "state": {layout.STATE // line},
        "recorded": {layout.RECORDED // line},
    }
    for name, lines in polled_and_written.items():
        others = arrivals.union(*(v for k, v in polled_and_written.items() if k != name))
        assert not lines & others, name
    assert layout.HEADER_POISON // line != layout.HEADER_CONTROL_MUTEX // line


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1024])
def test_parts_follow_each_other_without_overlap(size):
    assert layout.recorder_offset(size) == layout.CONTROL + layout.CONTROL_BYTES * size
    slots = layout.rings_offset(size)
    assert slots % layout.PAGE_BYTES == 0
    words = layout.last_words_offset(size)
    assert words >= layout.recorder_offset(size) + layout.RECORDER_BYTES * size
    assert slots >= words + layout.LAST_WORDS_BYTES * size
    assert layout.segment_bytes(size, 4096) == slots + size * layout.ring_bytes(size, 4096)


def test_poison_word_keeps_kind_rank_and_signed_value():
    for value in (-(2**31), -9, 0, 1, 2**31 - 1):
        word = layout.pack_poison(layout.ABORTED, 1023, value)
        assert 0 < word < 1 << 64
        assert layout.unpack_poison(word) == (layout.ABORTED, 1023, value)
        signed = word - (1 << 64) if word >> 63 else word
        assert layout.unpack_poison(signed) == (layout.ABORTED, 1023, value)


def test_kinds_whose_costs_are_measured_have_places_of_their_own():
    measured = layout.ALLREDUCE, layout.ALLGATHERV, layout.BROADCAST, layout.ALLREDUCE_SHARED
    assert sorted(number & (context.KINDS - 1) for number in measured) == [*range(context.KINDS)]
    # A bit each, in a signed word.
    assert context.KINDS * context.CLASSES <= 63


def test_layout_hash_depends_on_every_number(monkeypatch):
    names = [
        node.targets[0].id
        for node in ast.walk(ast.parse(inspect.getsource(layout)))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    numbers = [
        name
        for name in names
        if name.isupper() and name != "LAYOUT_HASH" and isinstance(getattr(layout, name), int)
    ]
    assert len(numbers) > 30
    for name in numbers:
        monkeypatch.setattr(layout, name, getattr(layout, name) + 1)
        monkeypatch.delattr(layout, "LAYOUT_HASH")
        assert layout._hash_of_numbers() != monkeypatch_free_hash(), name
        monkeypatch.undo()


def monkeypatch_free_hash():
    namespace = {"__name__": "copy"}
    exec(compile(inspect.getsource(layout), "layout", "exec"), namespace)
    return namespace["LAYOUT_HASH"]
