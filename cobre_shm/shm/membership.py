"""One rank's part in a group: joining, running a collective to its end, failing, leaving."""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import NoReturn, Self

import numpy as np

from cobre_shm import fastcall, layout
from cobre_shm.communicator import exit_status
from cobre_shm.errors import CollectiveFailed, InvalidCommunicator
from cobre_shm.failpoints import ENABLED, reach
from cobre_shm.kernels import context
from cobre_shm.member import Member
from cobre_shm.native.entry import BARRIER, CLAIM, Kernel
from cobre_shm.segment.failure import failure, mismatch, missing_ranks
from cobre_shm.segment.join import join, leave
from cobre_shm.segment.last_words import write_last_words
from cobre_shm.segment.libc import allow_reading_by
from cobre_shm.segment.patience import Patience, look_secs
from cobre_shm.segment.poison import Poison, poison, read_poison
from cobre_shm.segment.process import is_alive, is_dying
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm.state import UNJOINED, let_sleep, new_context, touch_rings, tuning_words
from cobre_shm.tuning import NEVER, READ_BYTES, load_tuning

__all__ = ["Membership"]

# The kernel may take the memory of a rank that it kills for want of memory before the rank ends.
_DYING_SECS = 5.0


def _abandoner(ref: weakref.ref[Membership]) -> Callable[[], None]:
    """Return what kernels call to have a communicator abandon its collective."""

    def abandon() -> None:
        comm = ref()
        if comm is not None:
            comm._abandon()

    return abandon


