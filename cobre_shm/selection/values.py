"""What a setting may hold: strict parsing of text, and the check of a value.

Environment variables arrive as text (``parse``, then ``check``); a program passes values
(``check`` alone). Both raise ValueError, and ``expected`` says in words what would be right, so
that a message is made in one place whatever the source of the value was.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import operator
import os
import re
import socket
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from cobre_shm import failpoints, tuning

__all__ = [
    "BackendName",
    "BindAddress",
    "Coordinator",
    "Descriptor",
    "Explained",
    "Failpoint",
    "Flag",
    "Integer",
    "Seconds",
    "Secret",
    "SecretFile",
    "SegmentName",
    "TuningFile",
    "ValueType",
    "Word",
    "is_loopback",
    "join_address",
    "names_loopback",
    "split_address",
]


class Explained(ValueError):
    """A value that is not valid for a reason that ``expected`` does not give."""


class ValueType(Protocol):
    """A set of values, and how they are written."""

    @property
    def expected(self) -> str:
        """The set in words, to follow "expected"."""

    def parse(self, text: str) -> Any:
        """Return what ``text`` stands for; ValueError when it stands for nothing."""

    def check(self, value: Any) -> Any:
        """Return ``value`` in its normal form; ValueError when it is not in the set."""


class _Text:
    """What is written as it is."""

    def parse(self, text: str) -> str:
        """The text is the value."""
        return text


@dataclass(frozen=True)
class Failpoint(_Text):
    """A place where a test makes a rank fail."""

    expected: ClassVar[str] = failpoints.EXPECTED

    def check(self, value: Any) -> str:
        """Return the text that ``failpoints`` understands."""
        failpoints.parse(value)
        return str(value)


@dataclass(frozen=True)
class TuningFile(_Text):
    """A file of switch points, or ``auto``."""

    expected: ClassVar[str] = "`auto`, or a file written by python -m cobre_shm.tune"

    def check(self, value: Any) -> str:
        """Return the name of a file that can be read."""
        try:
            tuning.load_tuning(str(value))
        except ValueError as error:
            raise Explained(str(error)) from error
        return str(value)


@dataclass(frozen=True)
class Integer:
    """An integer in ``low..high``, both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        high_text: What a message says in place of ``high``, where another setting bounds it.
    """

    low: int
    high: int
    high_text: str = ""

    @property
    def expected(self) -> str:
        """See :class:`ValueType`."""
        return f"an integer in {self.low}..{self.high_text or self.high}"

    def parse(self, text: str) -> int:
        """Decimal digits only: ``int()`` would take spaces, underscores and other scripts."""
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text) is None:
            raise ValueError(text)
        return int(text)

    def check(self, value: Any) -> int:
        """Take whatever acts as an integer, numpy's included; a bool is a mistake."""
        if isinstance(value, bool):
            raise ValueError(value)
        try:
            number = operator.index(value)
        except TypeError as error:
            raise ValueError(value) from error
        if not self.low <= number <= self.high:
            raise ValueError(value)
        return number


@dataclass(frozen=True)
class Word:
    """One of a few words.

    Attributes:
        words: The words, in lower case.
    """

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        """See :class:`ValueType`."""
        return f"one of {', '.join(self.words)}"

    def parse(self, text: str) -> str:
        """Case carries no meaning."""
        return text.lower()

    def check(self, value: Any) -> str:
        """See :class:`ValueType`."""
        if value not in self.words:
            raise ValueError(value)
        return str(value)


@dataclass(frozen=True)
class Flag:
    """Yes or no; as text, ``1`` or ``0``.

    Attributes:
        or_auto: Whether ``auto``, which leaves it to the backend, is a value too.
    """

    or_auto: bool = False

    @property
    def expected(self) -> str:
        """See :class:`ValueType`."""
        return "auto, 1 or 0" if self.or_auto else "1 or 0"

    def parse(self, text: str) -> bool | str:
        """See :class:`ValueType`."""
        if text in ("0", "1"):
            return text == "1"
        return self.check(text.strip().lower())

    def check(self, value: Any) -> bool | str:
        """A bool, or what acts as the integers 0 and 1; with ``auto``, that or a bool alone."""
        if self.or_auto and not isinstance(value, bool):
            if value == "auto":
                return "auto"
            raise ValueError(value)
        if isinstance(value, str) or value not in (0, 1):
            raise ValueError(value)
        return bool(value)


@dataclass(frozen=True)
class Seconds:
    """A duration above zero; ``inf`` stands for no limit."""

    expected: ClassVar[str] = "a number of seconds above 0, or inf"

    def parse(self, text: str) -> float:
        """Decimal or exponent notation, or ``inf``."""
        if re.fullmatch(r"[+-]?([0-9.]+([eE][+-]?[0-9]+)?|inf)", text) is None:
            raise ValueError(text)
        return float(text)

    def check(self, value: Any) -> float:
        """Refuse zero (no collective could complete), negative numbers and NaN."""
        if isinstance(value, bool | str):
            raise ValueError(value)
        try:
            seconds = float(value)
        except (TypeError, OverflowError) as error:
            raise ValueError(value) from error
        if math.isnan(seconds) or seconds <= 0:
            raise ValueError(value)
        return seconds


