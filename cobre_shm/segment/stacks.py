"""The Python stack of a rank that is alive and late, on its own stderr.

A rank offers it when it joins: Python's faulthandler prints the stack of its main thread on a
signal that nobody uses, from C, so also while other C code holds the interpreter's lock. Who waits
for the rank sends the signal, once for each standstill that is worth a warning.

A process that does not catch the signal would die of it. So it is sent only to the process of the
rank, if that has said that it offers its stack, and catches the signal now (it may have executed
another program since).
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterable
from contextlib import suppress

from cobre_shm import layout
from cobre_shm.segment.process import catches, is_alive, state_of
from cobre_shm.segment.segment import Segment

__all__ = ["SIGNAL", "ask_for_stacks", "offer_stack"]

SIGNAL = signal.SIGRTMIN + 9
_STDERR = 2
# What a stopped process is sent, it gets when it goes on, and then it is not late for a bug.
_ASKED = ("running", "sleeping", "in the kernel")

_is_ours = False


def offer_stack(segment: Segment, rank: int) -> None:
    """Have this process print its stack when it is asked; not if the program uses the signal."""
    global _is_ours
    if not _is_ours and signal.getsignal(SIGNAL) is signal.SIG_DFL:
        # One thread: those that run go on while they are looked at.
        faulthandler.register(SIGNAL, file=_STDERR, all_threads=False)
        _is_ours = True
    segment.words.store(segment.control(rank) + layout.STACK_SIGNAL, SIGNAL if _is_ours else 0)


def ask_for_stacks(segment: Segment, ranks: Iterable[int]) -> None:
    """Have these ranks print their stacks, as far as they offer them."""
    words = segment.words
    for rank in ranks:
        block = segment.control(rank)
        pid, start = words.load(block + layout.PID), words.load(block + layout.START)
        if words.load(block + layout.STACK_SIGNAL) != SIGNAL or not is_alive(pid, start):
            continue
        if state_of(pid) in _ASKED and catches(pid, SIGNAL):
            with suppress(OSError):
                os.kill(pid, SIGNAL)
