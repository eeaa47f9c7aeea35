"""Rank 0's side of every collective.

A collective is one round: gather what every rank calls and its data, compare the calls, work, and
send every rank its result. Small payloads take the road through one frame buffer per peer, in
rank order; large ones flow through all connections at once.

Who may wait for whom, and why that ends:

- A worker waits for the coordinator alone: for room to send, or for the result. While it has
  bytes to send and waits for the result, it does both at once (``worker.py``).
- Small: the coordinator reads the parts in rank order. A worker whose part is not read yet waits;
  nobody waits for that worker but the coordinator, which gets to it once those before it have
  come. Results are sent only when all parts are in, and each worker then does nothing but read.
- Large: the coordinator waits for any connection on which something can move, and never for a
  single one. It stops reading from a worker only while that one is ``Ring.CHUNKS`` ahead of the
  reduction; of the workers that the reduction waits for, the first in rank order is never
  ahead of it. Results stay in the user's memory until they are sent, so a slow reader holds up
  nobody's reduction.

So the graph of waits is a star: an edge from every worker to the coordinator, and edges from the
coordinator only to workers that have not called, or have not read. A late or dead one of these is
what the time limit and the kernel's word on the connection are for.
"""

from __future__ import annotations

import ctypes
import select
import time
from collections.abc import Callable, Sequence

from cobre_net.tcp.call import Call
from cobre_net.tcp.failure import Failure, Lost
from cobre_net.tcp.flows import (
    CHUNK_BYTES,
    Block,
    Different,
    Inflow,
    Outflow,
    Ring,
    Spoke,
    look_for_word,
)
from cobre_net.tcp.link import PAYLOAD, START, Ended, FrameBuffer, Link
from cobre_net.tcp.patience import Patience
from cobre_net.tcp.reducing import Fold
from cobre_net.tcp.wire import HEAD_BYTES, RESULT, SEND, BadFrame

__all__ = ["Coordinator"]

_SEND_TAGS = range(SEND, SEND + 16)
_HANGUP = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Prepared:
    """A round with small payloads of equal length, ready to be done again and again.

    Args:
        star: Whose rounds.
        call: What this rank calls.
        part_bytes: Of the payload of every other rank.
        result_bytes: Of the payload that every rank gets.
        combine: Called for each rank in turn when its part is in ``link.buffer``.
    """

    def __init__(
        self,
        star: Coordinator,
        call: Call,
        part_bytes: int,
        result_bytes: int,
        combine: Callable[[Link], object],
    ) -> None:
        self.call, self.combine = call, combine
        self.send_begin, self.send_end = call.template(SEND, part_bytes)
        self.result_begin, self.result_end = call.template(RESULT, result_bytes)
        self.send_bytes = HEAD_BYTES + part_bytes
        self.result_bytes = HEAD_BYTES + result_bytes
        self.result_frame = star.out.frame[: self.result_bytes]


