"""A rank's private state of one communicator: a vector of 64-bit integers.

It is not shared. A collective that has to hand control back to Python (so that signals, time
limits and failures are seen) leaves its place in STAGE and ROUND and goes on from there when the
same kernel is called again with the same arguments.
"""

from __future__ import annotations

RANK = 0
SIZE = 1
CONTROL = 2  # address of rank 0's control block
SLOTS = 3  # address of rank 0's first slot
SLOT_BYTES = 4
POISON = 5  # address of the poison word
RECORDER = 6  # address of this rank's recorder ring
EPOCH = 7  # of this rank's last publication
STAGE = 8
ROUND = 9  # of the current collective
SPIN_LIMIT = 10  # adapted: see waiting.py
SPIN_LIMIT_MAX = 11
SPUN = 12  # in the current wait
YIELD_SINCE = 13  # monotonic ns at which the current wait began to yield; 0: not yet
ASLEEP = 14  # whether the current wait has gone to sleep once
WAIT_SINCE = 15  # monotonic ns at which the current wait left spinning; 0: it has not
SEQUENCE = 16  # of the current or last collective, from 1
SUSPECT = 17  # rank whose death was seen, valid with status DEAD
ENTRY = 18  # address of the recorder entry of the current collective
FAIL_PHASE = 19  # chosen failpoint; -1: none
FAIL_SEQUENCE = 20
FAIL_SIGNAL = 21
WORDS = 22

# Stages.
IDLE, DEPOSIT, WAIT = 0, 1, 2

# Results of a kernel.
READY, PENDING, POISONED, DEAD, MISMATCH = 0, 1, 2, 3, 4
