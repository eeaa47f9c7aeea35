"""The layout of a group's segment: a descriptor without behaviour.

It is the same in a POSIX object and in a memfd.

    offset                     bytes             part
    0                          4096              header
    4096                       512 * size        control blocks, one per rank
    RECORDER                   16384 * size      recorder rings, 256 entries of 64 bytes a rank
    LAST_WORDS                 4096 * size       text of the exception that ended a rank
    RINGS (page aligned)       ring * size       each rank's ring of slots

Header (one writer each; "creator" is rank 0, or the launcher when it made the segment):

    0    magic          u64   creator, last: the segment is ready when it is there
    8    version        u64   creator
    16   layout_hash    u64   creator: hash of this descriptor's numbers
    24   size           u64   creator: number of ranks
    32   slot_bytes     u64   creator
    40   segment_bytes  u64   creator
    48   creator_pid    u64   creator
    56   creator_start  u64   creator: start time of that process, clock ticks since boot
    64   boot_id        16 B  creator
    80   nonce          16 B  creator
    96   launched       u64   creator: 1 when a launcher watches the ranks
    104  pid_namespace  u64   creator: inode of the namespace in which the pids here count
    256  control_mutex  40 B  robust mutex; guards claims, poison, the name, notes
    320  poison         u64   whoever notices first, under control_mutex; written once
    384  joined         u64   rank 0: 1 when all ranks are attached and the name is gone
    392  noted          u64   any rank, under control_mutex: bits of the notes that were printed
    448  tuning[17]     i64   rank 0, before ``joined``: switch points of the algorithms

Control block of a rank, in cache lines of 64 bytes:

    0    arrival[0]           the rank: line of its even epochs
         0   epoch      u64   of its last publication with this parity
         8   signature  u64   of what it called
         16  payload    48 B  all of a small payload
    64   arrival[1]           the rank: line of its odd epochs
    128  waiters        u32   all ranks, atomically: how many sleep on a word of this block
    192  steps          u64   the rank: parts of chains that it has finished
    256  death          40 B  robust mutex held by the rank's main thread for its whole life; all
                              ranks, atomically: the bit by which the kernel wakes who watches it
    296  pid            u64   the rank
    304  start          u64   the rank: start time of its process
    312  guarded        u64   the rank: 1 when ``death`` is held
    320  exited         u64   the launcher: TOLD, with the code, or UNSEEN
    328  exit_code      i64   the launcher: exit code, or -signal
    384  state          u64   the rank: ABSENT, ATTACHED, CLOSED
    392  stack_signal   u64   the rank: the signal on which it prints its Python stack; 0: none
    400  compiled       u64   the rank: 1 when jitted code may call its collectives
    448  recorded       u64   the rank: number of entries ever begun in its recorder ring

Ring of a rank: two pages, the slots of small rounds by parity, then room for several slots of the
largest size, used one after the other.

Last words of a rank: u64 length in bytes, UTF-8 text; written by the rank before it poisons.

Recorder entry, 8 words of 64 bits: sequence, call[3], start_ns, waited_ns, end_ns, status.

The three words of a call: operation | reduction << 8 | root << 16 | hash of counts << 32;
tag of the dtype; number of elements.
"""

from __future__ import annotations

import zlib

MAGIC = int.from_bytes(b"COBRESHM", "little")
VERSION = 2

PAGE_BYTES = 4096
LINE_BYTES = 64

HEADER_VERSION = 8
HEADER_LAYOUT_HASH = 16
HEADER_SIZE = 24
HEADER_SLOT_BYTES = 32
HEADER_SEGMENT_BYTES = 40
HEADER_CREATOR_PID = 48
HEADER_CREATOR_START = 56
HEADER_BOOT_ID = 64
HEADER_NONCE = 80
HEADER_LAUNCHED = 96
HEADER_PID_NAMESPACE = 104
HEADER_CONTROL_MUTEX = 256
HEADER_POISON = 320
HEADER_JOINED = 384
HEADER_NOTED = 392
HEADER_TUNING = 448
TUNING_WORDS = 17

CONTROL = 4096
CONTROL_BYTES = 512
ARRIVAL = 0
ARRIVAL_BYTES = LINE_BYTES
SIGNATURE = 8
INLINE = 16
INLINE_BYTES = ARRIVAL_BYTES - INLINE
WAITERS = 128
STEPS = 192
DEATH_MUTEX = 256
PID = 296
START = 304
GUARDED = 312
EXITED = 320
EXIT_CODE = 328
STATE = 384
STACK_SIGNAL = 392
COMPILED = 400
RECORDED = 448

