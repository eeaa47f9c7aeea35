"""Numbers of descriptors that are nobody's standard input or output."""

from __future__ import annotations

import fcntl
import os
import socket

__all__ = ["above_standard", "socket_above_standard"]


def above_standard(descriptor: int) -> int:
    """Return a descriptor of the same file above 2, in the place of this one.

    In a process without standard output the next file gets its number, and what is printed would
    be written there, by this process or by one that inherits it.
    """
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def socket_above_standard(sock: socket.socket) -> socket.socket:
    """Return a socket with a descriptor above 2, in the place of this one."""
    if sock.fileno() > 2:
        return sock
    return socket.socket(fileno=above_standard(sock.detach()))
