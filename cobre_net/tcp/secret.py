"""Where the secret comes from, and what may be done without one.

A secret in a file counts only if nobody but this user can read it: a regular file of ours, mode
0600 or less, not reached through a symbolic link. The file is opened first and looked at then, so
that nobody exchanges it in between.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import TcpConfig
from cobre_shm.selection.values import is_loopback

__all__ = ["check_exposure", "read_secret"]

_MAX_BYTES = 4096


def read_secret(config: TcpConfig) -> bytes:
    """Return the key of the group; empty where none was given.

    Raises:
        InitializationFailed: The file cannot be used.
    """
    if config.secret is not None:
        return config.secret.encode("utf-8", "surrogateescape")
    if config.secret_file is None:
        return b""
    name = config.secret_file
    try:
        key = _read_inherited(name) if name.startswith("fd:") else _read_private(name)
    except OSError as error:
        raise _unusable(name, error.strerror or str(error), error) from error
    if not key:
        raise _unusable(name, "it is empty")
    if len(key) > _MAX_BYTES:
        raise _unusable(name, f"it is longer than {_MAX_BYTES} bytes")
    return key


def check_exposure(config: TcpConfig, key: bytes, address: str, what: str) -> None:
    """Refuse a network that others reach, unless a secret guards it or the user wants it so.

    Args:
        config: Says whether the user wants it so.
        key: The secret.
        address: The numeric address that ``what`` is about.
        what: For the message.

    Raises:
        InitializationFailed: Whoever reaches the address could join.
    """
    if key or config.insecure or is_loopback(address):
        return
    raise InitializationFailed(
        "tcp",
        f"{what} {address} is not loopback and there is no secret: whoever reaches it could join",
        operation="configure",
        context={"address": address},
        suggestion="Give all ranks the same secret: COBRE_TCP_SECRET_FILE=FILE (mode 0600). On a "
        "network where everybody is trusted, COBRE_TCP_INSECURE=1.",
    )


def _read_inherited(name: str) -> bytes:
    descriptor = int(name.removeprefix("fd:"))
    os.set_inheritable(descriptor, False)
    return _read(name, descriptor)


def _read_private(name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _read(name, descriptor)
    finally:
        os.close(descriptor)


def _read(name: str, descriptor: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _unusable(name, "it is not a regular file")
    if status.st_uid != os.geteuid():
        raise _unusable(name, f"it belongs to user {status.st_uid}, not to {os.geteuid()}")
    # Nobody else opens memory without a name, whose mode is 0777.
    if status.st_nlink and status.st_mode & 0o077:
        raise _unusable(
            name, f"others may use it: mode {stat.S_IMODE(status.st_mode):04o}, expected 0600"
        )
    # At a place of its own: other ranks have the same open file.
    return _stripped(os.pread(descriptor, _MAX_BYTES + 2, 0))


def _stripped(text: bytes) -> bytes:
    # As an editor or echo leaves it.
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _unusable(name: str, why: str, source: Any = None) -> InitializationFailed:
    return InitializationFailed(
        "tcp",
        f"The secret cannot be read from {name!r}: {why}",
        operation="configure",
        source=source,
        context={"setting": "COBRE_TCP_SECRET_FILE", "value": name},
        suggestion="It is a file of this user with mode 0600: "
        "(umask 077; head -c 32 /dev/urandom | base64 > FILE)",
    )
