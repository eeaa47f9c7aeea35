"""Named places in the protocols where a test makes a rank fail.

``COBRE_FAIL=PHASE:kill@RANK,SEQUENCE``: when RANK reaches PHASE for the collective SEQUENCE (0 for
phases outside collectives), it kills itself. ``COBRE_FAIL=on`` compiles the places in without
choosing one; ``arm`` chooses later. ``anywhere:yield@RANK,SEED`` lets RANK give up the processor
at random places of collectives, so that others run where they seldom would. When the variable is
unset no place costs anything: in kernels they are not compiled, elsewhere they are one test of a
constant.

    create          rank 0, the segment exists, its magic word does not
    ready           rank 0, the magic word is there
    claimed         the control block is this rank's, the death mutex is not
    attached        the rank is ATTACHED and waits for the others
    joined          rank 0, the name is gone, the others do not know yet
    idle            before a collective begins
    copy_in         half of the payload is in the slot
    publish         the epoch is published
    spin            spinning for a peer
    sleep           counted among the waiters, about to sleep
    reduce          some ranks' values are in the accumulator
    copy_out        half of a block is copied out of a slot
    done            the collective has returned
    region_create   the region's object exists on rank 0
    region_mapped   the region is mapped, the others may not have it
    close           before the control block says CLOSED
    begin           before the rank looks for the segment, or makes it
    region_close    the region is about to be closed
    exit            the interpreter ends and the communicator is open
"""

from __future__ import annotations

import os
import re
import signal
from typing import NamedTuple

__all__ = [
    "ANYWHERE",
    "ENABLED",
    "EXPECTED",
    "PHASES",
    "Directive",
    "arm",
    "armed",
    "parse",
    "reach",
]

VARIABLE = "COBRE_FAIL"
ENABLED = bool(os.environ.get(VARIABLE))

PHASES = (
    "create",
    "ready",
    "claimed",
    "attached",
    "joined",
    "idle",
    "copy_in",
    "publish",
    "spin",
    "sleep",
    "reduce",
    "copy_out",
    "done",
    "region_create",
    "region_mapped",
    "close",
    "begin",
    "region_close",
    "exit",
)
# In the place of a phase.
ANYWHERE = len(PHASES)
EXPECTED = (
    f"on, anywhere:yield@RANK,SEED, or PHASE:kill@RANK,SEQUENCE with a phase of {', '.join(PHASES)}"
)


class Directive(NamedTuple):
    """Which rank fails where.

    Attributes:
        phase: Index in ``PHASES``, or ``ANYWHERE``.
        rank: The rank.
        sequence: The collective, from 1; 0 outside collectives. Anywhere: the seed.
    """

    phase: int
    rank: int
    sequence: int


_directive: Directive | None = None


def parse(text: str) -> Directive | None:
    """Return what a value of ``COBRE_FAIL`` chooses; None for ``on``.

    Raises:
        ValueError: The text is not understood.
    """
    if text == "on":
        return None
    match = re.fullmatch(r"(\w+):(\w+)@(\d+),(\d+)", text)
    if match is not None and match.group(1, 2) == ("anywhere", "yield"):
        return Directive(ANYWHERE, int(match[3]), int(match[4]))
    if match is None or match[1] not in PHASES or match[2] != "kill":
        raise ValueError(f"{VARIABLE}={text!r}: expected {EXPECTED}")
    return Directive(PHASES.index(match[1]), int(match[3]), int(match[4]))


def arm(text: str) -> None:
    """Choose the place where this process fails, as ``COBRE_FAIL`` does.

    Raises:
        ValueError: The text is not understood, or failpoints are not enabled.
    """
    global _directive
    if not ENABLED:
        raise ValueError(f"set {VARIABLE}=on before cobre_shm is imported")
    _directive = parse(text)


def armed() -> Directive | None:
    """Return what was chosen."""
    return _directive


def reach(phase: str, rank: int, sequence: int = 0) -> None:
    """Be at a place; fail if it is the chosen one."""
    if ENABLED and _directive is not None and _directive.phase != ANYWHERE:
        here = (PHASES[_directive.phase], _directive.rank, _directive.sequence)
        if here == (phase, rank, sequence):
            os.kill(os.getpid(), signal.SIGKILL)


if ENABLED:
    arm(os.environ[VARIABLE])
