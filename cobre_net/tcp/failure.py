"""The first failure of a group: as a value, on the wire, and as the exception of every rank.

On the wire it is a JSON object of at most ``MAX_CONTROL_BYTES``. Of what comes in, every field is
checked for its type, and long texts are cut: a peer is trusted to be a rank, not to be sane.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cobre_net.tcp.wire import ABORT, MAX_CONTROL_BYTES, BadFrame, frame
from cobre_shm.errors import CollectiveFailed, CollectiveMismatch, CollectiveTimeout, RankFailed
from cobre_shm.layout import ABORTED, DEEDS, INTERRUPTED, LEFT, RAISED

__all__ = ["Failure", "Lost"]

_TEXT_BYTES = 8192
_LAST_WORDS = 4096


@dataclass(frozen=True)
class Failure:
    """Who failed first, and how.

    Attributes:
        kind: ``died``, ``left``, ``aborted``, ``raised``, ``interrupted``, ``damaged`` (``rank``
            is to blame), ``timeout`` (``rank`` gave up waiting for ``missing``) or ``mismatch``.
        rank: The rank, -1 where none is to blame.
        pid: Its process id, 0 when it is not known.
        host: Name of its host.
        value: Code of an abort.
        text: How it was noticed; the traceback of an exception.
        did: What it did last.
        missing: The ranks that did not come.
        seconds: The time limit.
        calls: What each rank called.
    """

    kind: str
    rank: int = -1
    pid: int = 0
    host: str = ""
    value: int = 0
    text: str = ""
    did: str = ""
    missing: tuple[int, ...] = ()
    seconds: float = 0.0
    calls: tuple[str, ...] = ()

    def to_frame(self) -> bytes:
        """Return the ABORT frame that says so; the calls of very many ranks are cut."""
        fields = dataclasses.asdict(self) | {"text": self.text[-_LAST_WORDS:]}
        body = json.dumps(fields).encode()
        while len(body) > MAX_CONTROL_BYTES:
            for name in ("calls", "missing", "text"):
                fields[name] = fields[name][: len(fields[name]) // 2]
            body = json.dumps(fields).encode()
        return frame(ABORT, body)

    @classmethod
    def from_body(cls, body: bytes | bytearray | memoryview) -> Failure:
        """Return the failure that an ABORT frame tells of.

        Raises:
            BadFrame: It tells of none.
        """
        try:
            told = json.loads(bytes(body).decode())
            fields: dict[str, Any] = {
                name: _TAKE[field](told[name]) for name, field in cls.__annotations__.items()
            }
            failure = cls(**fields)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise BadFrame(f"no failure: {type(error).__name__}") from error
        if failure.kind not in _KINDS:
            raise BadFrame(f"no kind of failure: {failure.kind[:40]!r}")
        return failure

    def to_error(self) -> CollectiveFailed:
        """Return the exception of the contract."""
        if self.kind == "mismatch":
            return CollectiveMismatch(self.calls)
        if self.kind == "timeout":
            return CollectiveTimeout(
                f"Nothing moved for {self.seconds:g} s; rank {self.rank} gave up waiting for "
                f"{self.text}",
                missing_ranks=self.missing,
                seconds=self.seconds,
                suggestion="Set COBRE_TCP_TIMEOUT_SECS above the longest time between two "
                "collectives.",
            )
        process = f"pid {self.pid} on {self.host}" if self.pid else f"on {self.host}"
        how = _KINDS[self.kind].format(value=self.value, text=self.text)
        did = f"; it {self.did}" if self.did else ""
        traceback = self.text if self.kind == "raised" else ""
        quoted = "".join(f"\n  | {line}" for line in traceback.splitlines())
        return RankFailed(
            f"Rank {self.rank} ({process}) {how}{did}{quoted}",
            rank=self.rank,
            pid=self.pid,
            context={
                "host": self.host,
                "last_call": self.did or None,
                "traceback": traceback or None,
            },
        )


class Lost(Exception):
    """Inside this backend: the group is lost, for ``failure``."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.kind)
        self.failure = failure


_KINDS = {
    "died": "died or cannot be reached ({text})",
    "left": DEEDS[LEFT],
    "aborted": DEEDS[ABORTED],
    "raised": DEEDS[RAISED],
    "interrupted": DEEDS[INTERRUPTED],
    "damaged": "sent what is no part of the protocol ({text})",
    "timeout": "",
    "mismatch": "",
}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value[:_TEXT_BYTES]


def _integer(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise TypeError(value)
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(value)
    return float(value)


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(value)
    return tuple(map(_integer, value))


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(value)
    return tuple(map(_text, value))


_TAKE = {
    "str": _text,
    "int": _integer,
    "float": _number,
    "tuple[int, ...]": _integers,
    "tuple[str, ...]": _texts,
}