class Membership(fastcall.ContextFirst, Member):
    """A communicator as far as it belongs to a group, without any operation.

    Args:
        config: As of :class:`ShmCommunicator`.
        made: The group's segment, if this process has made it already.
    """

    backend = "shm"
    _unusable: CollectiveFailed | InvalidCommunicator | None = InvalidCommunicator(
        "The communicator has not joined a group", context={"backend": "shm"}
    )

    def __new__(cls, *_: object, **__: object) -> Self:
        """Return one that has not joined, and refuses to begin anything."""
        self = super().__new__(cls)
        self._context = UNJOINED
        return self

    def __init__(self, config: ShmConfig, made: Segment | None) -> None:
        self.rank: int = config.rank
        self.size: int = config.size
        self.is_leader: bool = config.rank == 0
        self._config = config
        self._is_occupied = self._has_rings = self._is_claimed = False
        # Taken for good by the first that leaves: two must not give the segment back.
        self._left = threading.Lock()
        self._pid = os.getpid()
        chosen = load_tuning(config.tuning) if config.tuning else {}
        self._segment = join(
            config.name,
            config.rank,
            config.size,
            config.slot_bytes,
            config.timeout_secs,
            lambda segment: tuning_words(segment, chosen),
            made,
            config.stall_warn_secs,
        )
        try:
            self._furnish()
        except BaseException:
            # Nobody could close this, and the peers would wait for it.
            poison(self._segment, layout.INTERRUPTED, self.rank)
            self._retire()
            self._context = UNJOINED
            leave(self._segment, self.rank)
            raise

    def _furnish(self) -> None:
        """Make what a rank needs that has joined."""
        config = self._config
        self.slot_bytes: int = self._segment.slot_bytes
        room = 3 * config.size + 3 + context.COSTS_WORDS
        self._private = np.zeros(room, dtype=np.int64)
        self._scratch = np.empty(context.SCRATCH_BYTES + layout.LINE_BYTES, dtype=np.uint8)
        state = new_context(self._segment, config.rank, self._scratch)
        displs, arguments, sources, costs = np.split(
            self._private, (config.size, config.size + 3, 3 * config.size + 3)
        )
        state[context.SOURCES] = sources.ctypes.data
        state[context.COSTS] = costs.ctypes.data
        fastcall.serve(type(self), state, displs, arguments)
        self._abandoner = _abandoner(weakref.ref(self))
        state[context.ABANDON] = id(self._abandoner)
        self._look_secs = look_secs(self._segment, config.timeout_secs, config.stall_warn_secs)
        # The word and the state of a peer, the poison, and the death of every other rank.
        self._watched = np.zeros((config.size + 2, context.WATCH_BYTES // 8), dtype=np.int64)
        let_sleep(state, self._segment, self._look_secs, self._watched)
        self._known = fastcall.Known(state)
        self._address = state.ctypes.data
        self._context = state
        self._open_to_peers()
        self._unusable = None
        self._enlist()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Close what was dropped: peers see a rank that has left.

        Not at the end of the process: a rank that ends without ``close()`` has failed. Not by a
        weak reference: what else is collected with this may still call it, and must find it closed.
        """
        if is_finalizing() or self._context is UNJOINED or self._left.locked():
            return
        # Not out of the set of the living, which somebody may be looking through.
        self._unusable = self._closed()
        self._context[context.BUSY] = 1
        if os.getpid() != self._pid:
            return
        self._leave()
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)

    def _open_to_peers(self) -> None:
        """Let the ranks of a launcher read this one's memory, if they ever would."""
        # They are not each other's ancestors, but all are the launcher's descendants.
        if self._segment.launched and self._context[context.TUNING + READ_BYTES] < NEVER:
            allow_reading_by(self._segment.creator[0])

    def abort(self, code: int = 1) -> NoReturn:
        """See :meth:`Communicator.abort`."""
        status = exit_status(code)
        if not self._is_over():
            self._bar()
            first = poison(self._segment, layout.ABORTED, self.rank, status)
            self._unusable = self._failure(first)
        raise SystemExit(status)

    def close(self) -> None:
        """See :meth:`Communicator.close`. A collective that runs in another thread goes on."""
        if self._context is UNJOINED or self._left.locked() or os.getpid() != self._pid:
            return
        try:
            is_free = CLAIM.call(self._address, 0) == context.READY
        except BaseException:
            # Perhaps by this, and the next close() shall not take it for another thread's.
            self._is_claimed = True
            raise
        if not is_free and self._unusable is None:
            if not self._is_claimed:
                raise InvalidCommunicator(
                    "Another thread is inside a collective: close() must wait"
                )
            self._is_occupied = True
        try:
            self._retire()
            self._give_back()
        finally:
            self._leave()

    def _leave(self) -> None:
        """Give the segment back, unless a thread or a signal handler has closed this meanwhile."""
        if self._left.acquire(blocking=False):
            leave(self._segment, self.rank, stay_mapped=self._is_occupied)

    def _give_back(self) -> None:
        """Release what this rank holds besides the segment, which goes next."""

    def _fail_for(self, text: str) -> None:
        write_last_words(self._segment, self.rank, text)
        self._bar()
        self._unusable = self._failure(poison(self._segment, layout.RAISED, self.rank))

    def _disown(self) -> None:
        self._context[context.BUSY] = 1

    def _begun(self) -> int:
        return int(self._context.item(context.SEQUENCE))

    def _bar(self) -> None:
        """Let nobody begin a collective any more, and see whether a thread is inside one.

        That thread learns of the failure when it next looks, perhaps after this communicator has
        been closed. So it keeps the memory.
        """
        if CLAIM.call(self._address, 0) != context.READY and self._unusable is None:
            self._is_occupied = True

    def _map_rings(self) -> None:
        """Map the rings, once, before the first collective that may use them.

        Their memory is reserved since the segment was made; a group that only meets does without
        the time to clear and map it. Plans and jitted code, which do not come by ``_run``, call
        this themselves.
        """
        if not self._has_rings and self._unusable is None:
            self._has_rings = True
            touch_rings(self._context)

    def _run(self, kernel: Kernel, resume: int, *args: int) -> None:
        """Call a kernel; ``resume``: it has begun already and handed control back.

        The first collective of a dtype comes this way, whatever way those take that follow.
        """
        if kernel is not BARRIER:
            self._map_rings()
        if ENABLED:
            reach("idle", self.rank, int(self._context[context.SEQUENCE]) + 1)
        status, before = context.PENDING, self._begun()
        try:
            # After a sleep Python looks around before the next, which may be longer.
            if not (resume and self._context[context.ASLEEP]):
                status = kernel.call(self._address, resume, *args)
            if status != context.READY:
                self._settle(kernel, status, args)
        except BaseException:
            # If it has not begun, then it is another thread that is inside one.
            has_begun = resume or self._begun() != before
            if has_begun and status != context.TAKEN and self._context[context.BUSY]:
                self._abandon()
            raise
        if ENABLED:
            reach("done", self.rank, int(self._context[context.SEQUENCE]))

    def _settle(self, kernel: Kernel, status: int, args: tuple[int, ...]) -> None:
        """Go on with a collective that came back with another status than READY."""
        if status == context.TAKEN:
            self._check_usable()
            raise self._taken()
        self._complete(status, lambda: kernel.call(self._address, 1, *args))

    def _complete(self, status: int, resume: Callable[[], int]) -> None:
        """Go on with a kernel that handed control back, until it is done or the group is lost."""
        state, config = self._context, self._config
        limits = config.timeout_secs, config.stall_warn_secs
        watch = Patience(self._segment, self.rank, *limits, self._look_secs)
        while status in (context.PENDING, context.LONGER):
            epoch, steps = int(state[context.EPOCH]), int(state[context.AWAITED_STEPS])
            first = watch.look(epoch, steps)
            if first is not None:
                self._fail_unless_arrived(first)
            status = resume()
        if status == context.READY:
            return
        self._record_failure(status)
        if status == context.MISMATCH:
            self._unusable = mismatch(self._segment)
            raise copy.copy(self._unusable)
        if status == context.DEAD:
            suspect = int(self._context[context.SUSPECT])
            self._fail(poison(self._segment, layout.DIED, suspect))
        if status == context.LEFT:
            suspect = int(self._context[context.SUSPECT])
            self._fail(poison(self._segment, layout.LEFT, suspect))
        if status == context.LOST:
            self._lose(int(self._context[context.SUSPECT]))
        first = read_poison(self._segment)
        self._fail(first or Poison(layout.DIED, self.rank, 0))

    def _abandon(self) -> None:
        """Fail the group, unless it has failed: an exception left a collective unfinished."""
        if self._unusable is None:
            self._unusable = self._failure(poison(self._segment, layout.INTERRUPTED, self.rank))

    def _lose(self, suspect: int) -> NoReturn:
        """Fail because private memory of ``suspect`` could not be read: as a rule it has died."""
        words, block = self._segment.words, self._segment.control(suspect)
        pid, start = words.load(block + layout.PID), words.load(block + layout.START)
        deadline = time.monotonic() + _DYING_SECS
        # Its memory goes some time before it counts as ended.
        while is_alive(pid, start) and not is_dying(pid):
            if time.monotonic() > deadline:
                self._fail_for(
                    f"Rank {self.rank} could not read memory of rank {suspect} (pid {pid}), which "
                    "lives: is its buffer a file that was cut off, or has it changed its user?"
                )
                raise copy.copy(self._unusable)  # type: ignore[misc]
            time.sleep(0.001)
        self._fail(poison(self._segment, layout.DIED, suspect))

    def _fail_unless_arrived(self, first: Poison) -> None:
        """Fail for ``first``, unless everybody has reached this round: then it completes."""
        state = self._context
        if missing_ranks(
            self._segment, int(state[context.EPOCH]), int(state[context.AWAITED_STEPS])
        ):
            self._record_failure(context.POISONED)
            self._fail(first)

    def _record_failure(self, status: int) -> None:
        words = self._segment.words
        entry = int(self._context[context.ENTRY]) - words.address
        words.store(entry + layout.ENTRY_END, time.monotonic_ns())
        words.store(entry + layout.ENTRY_STATUS, status)

    def _fail(self, first: Poison) -> NoReturn:
        self._unusable = self._failure(first)
        raise copy.copy(self._unusable)

    def _failure(self, first: Poison) -> CollectiveFailed:
        return failure(self._segment, first, self._config.timeout_secs)
