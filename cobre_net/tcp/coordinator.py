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
  single one. It stops reading from a worker only while that one is a whole ring ahead of the
  reduction; of the workers that the reduction waits for, the first in rank order is never
  ahead of it. Results stay in the user's memory until they are sent, so a slow reader holds up
  nobody's reduction.

So the graph of waits is a star: an edge from every worker to the coordinator, and edges from the
coordinator only to workers that have not called, or have not read. A late or dead one of these is
what the time limit and the kernel's word on the connection are for.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence

from cobre_net.tcp.call import Call
from cobre_net.tcp.centre_small import SmallRounds
from cobre_net.tcp.flows import CHUNK_BYTES, Block, Inflow, Outflow, Ring
from cobre_net.tcp.link import HANGUP, Link
from cobre_net.tcp.patience import Patience
from cobre_net.tcp.reducing import Fold
from cobre_net.tcp.wire import RESULT, SEND
from cobre_shm.arrays import writable_address

__all__ = ["Coordinator"]

# What is received at once, at most: each time costs a wake-up of the sender.
_MIN_CHUNKS, _MAX_CHUNKS = 4, 16
_ALL_RINGS_BYTES = 1 << 24


class Coordinator(SmallRounds):
    """The centre of the star."""

    def __init__(self, links: Sequence[Link], timeout: float, stall_warn: float) -> None:
        super().__init__(links, timeout, stall_warn)
        self._rings: list[bytearray] = []
        chunks = _ALL_RINGS_BYTES // CHUNK_BYTES // len(self.links)
        self._ring_bytes = CHUNK_BYTES * max(_MIN_CHUNKS, min(_MAX_CHUNKS, chunks))

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
        target = writable_address(result)
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
            self._rings.append(bytearray(self._ring_bytes))
        memory = self._rings[index]
        return Ring(memoryview(memory), writable_address(memory), total)

    def _flow(
        self,
        inflows: Sequence[Inflow],
        outflows: Sequence[Outflow],
        advance: Callable[[], None] | None,
    ) -> None:
        """Move everything that can be moved, until nothing is left."""
        self._has_agreed = lambda rank: inflows[rank - 1].has_called
        try:
            self._move(inflows, outflows, advance)
        finally:
            # The same without what was moved, which the caller wants to be rid of.
            called = {flow.link.rank for flow in inflows if flow.has_called}
            self._has_agreed = called.__contains__

    def _move(
        self,
        inflows: Sequence[Inflow],
        outflows: Sequence[Outflow],
        advance: Callable[[], None] | None,
    ) -> None:
        poller = select.poll()
        masks: dict[int, int] = {}
        open_flows = {
            flow.link.sock.fileno(): (flow, outflow)
            for flow, outflow in zip(inflows, outflows, strict=True)
        }
        patience = self._patience()
        uncalled = len(inflows)
        for link in self.links:
            link.begin_stream()
        while open_flows:
            for descriptor, (inflow, outflow) in list(open_flows.items()):
                wanted = HANGUP
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
                    elif events & HANGUP:
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
            if patience.is_due():
                # Also while others move: a rank that waits has a clock of its own.
                self._beat([inflow for inflow, _ in open_flows.values()])
        # A peer may still have to read what its kernel and ours hold.
        self._unsettled = [link for link in self.links if not link.end_stream()]
        self._end()

    def _look(
        self, patience: Patience, inflows: Sequence[Inflow], outflows: Sequence[Outflow]
    ) -> None:
        late = [flow.link.rank for flow in inflows if not flow.has_called]
        late = late or [flow.link.rank for flow in inflows if not flow.is_done]
        late = late or [
            link.rank for link, flow in zip(self.links, outflows, strict=True) if not flow.is_done
        ]
        patience.look(late, str(self._call))

    def _beat(self, inflows: Sequence[Inflow]) -> None:
        for flow in inflows:
            if flow.link.is_silent():
                self._blame(flow.link, "its host does not answer")
            if flow.has_called:
                flow.link.heartbeat()
