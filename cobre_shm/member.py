"""The life of a communicator that belongs to a group: usable, failed, closed, or forked away.

A rank that ends by an exception tells its peers, on whichever road it ends: out of the ``with``
statement, or out of the program. A child that it forks is not the rank.
"""

from __future__ import annotations

import atexit
import copy
import os
import sys
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from cobre_shm.communicator import Communicator
from cobre_shm.errors import CobreError, CollectiveFailed, InvalidCommunicator
from cobre_shm.failpoints import reach

__all__ = ["Member", "tell_peers"]

_living: weakref.WeakSet[Member] = weakref.WeakSet()


class Member(Communicator):
    """A communicator with peers, without any operation.

    A backend calls ``_enlist`` when the group has come together, and ``_retire`` when it closes.

    Attributes:
        _unusable: Why nothing may begin any more; None while all is well. Closed or forked away is
            an ``InvalidCommunicator``, and final. Copies of it are raised: its traceback would keep
            the frames, with their arrays, as long as this lives.
    """

    _unusable: CollectiveFailed | InvalidCommunicator | None = None

    def _enlist(self) -> None:
        # Each time, as a child of multiprocessing forgets what its parent registered (Python 3.13).
        atexit.unregister(_tell_peers_at_exit)
        atexit.register(_tell_peers_at_exit)
        _living.add(self)

    def _closed(self) -> InvalidCommunicator:
        return InvalidCommunicator(
            "The communicator is closed", context={"backend": self.backend, "rank": self.rank}
        )

    def _retire(self) -> None:
        self._unusable = self._closed()
        _living.discard(self)

    def _is_over(self) -> bool:
        """Whether it was closed, or has not joined, or belongs to the parent process."""
        return isinstance(self._unusable, InvalidCommunicator)

    def _check_usable(self) -> None:
        if self._unusable is not None:
            raise copy.copy(self._unusable)

    def _taken(self) -> InvalidCommunicator:
        return InvalidCommunicator(
            "Another thread is inside a collective of this communicator",
            context={"backend": self.backend, "rank": self.rank},
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; leaving by an exception tells the peers of it first."""
        if error is not None and not isinstance(error, SystemExit):
            self._tell_peers(error)
        self.close()

    def _tell_peers(self, error: BaseException) -> None:
        """Fail the group for an exception of this rank's program, unless it has failed already."""
        if self._unusable is None:
            self._fail_for("".join(traceback.format_exception(error)))

    def _fail_for(self, text: str) -> None:
        """Fail the group because this rank's program raised what ``text`` says."""
        raise NotImplementedError

    def _begun(self) -> int:
        """How many collectives this rank has begun."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """Fail the group, unless it has failed: an exception left a collective unfinished."""
        raise NotImplementedError

    @contextmanager
    def _in_one_call(self) -> Iterator[None]:
        """For a method of several collectives: fail the group for an exception between them.

        This rank is inside a collective then, though nothing of the backend is. Errors of ours are
        raised on all ranks alike, or have failed the group already.
        """
        before = self._begun()
        try:
            yield
        except CobreError:
            raise
        except BaseException:
            if self._begun() != before:
                self._abandon()
            raise

    def _disown(self) -> None:
        """In a forked child: let go of what is the parent's, without a word to the peers."""


def _disown_in_child() -> None:
    """A forked child is not the rank: it may neither take part nor give anything back."""
    for comm in list(_living):
        comm._unusable = InvalidCommunicator(
            "The communicator belongs to the parent process and cannot be used after fork",
            context={"code": "ForkedCommunicator", "backend": comm.backend, "rank": comm.rank},
        )
        comm._disown()
    _living.clear()


def tell_peers(error: BaseException) -> None:
    """Tell the peers in every group of this process that it ends by ``error``."""
    for comm in list(_living):
        comm._tell_peers(error)


def _tell_peers_at_exit() -> None:
    """Tell the peers of an exception that nobody caught: Python keeps the one that it printed."""
    for comm in list(_living):
        reach("exit", comm.rank)
    error = getattr(sys, "last_value", None)
    if isinstance(error, BaseException) and not isinstance(error, SystemExit):
        tell_peers(error)


os.register_at_fork(after_in_child=_disown_in_child)
