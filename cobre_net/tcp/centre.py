"""Rank 0's view of the group: the connections, the round that runs, and what went wrong in it."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence

from cobre_net.tcp.call import Call
from cobre_net.tcp.failure import Failure, Lost
from cobre_net.tcp.flows import Different, Spoke, look_for_word
from cobre_net.tcp.link import HANGUP, Ended, Link
from cobre_net.tcp.patience import Patience
from cobre_net.tcp.star import Star
from cobre_net.tcp.wire import HEAD_BYTES, SEND, BadFrame

__all__ = ["Centre"]

_SEND_TAGS = range(SEND, SEND + 16)


class Centre(Star):
    """The centre of the star, without any collective.

    Args:
        links: The connections, of rank 1 first.
        timeout: Seconds that nothing may move.
        stall_warn: Seconds after which a late rank is named.
    """

    def __init__(self, links: Sequence[Link], timeout: float, stall_warn: float) -> None:
        super().__init__(0, links, timeout, stall_warn)
        self._has_agreed: Callable[[int], bool] = _nobody
        # Connections that may still hold a part of a large result.
        self._unsettled: list[Link] = []

    def _begin(self, call: Call) -> None:
        self._call = call
        self.sequence += 1
        self._settle()

    def _end(self) -> None:
        self.finished, self.last = self.sequence, self._call

    def _settle(self) -> None:
        """Return to the short limit on the connections whose peers have taken large results."""
        self._unsettled = [link for link in self._unsettled if not link.end_stream()]

    def _wait(self, link: Link, patience: Patience) -> None:
        """Wait until something comes from ``link``, with an eye on all others."""
        poller = select.poll()
        by_descriptor = {each.sock.fileno(): each for each in self.links}
        for descriptor, each in by_descriptor.items():
            poller.register(descriptor, HANGUP | (select.POLLIN if each is link else 0))
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
            self._settle()
            for each in self.links:
                if each.is_silent():
                    self._blame(each, "its host does not answer")
                if each.rank not in missing:
                    each.heartbeat()

    def _missing(self, link: Link) -> list[int]:
        """Those from which nothing of this round has come, and ``link``, which is read next."""
        poller = select.poll()
        for each in self.links[self.links.index(link) :]:
            poller.register(each.sock, select.POLLIN)
        here = {descriptor for descriptor, _ in poller.poll(0)}
        return [
            each.rank
            for each in self.links[self.links.index(link) :]
            if each is link or (each.sock.fileno() not in here and not each.buffer.received)
        ]

    # What went wrong

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
        return Failure(kind, link.rank, link.peer.pid, link.peer.host, text=why, did=self.did())

    def _ended(self, link: Link) -> None:
        self._blame(link, "its connection ended")

    def spoke(self, link: Link, failure: Failure | None) -> Failure:
        """The failure behind a peer's last word."""
        if failure is not None:
            return failure
        peer = link.peer
        return Failure("left", link.rank, peer.pid, peer.host, did=self.did())

    def damage(self, link: Link, why: str) -> Failure:
        """The failure of a peer that does not keep to the protocol."""
        return Failure(
            "damaged", link.rank, link.peer.pid, link.peer.host, text=why, did=self.did()
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

    def __init__(self, star: Centre, link: Link) -> None:
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
