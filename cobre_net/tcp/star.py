"""What both ends of the star have: how far a rank has come, whom it knows, and its small rounds."""

from __future__ import annotations

from collections.abc import Sequence

from cobre_net.tcp.call import Call
from cobre_net.tcp.link import FrameBuffer, Link
from cobre_net.tcp.patience import Patience
from cobre_net.tcp.wire import HEAD_BYTES, RESULT, SEND

__all__ = ["Prepared", "Star"]


class Star:
    """One rank's part in the star, without any collective.

    Args:
        rank: Of this process.
        links: Its connections.
        timeout: Seconds that nothing may move, or on a worker, come.
        stall_warn: Seconds after which a late rank is named.

    Attributes:
        sequence: Of the last collective begun.
        finished: Of the last collective done.
        last: What that was; None before the first.
        out: The frame buffer whose payload is this rank's small part first, and on rank 0 the
            result.
        links: See above.
    """

    def __init__(self, rank: int, links: Sequence[Link], timeout: float, stall_warn: float) -> None:
        self.links = list(links)
        self.sequence = self.finished = 0
        self.out = FrameBuffer()
        self._rank, self._timeout, self._stall_warn = rank, timeout, stall_warn
        self._call = Call(0)
        self.last: Call | None = None

    def describe(self, rank: int) -> str:
        """A rank in words; of those without a connection to this one, the number."""
        for link in self.links:
            if link.rank == rank:
                return f"rank {rank} (pid {link.peer.pid} on {link.peer.host}; it {self.did()})"
        return f"rank {rank}"

    def did(self) -> str:
        """What every rank of the group has done last."""
        if self.last is None:
            return "had called nothing yet"
        return f"finished collective {self.finished}, {self.last}"

    def _patience(self) -> Patience:
        return Patience(self._rank, self._timeout, self._stall_warn, self.describe)


class Prepared:
    """A round with small payloads of equal length, ready to be done again and again.

    Args:
        star: Whose rounds.
        call: What this rank calls.
        part_bytes: Of the payload of every rank but 0.
        result_bytes: Of the payload that every rank gets.
    """

    def __init__(self, star: Star, call: Call, part_bytes: int, result_bytes: int) -> None:
        self.call = call
        self.send_begin, self.send_end = call.template(SEND, part_bytes)
        self.result_begin, self.result_end = call.template(RESULT, result_bytes)
        self.send_bytes = HEAD_BYTES + part_bytes
        self.result_bytes = HEAD_BYTES + result_bytes
        # A worker sends the one, rank 0 the other.
        self.send_frame = (star.out.frame[: self.send_bytes],)
        self.result_frame = (star.out.frame[: self.result_bytes],)