@dataclass(frozen=True)
class BackendName:
    """A backend's name, or ``auto``; which names exist is the registry's to say."""

    expected: ClassVar[str] = "auto, or the name of a backend"

    def parse(self, text: str) -> str:
        """Case and surrounding spaces carry no meaning."""
        return text.strip().lower()

    def check(self, value: Any) -> str:
        """See :class:`ValueType`."""
        if not isinstance(value, str):
            raise ValueError(value)
        return self.parse(value)


@dataclass(frozen=True)
class SegmentName(_Text):
    """Name of a POSIX shared memory object; the leading slash may be left out.

    Or ``fd:N``, a descriptor that this process has inherited; a POSIX name that begins so needs
    its slash.

    The limit leaves room in the 255 bytes of a file name for a suffix.
    """

    max_bytes: ClassVar[int] = 250
    expected: ClassVar[str] = (
        f"1 to {max_bytes} bytes of UTF-8 without NUL, and no slash other than a leading one; "
        "or fd:N for an inherited descriptor"
    )

    def check(self, value: Any) -> str:
        """Return the name with its leading slash, so that all spellings name one segment."""
        if not isinstance(value, str):
            raise ValueError(value)
        if value.startswith("fd:"):
            return _descriptor(value)
        bare = value.removeprefix("/")
        # What cannot be encoded is a ValueError too.
        if not 1 <= len(bare.encode()) <= self.max_bytes or bare in (".", ".."):
            raise ValueError(value)
        if "/" in bare or "\0" in bare:
            raise ValueError(value)
        return f"/{bare}"


@dataclass(frozen=True)
class Coordinator(_Text):
    """Where rank 0 listens: ``host``, ``host:port``, ``v6``, or ``[v6]:port``."""

    expected: ClassVar[str] = "host, host:port or [v6]:port, with a port in 1..65535"

    def check(self, value: Any) -> str:
        """See :class:`ValueType`."""
        if not isinstance(value, str):
            raise ValueError(value)
        split_address(value)
        return value


@dataclass(frozen=True)
class BindAddress(_Text):
    """An IP address of this host, or ``fd:N``, a listening socket that this process inherited."""

    expected: ClassVar[str] = "an IPv4 or IPv6 address, or fd:N for an inherited listening socket"

    def check(self, value: Any) -> str:
        """Return the address as ``ipaddress`` writes it."""
        if not isinstance(value, str):
            raise ValueError(value)
        if value.startswith("fd:"):
            return _descriptor(value)
        return str(ipaddress.ip_address(value))


@dataclass(frozen=True)
class Descriptor(_Text):
    """``fd:N``, a descriptor that this process inherited."""

    expected: ClassVar[str] = "fd:N for an inherited descriptor"

    def check(self, value: Any) -> str:
        """See :class:`ValueType`."""
        if not isinstance(value, str):
            raise ValueError(value)
        return _descriptor(value)


@dataclass(frozen=True)
class Secret(_Text):
    """What the ranks of a group know and nobody else."""

    expected: ClassVar[str] = "a text that is not empty"

    def check(self, value: Any) -> str:
        """See :class:`ValueType`."""
        if not isinstance(value, str) or not value:
            raise ValueError("not shown")
        return value


@dataclass(frozen=True)
class SecretFile(_Text):
    """The path of a file, or ``fd:N`` for one that this process inherited open."""

    expected: ClassVar[str] = "the path of a file, or fd:N for an inherited descriptor"

    def check(self, value: Any) -> str:
        """See :class:`ValueType`."""
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(value)
        return _descriptor(value) if value.startswith("fd:") else value


def _descriptor(value: str) -> str:
    if re.fullmatch(r"fd:[0-9]{1,9}", value) is None:
        raise ValueError(value)
    return f"fd:{int(value.removeprefix('fd:'))}"


def split_address(text: str) -> tuple[str, int | None]:
    """Split ``host``, ``host:port``, ``v6`` or ``[v6]:port`` into host and port.

    Raises:
        ValueError: ``text`` is none of them.
    """
    bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::([0-9]+))?", text)
    plain = re.fullmatch(r"([A-Za-z0-9._-]+)(?::([0-9]+))?", text)
    if bracketed is not None:
        host, port = bracketed.groups()
        ipaddress.IPv6Address(host)
    elif plain is not None:
        host, port = plain.groups()
    else:
        host, port = str(ipaddress.IPv6Address(text)), None
    if port is None:
        return host, None
    return host, Integer(1, 65535).check(int(port))


def join_address(host: str, port: int | None) -> str:
    """Return ``host:port`` or ``[v6]:port``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether a numeric address, perhaps with a scope, is that of this machine alone."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped is not None:
        number = number.ipv4_mapped
    return number.is_loopback


def names_loopback(host: str) -> bool:
    """Whether a host is written as this machine alone: as a number, or ``localhost``."""
    with contextlib.suppress(ValueError):
        return is_loopback(host)
    with contextlib.suppress(OSError):
        # Numbers of other forms, as 127.1.
        return is_loopback(socket.inet_ntoa(socket.inet_aton(host)))
    return f".{host.lower()}".endswith(".localhost")