class Coordinator:
    """The centre of the star.

    Args:
        links: The connections, of rank 1 first.
        timeout: Seconds that nothing may move.
        stall_warn: Seconds after which a late rank is named.

    Attributes:
        sequence: Of the last collective begun.
        out: The frame buffer of small results; its payload is where rank 0's part goes first.
        links: See above.
    """

    def __init__(self, links: Sequence[Link], timeout: float, stall_warn: float) -> None:
        self.links = list(links)
        self.sequence = 0
        self.out = FrameBuffer()
        self._timeout, self._stall_warn = timeout, stall_warn
        self._call = Call(0)
        self.last: Call | None = None
        self._rings: list[bytearray] = []
        self._has_agreed: Callable[[int], bool] = _nobody

    # Small payloads

    def exchange_prepared(self, plan: Prepared) -> None:
        """Do a round of ``plan``, whose parts are all of one length: the short road.

        Everything is done beforehand that can be: for a few bytes, what Python does around the
        system calls is a large part of the time.
        """
        self._call = plan.call
        self.sequence = sequence = self.sequence + 1
        number = sequence.to_bytes(8)
        expected = plan.send_begin + number + plan.send_end
        total, combine = plan.send_bytes, plan.combine
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
        frame = plan.result_frame
        for link in self.links:
            try:
                count = link.send(frame)
            except OSError:
                count = 0
            if count != plan.result_bytes:
                self._send_slowly(link, frame[count:])
        self.last = plan.call

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
        self.exchange_prepared(Prepared(self, call, part_bytes, result_bytes, combine))

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

    def _begin(self, call: Call) -> None:
        self._call = call
        self.sequence += 1

    def _send_result(self, call: Call, result_bytes: int) -> None:
        out = self.out
        total = HEAD_BYTES + result_bytes
        out.memory[START:PAYLOAD] = call.head(RESULT, self.sequence, result_bytes)
        frame = out.frame[:total]
        for link in self.links:
            try:
                count = link.sock.send(frame)
            except OSError:
                count = 0
            if count != total:
                self._send_slowly(link, frame[count:])
        self.last = call

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
            link.unsent = len(rest)
            with self._blamed(link):
                count = link.put([rest])
            rest = rest[count:]
            if count:
                patience.moved()
            else:
                patience.look([link.rank], str(self._call))
        link.unsent = 0

    def _wait(self, link: Link, patience: Patience) -> None:
        """Wait until something comes from ``link``, with an eye on all others."""
        poller = select.poll()
        by_descriptor = {each.sock.fileno(): each for each in self.links}
        for descriptor, each in by_descriptor.items():
            poller.register(descriptor, _HANGUP | (select.POLLIN if each is link else 0))
        known = -1
        while True:
            ready = poller.poll(patience.beat * 1000)
            for descriptor, _ in ready:
                if by_descriptor[descriptor] is not link:
                    self._ended(by_descriptor[descriptor])
            if ready:
                return
            missing = self._missing(link)
            if len(missing) != known:
                known = len(missing)
                patience.moved()
            patience.look(missing, str(self._call))
            for each in self.links:
                if each.rank not in missing:
                    each.heartbeat()

    def _missing(self, link: Link) -> list[int]:
        """The ranks from which nothing of this round has come; ``link`` is read next."""
        poller = select.poll()
        for each in self.links[self.links.index(link) :]:
            poller.register(each.sock, select.POLLIN)
        here = {descriptor for descriptor, _ in poller.poll(0)}
        return [
            each.rank
            for each in self.links[self.links.index(link) :]
            if each.sock.fileno() not in here and not each.buffer.received
        ]

    # Large payloads

    def reduce(
        self, call: Call, total: int, itemsize: int, own: int, result: memoryview, fold: Fold
    ) -> None:
        """Do an allreduce of ``total`` bytes.

        Args:
            call: What this rank calls.
            total: Bytes of every rank's part.
            itemsize: Bytes of an element; it divides ``CHUNK_BYTES``.
            own: Address of this rank's part.
            result: The receive buffer; it may be where ``own`` is.
            fold: The reduction.
        """
        self._begin(call)
        target = ctypes.addressof(ctypes.c_char.from_buffer(result))
        rings = [self._ring(index, total) for index in range(len(self.links))]
        answer = Block(0, result)

        def advance() -> None:
            # Chunk by chunk through all ranks that have it, so that it stays in the cache.
            limit = total
            for index, ring in enumerate(rings):
                while ring.folded < limit:
                    count = min(CHUNK_BYTES, total - ring.folded)
                    if ring.ready - ring.folded < count:
                        break
                    place = target + ring.folded
                    # Rank 0's own part is the first operand of the first reduction.
                    left = own + ring.folded if index == 0 else place
                    fold(place, left, ring.chunk_address(), count // itemsize, left == place)
                    ring.folded += count
                limit = ring.folded
            answer.ready = limit

        inflows = [
            Inflow(link, call, SEND, self.sequence, {0: ring})
            for link, ring in zip(self.links, rings, strict=True)
        ]
        self._flow(inflows, self._results(call, lambda _: [answer]), advance)

    def broadcast(self, call: Call, root: int, data: memoryview) -> None:
        """Do a broadcast from rank ``root``."""
        self._begin(call)
        block = Block(root, data, 0 if root else len(data))
        inflows = [
            Inflow(link, call, SEND, self.sequence, {0: block} if link.rank == root else {})
            for link in self.links
        ]
        outflows = self._results(call, lambda link: [] if link.rank == root else [block])
        self._flow(inflows, outflows, None)

    def gather(self, call: Call, blocks: Sequence[memoryview]) -> None:
        """Do an allgatherv into ``blocks``, one per rank; this rank's own is filled already."""
        self._begin(call)
        all_blocks = [Block(rank, view) for rank, view in enumerate(blocks)]
        all_blocks[0].ready = len(blocks[0])
        inflows = [
            Inflow(link, call, SEND, self.sequence, {0: all_blocks[link.rank]})
            for link in self.links
        ]
        outflows = self._results(
            call, lambda link: [each for each in all_blocks if each.number != link.rank]
        )
        self._flow(inflows, outflows, None)

    def _results(self, call: Call, blocks: Callable[[Link], list[Block]]) -> list[Outflow]:
        return [Outflow(each, call, RESULT, self.sequence, blocks(each)) for each in self.links]

    def _ring(self, index: int, total: int) -> Ring:
        # Kept: fresh memory would cost more than the reduction.
        while len(self._rings) <= index:
            self._rings.append(bytearray(Ring.CHUNKS * CHUNK_BYTES))
        memory = self._rings[index]
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return Ring(memoryview(memory), address, total)

    def _flow(
        self,
        inflows: Sequence[Inflow],
        outflows: Sequence[Outflow],
        advance: Callable[[], None] | None,
    ) -> None:
        """Move everything that can be moved, until nothing is left."""
        poller = select.poll()
        masks: dict[int, int] = {}
        open_flows = {
            flow.link.sock.fileno(): (flow, outflow)
            for flow, outflow in zip(inflows, outflows, strict=True)
        }
        patience = self._patience()
        uncalled = len(inflows)
        self._has_agreed = lambda rank: inflows[rank - 1].has_called
        for link in self.links:
            link.begin_stream()
        while open_flows:
            for descriptor, (inflow, outflow) in list(open_flows.items()):
                wanted = _HANGUP
                if inflow.has_room():
                    wanted |= select.POLLIN
                if inflow.has_called and outflow.has_work():
                    wanted |= select.POLLOUT
                elif inflow.is_done and outflow.is_done:
                    # It may leave: what it says from now on belongs to the next round.
                    del open_flows[descriptor]
                    poller.unregister(descriptor)
                    continue
                if masks.get(descriptor) != wanted:
                    masks[descriptor] = wanted
                    poller.register(descriptor, wanted)
            if not open_flows:
                break
            moved = False
            for descriptor, events in poller.poll(patience.beat * 1000):
                inflow, outflow = open_flows[descriptor]
                with self._blamed(inflow.link):
                    if events & select.POLLIN:
                        moved |= inflow.pull() > 0
                    elif events & _HANGUP:
                        self._ended(inflow.link)
                    if events & select.POLLOUT:
                        moved |= outflow.push() > 0
            left = sum(not flow.has_called for flow in inflows)
            moved |= left != uncalled
            uncalled = left
            for inflow, outflow in open_flows.values():
                # Nobody returns before all have called, nor before its own part has arrived.
                outflow.may_end = not uncalled and inflow.is_done
            if advance is not None:
                advance()
            if moved:
                patience.moved()
            else:
                self._look(patience, inflows, outflows)
        for link in self.links:
            link.end_stream()
        self.last = self._call

    def _look(
        self, patience: Patience, inflows: Sequence[Inflow], outflows: Sequence[Outflow]
    ) -> None:
        late = [flow.link.rank for flow in inflows if not flow.has_called]
        late = late or [flow.link.rank for flow in inflows if not flow.is_done]
        late = late or [
            link.rank for link, flow in zip(self.links, outflows, strict=True) if not flow.is_done
        ]
        patience.look(late, str(self._call))
        now = time.monotonic()
        for flow in inflows:
            if flow.link.is_silent(now):
                self._blame(flow.link, "its host does not answer")
            if flow.has_called:
                flow.link.heartbeat()

    # What went wrong

    def describe(self, rank: int) -> str:
        """A rank in words."""
        if rank == 0:
            return "rank 0"
        peer = self.links[rank - 1].peer
        return f"rank {rank} (pid {peer.pid} on {peer.host}; it {self._did(rank)})"

    def _patience(self) -> Patience:
        return Patience(0, self._timeout, self._stall_warn, self.describe)

    def _did(self, rank: int) -> str:  # noqa: ARG002 - all ranks have done the same
        if self.last is None:
            return "had called nothing yet"
        return f"finished collective {self.sequence - 1}, {self.last}"

    def _blamed(self, link: Link) -> _Blame:
        return _Blame(self, link)

    def _blame(self, link: Link, why: str) -> None:
        raise Lost(self.failure_of(link, why))

    def failure_of(self, link: Link, why: str) -> Failure:
        """The failure of a peer whose connection has ended: its own word, or ``why``."""
        ending = link.ending()
        if ending.failure is not None:
            return ending.failure
        kind = "left" if ending.left else "died"
        return Failure(
            kind, link.rank, link.peer.pid, link.peer.host, text=why, did=self._did(link.rank)
        )

    def _ended(self, link: Link) -> None:
        self._blame(link, "its connection ended")

    def spoke(self, link: Link, failure: Failure | None) -> Failure:
        """The failure behind a peer's last word."""
        if failure is not None:
            return failure
        peer = link.peer
        return Failure("left", link.rank, peer.pid, peer.host, did=self._did(link.rank))

    def damage(self, link: Link, why: str) -> Failure:
        """The failure of a peer that does not keep to the protocol."""
        return Failure(
            "damaged", link.rank, link.peer.pid, link.peer.host, text=why, did=self._did(link.rank)
        )

    def mismatch(self, link: Link) -> Failure:
        """What each rank calls in this round, which ``link``'s rank does not call as we do."""
        calls = [self._call, *(self._called(each) for each in self.links)]
        if all(each == self._call for each in calls):
            return self.damage(link, "a frame of another length or of another collective")
        return Failure("mismatch", calls=tuple(map(str, calls)))

    def _called(self, link: Link) -> Call:
        """What a rank calls in this round, waited for if need be."""
        if self._has_agreed(link.rank):
            return self._call
        buffer = link.buffer
        patience = self._patience()
        while True:
            with self._blamed(link):
                look_for_word(link)
                if buffer.received >= HEAD_BYTES:
                    break
                more = link.take(buffer.frame[buffer.received : HEAD_BYTES])
            buffer.received += more
            if not more:
                self._wait(link, patience)
        head = buffer.head()
        if head.tag not in _SEND_TAGS or head.sequence != self.sequence:
            raise Lost(self.damage(link, f"tag {head.tag} of collective {head.sequence}"))
        return Call.of(head)


def _nobody(rank: int) -> bool:  # noqa: ARG001 - nobody
    return False


class _Blame:
    """Turns what a connection raises into the failure of the rank at its end."""

    def __init__(self, star: Coordinator, link: Link) -> None:
        self._star, self._link = star, link

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        star, link = self._star, self._link
        if isinstance(error, Ended):
            raise Lost(star.failure_of(link, str(error))) from error
        if isinstance(error, Spoke):
            raise Lost(star.spoke(link, error.failure)) from None
        if isinstance(error, BadFrame):
            raise Lost(star.damage(link, str(error))) from error
        if isinstance(error, Different):
            raise Lost(star.mismatch(link)) from None
