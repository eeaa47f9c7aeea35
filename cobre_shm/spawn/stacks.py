"""The Python stacks of all ranks, for a run that takes too long.

``faulthandler`` writes them from a signal handler in C, so that a rank shows where it is even if
it holds the interpreter for ever. Ranks forked from a zygote have it registered for the last of
the real-time signals, which no library uses by itself, and run on. Fresh interpreters know it for
fatal signals only (the launcher sets ``PYTHONFAULTHANDLER``): they are ended by SIGABRT. A rank
that has executed another program since catches neither, and is sent none.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence

from cobre_shm.spawn import direct
from cobre_shm.spawn.rank import Rank
from cobre_shm.spawn.rank_output import RankOutput

__all__ = ["DUMP_SIGNAL", "STACKS_SECS", "Stacks"]

DUMP_SIGNAL = int(signal.SIGRTMAX)
_OURS = f'"{direct.__file__}"'.encode("ascii", "backslashreplace")
# A handler runs as soon as its process does; 64 of them on one CPU take less.
STACKS_SECS = 0.5


class Stacks:
    """Asks ranks for their stacks, and puts what they say in order.

    Args:
        ranks: Of the group.
        output: Their output, where stacks come as lines of standard error.
    """

    def __init__(self, ranks: Sequence[Rank], output: RankOutput) -> None:
        self._ranks = [rank for rank in ranks if rank.ending is None]
        self._output = output

    def request(self) -> None:
        """Ask; what a rank writes to its standard error is held back until ``collect``."""
        from cobre_shm.segment.process import catches

        for rank in self._ranks:
            self._output.hold(rank.number)
            if rank.dump_signal and catches(rank.pid, rank.dump_signal):
                rank.was_stopped = rank.was_stopped or rank.dump_signal == signal.SIGABRT
                rank.send_to_process(rank.dump_signal)

    def collect(self) -> bytes:
        """Return what the ranks have said, one after the other."""
        blocks = []
        for rank in self._ranks:
            lines = _without_ours(self._output.take_held(rank.number).splitlines())
            shown = b"".join(b"  " + line + b"\n" for line in lines) or b"  (nothing)\n"
            blocks.append(b"Rank %d (pid %d):\n" % (rank.number, rank.pid) + shown)
        return b"".join(blocks)


def _without_ours(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Leave out the frames that have brought a rank to its program; they stand last."""
    is_ours = False
    for line in lines:
        is_frame = line.startswith(b"  File ")
        is_ours = is_frame and (is_ours or _OURS in line)
        if not is_ours:
            yield line
