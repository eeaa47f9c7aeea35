"""Where the slots of a round lie: never where a slow peer may still read those of the last one."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobre_shm import layout
from cobre_shm.kernels import context
from cobre_shm.kernels.rounds import take_slots

PAGE = layout.PAGE_BYTES


def places(size, slot_bytes, rounds):
    """Return the first and last byte, plus one, of each round's slots; None where it has none."""
    ctx = [0] * context.WORDS
    ctx[context.SLOT_BYTES] = slot_bytes
    ctx[context.RING_BYTES] = layout.ring_bytes(size, slot_bytes)
    ctx[context.POSITION] = layout.SMALL_SLOTS_BYTES
    for nbytes in rounds:
        if nbytes is None:
            yield None
        else:
            take_slots.py_func(ctx, nbytes)
            yield ctx[context.COMING], ctx[context.COMING] + nbytes
        ctx[context.EPOCH] += 1


@pytest.mark.parametrize("size", [2, layout.MANY_RANKS + 1])
@pytest.mark.parametrize("slot_bytes", [PAGE, 2 * PAGE, 64 * PAGE])
@given(data=st.data())
def test_slots_of_consecutive_rounds_do_not_meet(size, slot_bytes, data):
    a_round = st.one_of(st.none(), st.integers(1, slot_bytes), st.sampled_from([PAGE, slot_bytes]))
    found = list(places(size, slot_bytes, data.draw(st.lists(a_round, max_size=60))))
    for place in found:
        if place is not None:
            assert 0 <= place[0] < place[1] <= layout.ring_bytes(size, slot_bytes)
            assert place[0] % layout.LINE_BYTES == 0
    for before, after in itertools.pairwise(found):
        if before is not None and after is not None:
            assert before[1] <= after[0] or after[1] <= before[0]


def test_ring_of_two_large_slots_would_not_do():
    """The check above can fail: with less room the slots of two rounds meet."""
    ctx = [0] * context.WORDS
    ctx[context.SLOT_BYTES] = 2 * PAGE
    ctx[context.RING_BYTES] = layout.SMALL_SLOTS_BYTES + 4 * PAGE
    ctx[context.POSITION] = layout.SMALL_SLOTS_BYTES + PAGE
    take_slots.py_func(ctx, 2 * PAGE)
    first = ctx[context.COMING]
    take_slots.py_func(ctx, 2 * PAGE)
    assert abs(ctx[context.COMING] - first) < 2 * PAGE


def test_large_payloads_use_the_whole_ring():
    slots = [place[0] for place in places(2, 64 * PAGE, [64 * PAGE] * 16)]
    assert len(set(slots)) == 8
    assert slots[:8] == slots[8:]
