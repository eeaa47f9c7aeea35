"""One rank's part in a group over tcp: joining, entering a collective, failing, leaving."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from cobre_net.tcp.coordinator import Coordinator
from cobre_net.tcp.failure import Failure, Lost
from cobre_net.tcp.joining import join, own_identity
from cobre_net.tcp.link import SLICE_SECS, Link, say_last
from cobre_net.tcp.reception import gather
from cobre_net.tcp.secret import read_secret
from cobre_net.tcp.sentinel import Sentinel
from cobre_net.tcp.wire import SHUTDOWN, frame
from cobre_net.tcp.worker import Worker
from cobre_shm.communicator import exit_status
from cobre_shm.errors import CollectiveFailed, InvalidCommunicator
from cobre_shm.member import Member
from cobre_shm.selection.kinds import TcpConfig

__all__ = ["Membership"]

# In which the sentinel's thread, having the lock, comes to say so, on a crowded machine.
_LOOK_SECS = 1.0


class Membership(Member):
    """A communicator as far as it belongs to a group, without any operation.

    Args:
        config: As of :class:`TcpCommunicator`.
    """

    backend = "tcp"
    is_leader = True

    def __init__(self, config: TcpConfig) -> None:
        self.rank = config.rank
        self.size = config.size
        self._config = config
        self._lock = threading.Lock()
        # How often the sentinel's thread has wanted the lock, and how often it was done with it;
        # and whether it has it, which is never long.
        self._looks_begun = self._looks_ended = 0
        self._is_looking = False
        self._star: Coordinator | Worker | None = None
        self._sentinel: Sentinel | None = None
        if config.size > 1:
            self._connect(config)
        self._enlist()

    def _connect(self, config: TcpConfig) -> None:
        key = read_secret(config)
        slice_secs = min(SLICE_SECS, config.timeout_secs / 4)
        times = config.timeout_secs, config.stall_warn_secs
        if config.rank == 0:
            links = gather(config, key, slice_secs)
            self._star = Coordinator(links, *times)
            if config.size > 2:
                self._sentinel = Sentinel(links, self._on_hangup, self._on_unread)
        else:
            self._star = Worker(config.rank, join(config, key, slice_secs), *times)

    def abort(self, code: int = 1) -> NoReturn:
        """See :meth:`Communicator.abort`."""
        status = exit_status(code)
        if self._unusable is None:
            self._fail(self._own("aborted", value=status))
        raise SystemExit(status)

    def close(self) -> None:
        """See :meth:`Communicator.close`. A collective that runs in another thread goes on."""
        if self._is_over():
            return
        if not self._take_lock():
            raise InvalidCommunicator("Another thread is inside a collective: close() must wait")
        try:
            try:
                is_whole = self._unusable is None
                self._retire()
            finally:
                self._lock.release()
            if is_whole and self._star is not None:
                say_last(self._star.links, frame(SHUTDOWN))
        finally:
            # Also if that was interrupted: then peers find the connections ended. They end only
            # when the sentinel, too, has let go of them.
            self._retire()
            if self._sentinel is not None:
                self._sentinel.stop()
            for link in [] if self._star is None else self._star.links:
                link.close()

    def _fail_for(self, text: str) -> None:
        self._fail(self._own("raised", text=text))

    def _disown(self) -> None:
        if self._sentinel is not None:
            self._sentinel.disown()
        if self._star is not None:
            for link in self._star.links:
                with contextlib.suppress(OSError):
                    link.sock.close()

    def _round(self) -> _Round:
        return _Round(self)

    def _enter_slowly(self) -> None:
        """Take the lock that somebody has."""
        if not self._take_lock():
            raise self._taken()

    def _fail_inside(self, error: BaseException) -> None:
        """Draw the consequences of what was raised inside a collective.

        Raises:
            CollectiveFailed: In place of a ``Lost``.
        """
        if isinstance(error, Lost):
            raise self._fail(error.failure) from error.__cause__
        # A signal handler raised, or memory ran out: this rank is out of step for good.
        self._abandon()

    def _abandon(self) -> None:
        if self._unusable is None:
            self._fail(self._own("interrupted"))

    def _begun(self) -> int:
        return 0 if self._star is None else self._star.sequence

    def _take_lock(self) -> bool:
        """Take the lock; False: a thread of the user holds it, perhaps this one below a handler."""
        ended = self._looks_ended
        if self._lock.acquire(blocking=False):
            return True
        # If the sentinel had it, that look had begun by now and had not ended before.
        if self._looks_begun == ended:
            return False
        # It wants it at least. If it has it, it says so or gives it back within this time.
        return self._lock.acquire(timeout=_LOOK_SECS) or (self._is_looking and self._lock.acquire())

    def _own(self, kind: str, **fields: Any) -> Failure:
        me = own_identity()
        did = "" if self._star is None else self._star.did()
        return Failure(kind, self.rank, me.pid, me.host, did=did, **fields)

    def _fail(self, failure: Failure) -> CollectiveFailed:
        """Make the first failure of the group everybody's; return it as an exception."""
        error = failure.to_error()
        self._unusable = copy.copy(error)
        if self._star is not None:
            say_last(self._star.links, failure.to_frame())
        self._report(failure)
        return error

    def _report(self, failure: Failure) -> None:
        """Tell the launcher, if there is one, which cannot look into connections."""
        if self._config.report is None:
            return
        line = json.dumps(
            {"rank": failure.rank, "kind": failure.kind, "value": failure.value}
        ).encode()
        with contextlib.suppress(OSError):
            # One write of less than PIPE_BUF is never mixed with another rank's.
            os.write(int(self._config.report.removeprefix("fd:")), line + b"\n")

    def _on_hangup(self, link: Link) -> bool:
        """Be the sentinel's thread: a peer is gone; whether to go on watching the others."""
        with self._looking():
            return self._look_at(link)

    def _on_unread(self, links: Sequence[Link]) -> None:
        """Be the sentinel's thread: of these peers no more than the beginning of a part is read.

        Inside a collective, rank 0 sends heartbeats itself.
        """
        if self._lock.locked():
            return
        with self._looking():
            for link in links if self._unusable is None else ():
                # Rank 0 may have been in a collective meanwhile.
                if link.has_much_unread():
                    link.probe()

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Have the lock as the sentinel's thread, so that ``_take_lock`` knows who has it."""
        self._looks_begun += 1
        try:
            with self._lock:
                self._is_looking = True
                try:
                    yield
                finally:
                    self._is_looking = False
        finally:
            self._looks_ended += 1

    def _look_at(self, link: Link) -> bool:
        star = self._star
        if self._unusable is not None or not isinstance(star, Coordinator):
            return False
        failure = star.failure_of(link, "its connection ended")
        if failure.kind != "left":
            self._fail(failure)
        # If somebody still waits for one that closed, the next collective finds out.
        return failure.kind == "left"


class _Round:
    """One collective: the lock, and what a failure inside does to the communicator."""

    def __init__(self, comm: Membership) -> None:
        self._comm = comm

    def __enter__(self) -> Coordinator | Worker | None:
        comm = self._comm
        if not comm._lock.acquire(blocking=False):
            comm._enter_slowly()
        if comm._unusable is not None:
            # The sentinel was faster.
            comm._lock.release()
            comm._check_usable()
        return comm._star

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        comm = self._comm
        try:
            if error is not None:
                comm._fail_inside(error)
        finally:
            comm._lock.release()
