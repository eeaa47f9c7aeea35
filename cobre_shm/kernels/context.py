"""A rank's private state of one communicator: a vector of 64-bit integers.

It is not shared. A collective that has to hand control back to Python (so that signals, time
limits and failures are seen) leaves its place in STAGE and ROUND and goes on from there when the
same kernel is called again with the same arguments and ``resume`` = 1.
"""

from __future__ import annotations

RANK = 0
SIZE = 1
CONTROL = 2  # address of rank 0's control block
RINGS = 3  # address of rank 0's ring
SLOT_BYTES = 4  # most that a round carries
POISON = 5  # address of the poison word
RECORDER = 6  # address of this rank's recorder ring
EPOCH = 7  # of this rank's last publication
STAGE = 8
ROUND = 9  # of the current collective
SPIN_LIMIT = 10  # adapted: see waiting.py
SPIN_LIMIT_MAX = 11
SPUN = 12  # in the current wait
YIELD_SINCE = 13  # monotonic ns at which the current wait began to yield; 0: not yet
ASLEEP = 14  # of the current wait: 0, SLEPT or SEEN
WAIT_SINCE = 15  # monotonic ns at which the current wait left spinning; 0: it has not
SEQUENCE = 16  # of the current or last collective, from 1
SUSPECT = 17  # rank that died (status DEAD), left (LEFT), or whose memory was not read (LOST)
ENTRY = 18  # address of the recorder entry of the current collective
FAIL_PHASE = 19  # chosen failpoint; -1: none
FAIL_SEQUENCE = 20
FAIL_YIELDS = 21  # made so far, where yielding was chosen
BUSY = 22  # 1: inside a collective, or unusable for good; exchanged atomically by threads
HOLDING = 23  # 1: the caller holds the GIL and wants it back before a long wait
SCRATCH = 24  # address of private memory of SCRATCH_BYTES, line aligned
STEPS = 25  # parts of chains that every rank has finished, before the current collective
AWAITED_STEPS = 26  # what a wait inside a chain wants of a peer; 0: no such wait
HEAP = 27  # address of rank 0's area of the shared heap, 0: there is none
HEAP_STRIDE = 28  # bytes from one rank's area to the next
SELF = 29  # address of this vector
KNOWN = 30  # address of the table of known.py
KNOWN_COUNT = 31
PEER_READS = 32  # whether the ranks can read each other's private memory, see sharing.py
READS_SUCCEED = 33  # whether this rank's trial of it did
PROGRESS = 34  # bytes of the current step of a collective without slots
SLICE_NS = 35  # longest sleep in one piece
WATCH_LIST = 36  # room for what a sleeper watches, see waiting.py; 0: it watches one word

# For the fast road: addresses of kernels, and of Python objects that live as long as this vector.
BARRIER_KERNEL, BROADCAST_KERNEL, ALLREDUCE_KERNEL, ALLGATHERV_KERNEL = 48, 49, 50, 51
BARRIER_METHOD, BROADCAST_METHOD, ALLREDUCE_METHOD, ALLGATHERV_METHOD = 52, 53, 54, 55
ALLREDUCE_SHARED_METHOD = 115
BARRIER_FINISH, BROADCAST_FINISH, ALLREDUCE_FINISH, ALLGATHERV_FINISH = 56, 57, 58, 59
NONE, ARRAY_TYPE, INT_TYPE, INT64, SUM = 60, 61, 62, 63, 64
NAME_OP, NAME_ROOT, EMPTY_LIKE = 65, 66, 67
DISPLS = 68  # address of room for one integer per rank
ARGUMENTS = 69  # address of room for three arguments

# Calls of Python, see abandoning.py.
TAKE_OVER, PREPARE = 70, 71  # addresses of Python methods for jitted programs
CALL_BACK = 110  # address of the C function that calls them
ABANDON = 111  # address of the Python function that fails the group for this rank; 0: no peers
RAISED = 112  # three words: an exception until it can be raised in Python

SOURCES = 72  # address of two integers per rank, see sharing.py
PROBED = 73  # whether the current collective has had its probe
FOUND = 74  # what the probe found
COMPARED = 75  # whether the calls of all ranks have been compared
SIGNATURE = 76  # of the current collective
YIELDS = 77  # in the current wait
CROWDED = 78  # of them, those during which somebody else ran on this core

# What choices.py has decided and measures.
STREAMS_IN = 80  # whether the current collective stores its payload past the caches
CLASS = 81  # kind and size of the current collective; -1: too small to matter
CHOICES = 82  # a bit per class: the way that all ranks take
OFFER = 83  # rank 0: what it will say next
COST = 84  # cycles of the current collective, without its waits
COSTS = 85  # address of what rank 0 has learnt
LAST_COST = 89  # of the last collective that was measured
LAST_CLASS = 90
LAST_WAY = 91
KINDS = 4  # of collectives; a power of two
CLASSES = 15  # sizes of a kind
WORDS_PER_CLASS = 3  # cycles through the cache or directly, cycles past it, number of collectives
COSTS_WORDS = KINDS * CLASSES * WORDS_PER_CLASS

# Where payloads go: offsets in every rank's ring, see rounds.py.
RING_BYTES = 79  # from one rank's ring to the next
COMING = 86  # of the slot of the coming round
CURRENT = 87  # of the slot of the round that was published last
POSITION = 88  # at which the next large slot begins
TUNING = 92  # the 17 words of layout.HEADER_TUNING, see tuning.py
WORDS = 116

SCRATCH_BYTES = 131072

# Of an entry of the list that a sleeper watches, and how many the system takes.
WATCH_BYTES, WATCHED_MAX = 24, 128

# Whether a wait has slept, and whether Python has looked around since.
SLEPT, SEEN = 1, 2

# Stages.
IDLE, DEPOSIT, WAIT = 0, 1, 2

# Results of a kernel.
READY, PENDING, POISONED, DEAD, MISMATCH, TAKEN, LONGER, LOST, LEFT = 0, 1, 2, 3, 4, 5, 6, 7, 8
FAILED = 100  # of a call of Python for jitted code: it has raised
