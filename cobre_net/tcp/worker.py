"""The side of the ranks from 1 on: send the part, take the result.

A worker waits for the coordinator alone. The coordinator keeps the time for all, as it knows who
is late, and says in heartbeats that it does; so a worker's own limit runs only while nothing comes
at all, and then it is rank 0 that is missing.

With much to send, a worker takes what comes while it sends (``stream``): the coordinator passes
results on while parts still arrive, and would otherwise wait for room in a buffer that nobody
empties, while this rank waits for room in the other.
"""

from __future__ import annotations

import select
from collections.abc import Mapping

from cobre_net.tcp.call import Call
from cobre_net.tcp.failure import Failure, Lost
from cobre_net.tcp.flows import Block, Different, Inflow, Outflow, Spoke, look_for_word
from cobre_net.tcp.link import PAYLOAD, QUIETLY, START, Ended, Link
from cobre_net.tcp.patience import Patience
from cobre_net.tcp.star import Prepared, Star
from cobre_net.tcp.wire import HEAD_BYTES, PREFIX_BYTES, RESULT, SEND, BadFrame

__all__ = ["Worker"]


class Worker(Star):
    """A point of the star, whose results come in ``link.buffer``.

    Args:
        rank: Of this process.
        link: The connection to the coordinator.
        timeout: Seconds that nothing may come from it.
        stall_warn: Seconds after which it is named as late.
    """

    def __init__(self, rank: int, link: Link, timeout: float, stall_warn: float) -> None:
        super().__init__(rank, [link], timeout, stall_warn)
        self._link = link

    def exchange(self, call: Call, part_bytes: int, result_bytes: int) -> None:
        """Do a round with a small payload, which stands in ``out``."""
        self.exchange_prepared(Prepared(self, call, part_bytes, result_bytes))

    def exchange_prepared(self, plan: Prepared) -> None:
        """Do a round of ``plan``: the short road, as in ``centre_small.py``."""
        link = self._link
        buffer = link.buffer
        self._call = plan.call
        self.sequence = sequence = self.sequence + 1
        number = sequence.to_bytes(8)
        self.out.memory[START:PAYLOAD] = plan.send_begin + number + plan.send_end
        # As Link.begin() and Link.send_on() do, which say why.
        frame = plan.send_frame
        sent: list[int] = []
        link.sent, link.frame = sent, frame
        try:
            sent.extend(map(link.send, frame, QUIETLY))
            count = sent[0]
        except OSError:
            count = 0
        if count != plan.send_bytes:
            self._send_slowly(frame[0][count:])
        expected = plan.result_begin + number + plan.result_end
        total = plan.result_bytes
        try:
            count = link.receive(buffer.frame, total)
        except OSError:
            count = -1
        if count != total or not buffer.memory.startswith(expected, START):
            self._receive_slowly(count, expected, total)
        self.finished, self.last = sequence, plan.call

    def stream(self, call: Call, part: memoryview, results: Mapping[int, Block]) -> None:
        """Do a round with a large payload.

        Args:
            call: What this rank calls.
            part: What it contributes.
            results: What it gets, by rank.
        """
        self._call = call
        self.sequence += 1
        link = self._link
        outflow = Outflow(link, call, SEND, self.sequence, [Block(0, part, len(part))])
        inflow = Inflow(link, call, RESULT, self.sequence, results)
        patience = self._patience()
        poller = select.poll()
        link.begin_stream()
        try:
            while not inflow.is_done:
                if outflow.is_done:
                    moved = inflow.pull(0) > 0
                else:
                    poller.register(link.sock, select.POLLIN | select.POLLOUT)
                    events = sum(each for _, each in poller.poll(patience.beat * 1000))
                    moved = False
                    if events & ~select.POLLOUT:
                        moved |= inflow.pull() > 0
                    if events & select.POLLOUT:
                        moved |= outflow.push() > 0
                if moved:
                    patience.moved()
                else:
                    self._look(patience)
        except (Ended, Spoke, BadFrame, Different) as error:
            raise Lost(self._failure(error)) from error
        if not outflow.is_done:
            raise Lost(self._failure(BadFrame("a result before it had this rank's part")))
        # The coordinator has had all of this rank's part, or it would not have ended the result.
        link.end_stream()
        self.finished, self.last = self.sequence, call

    def _send_slowly(self, rest: memoryview) -> None:
        link = self._link
        patience = self._patience()
        poller = select.poll()
        poller.register(link.sock, select.POLLIN)
        try:
            # A heartbeat that was half read is in the way of the result.
            while rest or link.buffer.received:
                count = link.send_on([rest]) if rest else 0
                rest = rest[count:]
                if not count and poller.poll(0 if rest else patience.beat * 1000):
                    count = self._hear()
                if count > 0:
                    patience.moved()
                else:
                    self._look(patience)
        except (Ended, Spoke, BadFrame) as error:
            # It may have said why.
            raise Lost(self._failure(error)) from error

    def _hear(self) -> int:
        """Take what comes while this rank still sends: heartbeats, probes, or the last word.

        Returns:
            How many bytes that was, without probes.
        """
        buffer = self._link.buffer
        count = self._link.take(buffer.frame[buffer.received : PREFIX_BYTES])
        buffer.received += count
        count -= look_for_word(self._link)
        if buffer.received >= PREFIX_BYTES:
            raise BadFrame("a result before it had this rank's part")
        return count

    def _receive_slowly(self, count: int, expected: bytes, total: int) -> None:
        link, buffer = self._link, self._link.buffer
        buffer.received = max(count, 0)
        patience = self._patience()
        try:
            while True:
                before = buffer.received
                probes = look_for_word(link)
                if buffer.received + probes != before:
                    # A heartbeat: the coordinator waits for others, and keeps the time.
                    patience.moved()
                if buffer.received >= HEAD_BYTES and not buffer.memory.startswith(expected, START):
                    raise Different
                if buffer.received == total:
                    buffer.received = 0
                    return
                more = link.take(buffer.frame[buffer.received : total])
                buffer.received += more
                if not more:
                    self._look(patience)
        except (Ended, Spoke, BadFrame, Different) as error:
            raise Lost(self._failure(error)) from error

    def _look(self, patience: Patience) -> None:
        # One rank's word on a late coordinator is enough.
        patience.look([0], str(self._call), warns=self._rank == 1)
        if self._link.is_silent():
            raise Ended("its host does not answer")

    def _failure(self, error: Exception) -> Failure:
        peer, kind, text = self._link.peer, "damaged", str(error)
        if isinstance(error, Spoke):
            if error.failure is not None:
                return error.failure
            kind = "left"
        elif isinstance(error, Ended):
            ending = self._link.ending()
            if ending.failure is not None:
                return ending.failure
            kind = "left" if ending.left else "died"
        elif isinstance(error, Different):
            text = "a result of another collective"
        return Failure(kind, 0, peer.pid, peer.host, text=text, did=self.did())
