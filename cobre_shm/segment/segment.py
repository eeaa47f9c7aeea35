"""One mapped segment: creating, opening with distrust, removing its name, unmapping."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self

from cobre_shm import layout
from cobre_shm.failpoints import reach
from cobre_shm.segment.libc import (
    RobustMutex,
    futex_wake_all,
    map_private_over,
    map_shared,
    unmap,
)
from cobre_shm.segment.posix import (
    UntrustedObject,
    create_object,
    open_object,
    remove_object,
    unlink_object,
)
from cobre_shm.segment.process import boot_id, is_alive, pid_namespace, start_time
from cobre_shm.segment.refusal import incompatible, system_error
from cobre_shm.segment.unnamed import create_unnamed, descriptor_of, open_inherited
from cobre_shm.segment.words import FileWords, Words

__all__ = ["Segment"]

# The control mutex is held for a few microseconds. Whoever holds it longer is stopped.
_CONTROL_LOCK_SECS = 1.0


class Segment:
    """A segment that this process has mapped.

    Attributes:
        name: POSIX name, with its slash, or ``fd:N`` for an inherited descriptor.
        size: Number of ranks.
        slot_bytes: Bytes of one slot.
        nbytes: Bytes of the segment.
        words: Its shared words, by offset (see ``cobre_shm.layout``).
    """

    _is_writable: ClassVar[bool] = True

    def __init__(self, name: str, fd: int, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self._fd: int | None = fd
        try:
            self.words: Words = Words(map_shared(fd, nbytes, writable=self._is_writable))
        except BaseException:
            os.close(fd)
            raise
        self.size: int = 0
        self.slot_bytes: int = 0

    @staticmethod
    def random_name() -> str:
        """Return a name that nobody else has."""
        return f"/cobre-{os.urandom(12).hex()}"

    @classmethod
    def create(
        cls,
        name: str,
        size: int,
        *,
        slot_bytes: int = layout.DEFAULT_SLOT_BYTES,
        launched: bool = False,
    ) -> Self:
        """Create the segment of a new group and make it ready for attaching.

        Args:
            name: POSIX name.
            size: Number of ranks.
            slot_bytes: Bytes of one slot, a multiple of the page.
            launched: Whether this process is a launcher that will report the ranks' ends.

        Raises:
            FileExistsError: The name is taken.
            AllocationFailed: The memory is not there; nothing is left.
            InitializationFailed: The system refused something else; nothing is left.
        """
        nbytes = layout.segment_bytes(size, slot_bytes)
        fd = create_object(name, nbytes)
        try:
            return cls._made(name, fd, nbytes, size, slot_bytes, launched=launched)
        except BaseException:
            # A ^C too.
            remove_object(name)
            raise

    @classmethod
    def create_unnamed(
        cls, size: int, *, slot_bytes: int = layout.DEFAULT_SLOT_BYTES, launched: bool = False
    ) -> Self:
        """Create the segment of a new group as a memfd, which ranks must be handed.

        Args:
            size: Number of ranks.
            slot_bytes: As for :meth:`create`.
            launched: As for :meth:`create`.

        Raises:
            AllocationFailed: The memory is not there; nothing is left.
            InitializationFailed: The system refused something else; nothing is left.
        """
        nbytes = layout.segment_bytes(size, slot_bytes)
        fd = create_unnamed(cls.random_name(), nbytes)
        return cls._made(f"fd:{fd}", fd, nbytes, size, slot_bytes, launched=launched)

    @classmethod
    def _made(
        cls, name: str, fd: int, nbytes: int, size: int, slot_bytes: int, *, launched: bool
    ) -> Self:
        """Map new memory and make it ready; whatever fails, ``fd`` is closed."""
        segment = None
        try:
            segment = cls(name, fd, nbytes)
            reach("create", 0)
            segment._make_ready(size, slot_bytes, launched=launched)
        except BaseException as error:
            # A ^C too.
            if segment is not None:
                segment.close()
            if isinstance(error, OSError):
                raise system_error(name, error) from error
            raise
        return segment

    def _make_ready(self, size: int, slot_bytes: int, *, launched: bool) -> None:
        words = self.words
        words.store(layout.HEADER_CREATOR_PID, os.getpid())
        words.store(layout.HEADER_CREATOR_START, start_time(os.getpid()))
        words.store_bytes(layout.HEADER_BOOT_ID, boot_id())
        words.store_bytes(layout.HEADER_NONCE, os.urandom(16))
        words.store(layout.HEADER_VERSION, layout.VERSION)
        words.store(layout.HEADER_LAYOUT_HASH, layout.LAYOUT_HASH)
        words.store(layout.HEADER_SIZE, size)
        words.store(layout.HEADER_SLOT_BYTES, slot_bytes)
        words.store(layout.HEADER_SEGMENT_BYTES, self.nbytes)
        words.store(layout.HEADER_LAUNCHED, int(launched))
        words.store(layout.HEADER_PID_NAMESPACE, pid_namespace())
        self.size, self.slot_bytes = size, slot_bytes
        self._control_mutex().initialise()
        for rank in range(size):
            self.death_mutex(rank).initialise()
        words.store(0, layout.MAGIC)  # <SYNC ready>: release, everything above is there
        reach("ready", 0)

    @classmethod
    def open(cls, name: str) -> Self | None:
        """Open an existing segment; None while it is absent or not ready.

        Raises:
            InitializationFailed: It is not ours, or of another version or layout.
        """
        try:
            fd, nbytes = open_object(name, layout.CONTROL)
        except FileNotFoundError:
            return None
        except UntrustedObject as error:
            raise incompatible(name, str(error)) from error
        segment = cls(name, fd, nbytes)
        try:
            with segment.without_mapping():
                is_ready = segment._is_ready()
        except BaseException:
            segment.close()
            raise
        if is_ready:
            return segment
        segment.close()
        return None

    @classmethod
    def inherit(cls, name: str) -> Self:
        """Open the segment ``fd:N``, which the creator made ready before it handed it on.

        Raises:
            InitializationFailed: It is not open, not ours, not a segment, or of a dead run.
        """
        try:
            fd, nbytes = open_inherited(descriptor_of(name) or 0, layout.CONTROL)
        except UntrustedObject as error:
            raise incompatible(name, str(error)) from error
        segment = cls(name, fd, nbytes)
        try:
            if not segment._is_ready():
                raise incompatible(name, "it was never made ready")
            if not segment.creator_is_alive():
                raise incompatible(name, f"it is of a dead run (pid {segment.creator[0]})")
        except BaseException:
            segment.close()
            raise
        return segment

    @contextmanager
    def without_mapping(self) -> Iterator[None]:
        """Read ``words`` from the file for a while: a name can be opened and cut off by others.

        Raises:
            CutOff: In the block, where the file lacks bytes. In mapped memory it would be SIGBUS.
        """
        mapped, self.words = self.words, FileWords(self.descriptor)
        try:
            yield
        finally:
            self.words = mapped

    def check_whole(self) -> None:
        """Check that the file has all of its bytes still.

        Raises:
            CutOff: It has not.
        """
        FileWords(self.descriptor).load(self.nbytes - 8)

    def give_up_memory(self) -> None:
        """Go on with zeros of our own in the place of memory that has been cut off.

        What this process holds there, its C library and the kernel will write to.
        """
        map_private_over(self.words.address, self.nbytes)
        self._control_mutex().initialise()

    def _is_ready(self) -> bool:
        # One load: the creator may store the word at any moment.
        word = self.words.load(0)  # <SYNC ready>: acquire
        if word == 0:
            return False
        if word != layout.MAGIC:
            raise incompatible(self.name, "it does not begin with the magic word")
        self._check_header()
        return True

    def _check_header(self) -> None:
        words = self.words
        for what, offset, expected in (
            ("version", layout.HEADER_VERSION, layout.VERSION),
            ("layout hash", layout.HEADER_LAYOUT_HASH, layout.LAYOUT_HASH),
            ("segment bytes", layout.HEADER_SEGMENT_BYTES, self.nbytes),
        ):
            if words.load(offset) != expected:
                raise incompatible(
                    self.name, f"{what} is {words.load(offset)}, expected {expected}"
                )
        size, slot_bytes = words.load(layout.HEADER_SIZE), words.load(layout.HEADER_SLOT_BYTES)
        if not (
            0 < size <= layout.MAX_RANKS
            and 0 < slot_bytes <= layout.MAX_SLOT_BYTES
            and slot_bytes % layout.PAGE_BYTES == 0
            and layout.segment_bytes(size, slot_bytes) == self.nbytes
        ):
            raise incompatible(
                self.name, f"{size} ranks with slots of {slot_bytes} bytes do not fill it"
            )
        if words.load(layout.HEADER_PID_NAMESPACE) != pid_namespace():
            raise incompatible(
                self.name, "it was made in another pid namespace, whose processes cannot be seen"
            )
        self.size, self.slot_bytes = size, slot_bytes

    def announce_compiled_calls(self, rank: int) -> None:
        """Say, as this rank, that jitted code may call its collectives.

        No signal handler of Python's runs in a loop there, so on ^C the launcher ends them.
        """
        self.words.store(self.control(rank) + layout.COMPILED, 1)  # <SYNC compiled>

    def control(self, rank: int) -> int:
        """Offset of a rank's control block."""
        return layout.CONTROL + rank * layout.CONTROL_BYTES

    def arrivals(self, rank: int) -> tuple[int, int]:
        """The last even and the last odd epoch that a rank has published."""
        even = self.control(rank) + layout.ARRIVAL
        odd = even + layout.ARRIVAL_BYTES
        return self.words.load(even), self.words.load(odd)  # <SYNC arrived>

    def arrived(self, rank: int) -> int:
        """The last epoch that a rank has published."""
        return max(self.arrivals(rank))

    def steps(self, rank: int) -> int:
        """The parts of chains that a rank has finished."""
        return self.words.load(self.control(rank) + layout.STEPS)  # <SYNC steps>

    def death_mutex(self, rank: int) -> RobustMutex:
        """The mutex whose owner is the rank's main thread."""
        return RobustMutex(self.words.address + self.control(rank) + layout.DEATH_MUTEX)

    def _control_mutex(self) -> RobustMutex:
        return RobustMutex(self.words.address + layout.HEADER_CONTROL_MUTEX)

    @contextmanager
    def control_lock(self) -> Iterator[bool]:
        """Hold the lock of claims, poison and the name.

        Every change under it is a single store, so what a dead owner left is valid. Yields False
        when a stopped process holds it: then the caller goes on without, for a failing group must
        not hang.
        """
        mutex = self._control_mutex()
        deadline = time.monotonic() + _CONTROL_LOCK_SECS
        locked = mutex.try_lock()
        while not locked and time.monotonic() < deadline:
            time.sleep(0.0005)
            locked = mutex.try_lock()
        try:
            yield locked
        finally:
            if locked:
                mutex.unlock()

    def wake_all(self) -> None:
        """Wake every rank that sleeps, so that it looks at the poison word."""
        for rank in range(self.size):
            block = self.words.address + self.control(rank)
            for word in (0, layout.ARRIVAL_BYTES, layout.STEPS):
                futex_wake_all(block + word)

    @property
    def creator(self) -> tuple[int, int]:
        """Pid and start time of the process that made the segment."""
        words = self.words
        return words.load(layout.HEADER_CREATOR_PID), words.load(layout.HEADER_CREATOR_START)

    @property
    def launched(self) -> bool:
        """Whether a launcher made it, that reports the ranks' ends."""
        return self.words.load(layout.HEADER_LAUNCHED) == 1

    @property
    def is_unnamed(self) -> bool:
        """Whether it is a memfd, which was handed to the ranks and never had a name."""
        return descriptor_of(self.name) is not None

    @property
    def may_be_unnamed(self) -> bool:
        """Whether the group's regions may be memfds, where no POSIX object fits."""
        return self.launched or self.is_unnamed

    @property
    def descriptor(self) -> int:
        """The file descriptor; -1 when it is closed."""
        return -1 if self._fd is None else self._fd

    @property
    def region_prefix(self) -> str:
        """Beginning of the names of the group's regions; nobody else can have it."""
        nonce = self.words.load_bytes(layout.HEADER_NONCE, 16).hex()
        return f"/cobre-{nonce}-{self.words.load(layout.HEADER_PID_NAMESPACE)}-"

    def living_process(self) -> int:
        """Pid of the creator or of a rank that still runs; 0 when the whole run is dead."""
        words = self.words
        if words.load_bytes(layout.HEADER_BOOT_ID, 16) != boot_id():
            return 0
        processes = [self.creator]
        for rank in range(self.size):
            block = self.control(rank)
            processes.append((words.load(block + layout.PID), words.load(block + layout.START)))
        return next((pid for pid, start in processes if is_alive(pid, start)), 0)

    def creator_is_alive(self) -> bool:
        """Whether the process that made the segment still runs, in this boot."""
        same_boot = self.words.load_bytes(layout.HEADER_BOOT_ID, 16) == boot_id()
        return same_boot and is_alive(*self.creator)

    def unlink(self) -> None:
        """Remove the name, if it still is this segment's. Idempotent.

        Under the control lock: of several processes that clean up after a dead creator one
        removes the name, and none of them a newer segment of the same name.
        """
        if self._fd is not None and not self.is_unnamed:
            with self.control_lock():
                unlink_object(self.name, self._fd)

    def close_descriptor(self) -> None:
        """Close the file descriptor; the mapping stays. The name can no longer be removed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def close(self) -> None:
        """Unmap. Nobody may use its addresses any more.

        What holds a robust mutex stays mapped until the process ends: the kernel and the C
        library will write into it.
        """
        self.close_descriptor()
        address = self.words.address
        if address and not RobustMutex.is_any_held(address, self.nbytes):
            unmap(self.words.address, self.nbytes)
            self.words = Words(0)
