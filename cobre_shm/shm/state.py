"""What a rank begins with: the state of its kernels, and the words that rank 0 publishes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from cobre_shm import layout
from cobre_shm.communicator import Array
from cobre_shm.cpus import cgroup_quota
from cobre_shm.failpoints import armed
from cobre_shm.kernels import context
from cobre_shm.segment.pages import touch
from cobre_shm.segment.patience import has_marks
from cobre_shm.segment.segment import Segment
from cobre_shm.tuning import NAMES, SPIN_PAUSES, default_tuning

__all__ = ["UNJOINED", "let_sleep", "new_context", "touch_rings", "tuning_words"]

# Upper bound of the adaptive spin, in pauses (about 50 us): shorter than any time slice.
_SPIN_LIMIT_MAX = 2000
# Limits may be as short as one likes.
_SLICE_SECS_MIN = 0.02
# Mapped all at once: with slots of the usual size, the rings of up to 84 ranks.
_TOUCHED_BYTES = 64 << 20

# Of a communicator whose construction did not come to its end: nothing may begin.
UNJOINED = np.zeros(context.WORDS, dtype=np.int64)
UNJOINED[context.SELF] = UNJOINED.ctypes.data
UNJOINED[context.BUSY] = 1


def tuning_words(segment: Segment, chosen: dict[str, int]) -> list[int]:
    """What rank 0 publishes: the chosen switch points, and the defaults of this machine."""
    words = segment.words
    allowed: set[int] = set()
    for rank in range(segment.size):
        # Each rank may be bound to processors of its own.
        with contextlib.suppress(OSError):
            allowed |= os.sched_getaffinity(words.load(segment.control(rank) + layout.PID))
    quota = cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")) or segment.size
    values = default_tuning(segment.size, min(len(allowed), int(quota))) | chosen
    return [values[name] for name in NAMES]


def new_context(segment: Segment, rank: int, scratch: Array) -> Array:
    """Return the words of ``kernels/context.py`` for a rank that has joined.

    Args:
        segment: Of the group.
        rank: In it.
        scratch: SCRATCH_BYTES and a cache line, kept by the caller.
    """
    address, size = segment.words.address, segment.size
    state = np.zeros(context.WORDS, dtype=np.int64)
    state[context.SELF] = state.ctypes.data
    state[context.SCRATCH] = -(-scratch.ctypes.data // layout.LINE_BYTES) * layout.LINE_BYTES
    for index in range(layout.TUNING_WORDS):
        state[context.TUNING + index] = segment.words.load(layout.HEADER_TUNING + 8 * index)
    state[context.RANK] = rank
    state[context.SIZE] = size
    state[context.CONTROL] = address + layout.CONTROL
    state[context.RINGS] = address + layout.rings_offset(size)
    state[context.SLOT_BYTES] = segment.slot_bytes
    state[context.RING_BYTES] = layout.ring_bytes(size, segment.slot_bytes)
    state[context.POSITION] = layout.SMALL_SLOTS_BYTES
    state[context.POISON] = address + layout.HEADER_POISON
    state[context.RECORDER] = address + layout.recorder_offset(size) + rank * layout.RECORDER_BYTES
    state[context.SPIN_LIMIT_MAX] = _SPIN_LIMIT_MAX
    directive = armed()
    state[context.FAIL_PHASE] = -1
    if directive is not None and directive.rank == rank:
        state[context.FAIL_PHASE] = directive.phase
        state[context.FAIL_SEQUENCE] = directive.sequence
    # While it spins a rank looks at nothing else.
    state[context.SPIN_LIMIT] = min(state[context.TUNING + SPIN_PAUSES], _SPIN_LIMIT_MAX)
    return state


def let_sleep(state: Array, segment: Segment, look_secs: float, watched: Array) -> None:
    """Tell the kernels how long to sleep in one piece, and whether they can watch for deaths.

    Args:
        state: The context.
        segment: Of the group, all of which has joined.
        look_secs: After which a waiting rank has to look around in Python.
        watched: Room for the list of what a sleeper watches, kept by the caller.
    """
    state[context.SLICE_NS] = int(max(look_secs, _SLICE_SECS_MIN) * 1e9)
    is_seen = has_marks(segment) and watched.nbytes <= context.WATCHED_MAX * context.WATCH_BYTES
    state[context.WATCH_LIST] = watched.ctypes.data if is_seen else 0


def touch_rings(state: Array) -> None:
    """Map the rings: a page that is touched for the first time costs more than a collective.

    The own one first, so that clearing is divided among the ranks; then those of all, where that
    is a matter of milliseconds.
    """
    ring_bytes, size = int(state[context.RING_BYTES]), int(state[context.SIZE])
    own = int(state[context.RINGS]) + int(state[context.RANK]) * ring_bytes
    touch(own, min(ring_bytes, _TOUCHED_BYTES))
    if size * ring_bytes <= _TOUCHED_BYTES:
        touch(int(state[context.RINGS]), size * ring_bytes)
