"""Free parts of a range, against a map of every byte."""

import random

import pytest

from cobre_shm.segment.free_space import FreeSpace

NBYTES = 400


def parts_of(is_free):
    """The maximal runs of free bytes: (size, offset), ascending."""
    parts, start = [], None
    for offset, free in enumerate([*is_free, False]):
        if free and start is None:
            start = offset
        elif not free and start is not None:
            parts.append((offset - start, start))
            start = None
    return sorted(parts)


@pytest.mark.parametrize("seed", range(20))
def test_smallest_then_lowest_part_is_taken_and_neighbours_are_merged(seed):
    chosen = random.Random(seed)
    space, is_free, taken = FreeSpace(), [False] * NBYTES, []
    space.add(0, NBYTES)
    is_free = [True] * NBYTES
    for _ in range(500):
        if taken and chosen.random() < 0.5:
            offset, nbytes = taken.pop(chosen.randrange(len(taken)))
            space.add(offset, nbytes)
            is_free[offset : offset + nbytes] = [True] * nbytes
        else:
            nbytes = chosen.choice((1, 2, 3, 10, 60))
            fitting = [part for part in parts_of(is_free) if part[0] >= nbytes]
            offset = space.take(nbytes)
            assert offset == (fitting[0][1] if fitting else None)
            if offset is not None:
                taken.append((offset, nbytes))
                is_free[offset : offset + nbytes] = [False] * nbytes
        parts = parts_of(is_free)
        assert len(space) == len(parts)
        at_end = [size for size, offset in parts if offset + size == NBYTES]
        assert space.bytes_before(NBYTES) == sum(at_end)
    for offset, nbytes in taken:
        space.add(offset, nbytes)
    assert (len(space), space.take(NBYTES), space.take(1)) == (1, 0, None)
