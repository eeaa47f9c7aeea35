"""Rank 0's side of small collectives: one frame from every rank, and one to every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cobre_net.tcp.call import Call
from cobre_net.tcp.centre import Centre
from cobre_net.tcp.flows import Different, look_for_word
from cobre_net.tcp.link import PAYLOAD, QUIETLY, START, Link
from cobre_net.tcp.patience import Patience
from cobre_net.tcp.star import Prepared
from cobre_net.tcp.wire import HEAD_BYTES, RESULT, SEND

__all__ = ["SmallRounds"]


class SmallRounds(Centre):
    """The centre of the star in rounds with small payloads."""

    def exchange_prepared(self, plan: Prepared, combine: Callable[[Link], object]) -> None:
        """Do a round of ``plan``, whose parts are all of one length: the short road.

        Everything is done beforehand that can be: for a few bytes, what Python does around the
        system calls is a large part of the time.

        Args:
            plan: The round.
            combine: Called for each rank in turn when its part is in ``link.buffer``.
        """
        self._call = plan.call
        self.sequence = sequence = self.sequence + 1
        if self._unsettled:
            self._settle()
        number = sequence.to_bytes(8)
        expected = plan.send_begin + number + plan.send_end
        total = plan.send_bytes
        for link in self.links:
            buffer = link.buffer
            try:
                count = link.receive(buffer.frame, total)
            except OSError:
                count = -1
            if count != total or not buffer.memory.startswith(expected, START):
                self._receive_slowly(link, count, expected, total)
            combine(link)
        self.out.memory[START:PAYLOAD] = plan.result_begin + number + plan.result_end
        self._send_to_all(plan.result_frame)
        self.finished, self.last = sequence, plan.call

    def exchange_equal(
        self, call: Call, part_bytes: int, result_bytes: int, combine: Callable[[Link], object]
    ) -> None:
        """Do a round in which every rank sends ``part_bytes``; the result is in ``out``.

        Args:
            call: What this rank calls.
            part_bytes: Of the payload of every other rank.
            result_bytes: Of the payload that every rank gets.
            combine: Called for each rank in turn when its part is in ``link.buffer``.
        """
        self.exchange_prepared(Prepared(self, call, part_bytes, result_bytes), combine)

    def exchange_parts(
        self,
        call: Call,
        part_bytes: Sequence[int],
        result_bytes: int,
        combine: Callable[[Link], object],
    ) -> None:
        """Do the same where rank ``r`` sends ``part_bytes[r]``."""
        self._begin(call)
        for link in self.links:
            nbytes = part_bytes[link.rank]
            self._receive_slowly(
                link, 0, call.head(SEND, self.sequence, nbytes), HEAD_BYTES + nbytes
            )
            combine(link)
        self._send_result(call, result_bytes)

    def _send_result(self, call: Call, result_bytes: int) -> None:
        out = self.out
        total = HEAD_BYTES + result_bytes
        out.memory[START:PAYLOAD] = call.head(RESULT, self.sequence, result_bytes)
        self._send_to_all((out.frame[:total],))
        self._end()

    def _send_to_all(self, frame: tuple[memoryview]) -> None:
        (whole,) = frame
        total = len(whole)
        for link in self.links:
            # As Link.begin() and Link.send_on() do, which say why.
            sent: list[int] = []
            link.sent, link.frame = sent, frame
            try:
                sent.extend(map(link.send, frame, QUIETLY))
                count = sent[0]
            except OSError:
                count = 0
            if count != total:
                self._send_slowly(link, whole[count:])

    def _receive_slowly(self, link: Link, count: int, expected: bytes, total: int) -> None:
        """Receive the rest of a part that did not come whole, or find out what came instead."""
        buffer = link.buffer
        buffer.received = max(count, 0)
        self._has_agreed = lambda rank: rank < link.rank
        patience: Patience | None = None
        while True:
            with self._blamed(link):
                look_for_word(link)
                if buffer.received >= HEAD_BYTES and not buffer.memory.startswith(expected, START):
                    raise Different
                if buffer.received == total:
                    buffer.received = 0
                    return
                more = link.take(buffer.frame[buffer.received : total], 0)
            buffer.received += more
            if not more:
                patience = patience or self._patience()
                self._wait(link, patience)

    def _send_slowly(self, link: Link, rest: memoryview) -> None:
        patience = self._patience()
        while rest:
            with self._blamed(link):
                count = link.send_on([rest])
            rest = rest[count:]
            if count:
                patience.moved()
            else:
                patience.look([link.rank], str(self._call))