ABSENT, ATTACHED, CLOSED = 0, 1, 2
# Of EXITED: it was reaped by the launcher, or by somebody else, so that nobody knows the code.
TOLD, UNSEEN = 1, 2

RECORDER_ENTRIES = 256
ENTRY_BYTES = 64
ENTRY_SEQUENCE = 0
ENTRY_CALL = 8
ENTRY_START = 32
ENTRY_WAITED = 40
ENTRY_END = 48
ENTRY_STATUS = 56
RECORDER_BYTES = RECORDER_ENTRIES * ENTRY_BYTES

LAST_WORDS_BYTES = 4096

SMALL_SLOT_BYTES = PAGE_BYTES
SMALL_SLOTS_BYTES = 2 * SMALL_SLOT_BYTES
MANY_RANKS = 16

MAX_RANKS = 1024
DEFAULT_SLOT_BYTES = 1 << 18
MAX_SLOT_BYTES = 1 << 30

# Operation codes of the first call word, and of the data frames of tcp (four bits there).
BARRIER, BROADCAST, ALLREDUCE, ALLGATHERV, COUNTS, REGION, SPLIT = 1, 2, 3, 4, 5, 6, 7
ARRAY = 8
ALLREDUCE_SHARED = 9
FENCE, FREEZE = 10, 11
# In the place of a hash: not the reduction, but the barrier before room for its result is made.
NEW_RESULT = 1
OPERATIONS = {
    BARRIER: "barrier",
    BROADCAST: "broadcast",
    ALLREDUCE: "allreduce",
    ALLGATHERV: "allgatherv",
    COUNTS: "allgatherv (counts)",
    REGION: "create_shared_region",
    SPLIT: "split_local",
    ARRAY: "empty (shared array)",
    ALLREDUCE_SHARED: "allreduce_shared",
    FENCE: "fence (shared region)",
    FREEZE: "freeze (shared region)",
}

# Poison word: kind | rank << 8 | (value + 2**31) << 32; zero means healthy.
DIED, LEFT, ABORTED, INTERRUPTED, TIMED_OUT, STOPPED, CONFLICT, RAISED = 1, 2, 3, 4, 5, 6, 7, 8
DAMAGED = 9
# What a rank has done that fails its group, to stand behind its name.
DEEDS = {
    LEFT: "closed its communicator while others waited for it",
    ABORTED: "called abort({value})",
    INTERRUPTED: "was interrupted inside a collective",
    RAISED: "raised an exception",
}


def recorder_offset(size: int) -> int:
    """Offset of rank 0's recorder ring in a segment of ``size`` ranks."""
    return CONTROL + CONTROL_BYTES * size


def last_words_offset(size: int) -> int:
    """Offset of rank 0's last words."""
    return recorder_offset(size) + RECORDER_BYTES * size


def rings_offset(size: int) -> int:
    """Offset of rank 0's ring, page aligned."""
    end = last_words_offset(size) + LAST_WORDS_BYTES * size
    return -(-end // PAGE_BYTES) * PAGE_BYTES


def segment_bytes(size: int, slot_bytes: int) -> int:
    """Bytes of a whole segment."""
    return rings_offset(size) + size * ring_bytes(size, slot_bytes)


def ring_bytes(size: int, slot_bytes: int) -> int:
    """Bytes of each rank's ring in a group of ``size`` ranks, a multiple of the page.

    What a rank stores into lines that a peer still has in its cache has to wait until they are
    gone from there. So a ring of slots of the usual size is larger than a second-level cache;
    where that would take much memory, it has the three that the protocol needs.
    """
    slots = 8 if size <= MANY_RANKS else 3
    return SMALL_SLOTS_BYTES + slots * slot_bytes


def pack_poison(kind: int, rank: int, value: int) -> int:
    """Return the poison word; ``value`` (exit code, signal, pid) is a signed 32-bit integer."""
    return kind | (rank & 0xFFFFFF) << 8 | ((value + (1 << 31)) & 0xFFFFFFFF) << 32


def unpack_poison(word: int) -> tuple[int, int, int]:
    """Return (kind, rank, value) of a poison word."""
    word &= (1 << 64) - 1
    return word & 0xFF, word >> 8 & 0xFFFFFF, (word >> 32) - (1 << 31)


def _hash_of_numbers() -> int:
    numbers = sorted(
        (name, value)
        for name, value in globals().items()
        if name.isupper() and isinstance(value, int) and not name.startswith("_")
    )
    # Not by hashlib, which loads a library of cryptography into the launcher and every rank.
    return zlib.crc32(repr(numbers).encode())


LAYOUT_HASH = _hash_of_numbers()
