"""The thread of rank 0 that notices a lost peer while rank 0 computes.

In a star, the ranks that wait for rank 0 learn of a dead one from rank 0 alone, which may be far
from its next collective. So a thread sleeps in ``poll`` on the hang-ups of all connections, which
data does not wake. Then it takes the communicator's lock, which rank 0 holds while inside a
collective: there, rank 0 notices by itself.

With the lock held no frame is half sent and none half read, so the thread may look at what the
peer said last and send the failure to all others.

A hang-up behind much that rank 0 has not read does not arrive by itself. So the thread looks five
times a second for connections with so much unread, and probes them (``Link.probe``).
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections.abc import Callable, Sequence

from cobre_net.tcp.link import Link

__all__ = ["Sentinel"]

_BEAT_SECS = 0.2


class Sentinel:
    """The thread, from construction to ``stop``.

    Args:
        links: The connections.
        on_hangup: A method called in the thread with the link whose peer hung up; returns whether
            to go on watching the others.
        on_unread: A method called in the thread with the links that have much unread, if any.

    The thread does not keep the object of these methods alive.
    """

    def __init__(
        self,
        links: Sequence[Link],
        on_hangup: Callable[[Link], bool],
        on_unread: Callable[[Sequence[Link]], None],
    ) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        watched = {link.sock.fileno(): link for link in links}
        methods = weakref.WeakMethod(on_hangup), weakref.WeakMethod(on_unread)
        self._thread = threading.Thread(
            target=_watch, args=(self._wake, watched, *methods), name="cobre-tcp", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _release, self._wake, self._thread)
        # A daemon is left alone at exit.
        self._finalizer.atexit = False

    def stop(self) -> None:
        """End the thread. Not with the communicator's lock held."""
        self._finalizer()

    def disown(self) -> None:
        """Forget the thread, which a forked child does not have."""
        self._finalizer.detach()
        os.close(self._wake)


def _release(wake: int, thread: threading.Thread) -> None:
    os.eventfd_write(wake, 1)
    if thread is not threading.current_thread():
        thread.join()
    os.close(wake)


def _watch(
    wake: int,
    watched: dict[int, Link],
    hangup: weakref.WeakMethod[Callable[[Link], bool]],
    unread: weakref.WeakMethod[Callable[[Sequence[Link]], None]],
) -> None:
    poller = select.poll()
    poller.register(wake, select.POLLIN)
    for descriptor in watched:
        poller.register(descriptor, select.POLLRDHUP)
    while True:
        for descriptor, _ in poller.poll(1000 * _BEAT_SECS):
            on_hangup = hangup()
            if descriptor == wake or on_hangup is None or not on_hangup(watched[descriptor]):
                return
            poller.unregister(descriptor)
            del watched[descriptor], on_hangup
        late = [link for link in watched.values() if link.has_much_unread()]
        on_unread = unread()
        if on_unread is None:
            return
        if late:
            on_unread(late)
        del on_unread
