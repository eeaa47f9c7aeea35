"""The coordinator's listening socket, and where it may listen."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import TcpConfig
from cobre_shm.selection.values import is_loopback, join_address, names_loopback

__all__ = ["listen"]

_WILDCARDS = ("0.0.0.0", "::")


def listen(config: TcpConfig, backlog: int) -> socket.socket:
    """Return the socket on which the ranks are awaited.

    Raises:
        InitializationFailed: The address cannot be had.
    """
    if config.bind_addr.startswith("fd:"):
        return _inherited(int(config.bind_addr.removeprefix("fd:")), backlog)
    address = config.bind_addr
    if address in _WILDCARDS:
        address = _narrowed(config, address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        # A listening socket of the run before, in its last state, does not keep the port.
        return socket.create_server(
            (address, config.port),
            family=family,
            backlog=backlog,
            dualstack_ipv6=address == "::",
        )
    except (OSError, ValueError) as error:
        # ValueError: this kernel has no IPv6.
        where = join_address(address, config.port)
        # The text of create_server's error repeats the address.
        code = getattr(error, "errno", None)
        why = os.strerror(code) if code else str(error)
        raise InitializationFailed(
            "tcp",
            f"The coordinator cannot listen on {where}: {why}",
            operation="listen",
            source=error,
            context={"address": where},
            suggestion="Choose another COBRE_TCP_PORT, or an address of this host."
            if code in (errno.EADDRINUSE, errno.EACCES)
            else "COBRE_TCP_BIND_ADDR is an address of the host on which rank 0 runs.",
        ) from error


def _narrowed(config: TcpConfig, wildcard: str) -> str:
    """Loopback in place of a wildcard where nobody was told to come any other way.

    Debian gives a host's own name an address of loopback, on that host alone: where others may
    come, such a name says nothing of the address by which they do.
    """
    try:
        found = socket.getaddrinfo(config.coordinator, config.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        # The others may know it by a name that means nothing here.
        return wildcard
    addresses = [str(each[4][0]) for each in found]
    is_guarded = config.insecure or config.secret is not None or config.secret_file is not None
    may_be_meant = names_loopback(config.coordinator) or not is_guarded
    if addresses and all(map(is_loopback, addresses)) and may_be_meant:
        return addresses[0]
    return "::" if all(":" in each for each in addresses) else wildcard


def _inherited(descriptor: int, backlog: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        with contextlib.ExitStack() as stack:
            own = os.dup(descriptor)
            stack.callback(os.close, own)
            listener = socket.socket(fileno=own)
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listener.detach()
                raise OSError(errno.EINVAL, "not a listening socket")
            stack.pop_all()
        listener.listen(backlog)
        return listener
    except OSError as error:
        raise InitializationFailed(
            "tcp",
            f"Descriptor {descriptor} cannot be listened on: {error.strerror or error}",
            operation="listen",
            source=error,
            context={"setting": "COBRE_TCP_BIND_ADDR", "value": f"fd:{descriptor}"},
            suggestion="fd:N is set by the launcher; start ranks with python -m cobre_shm.spawn",
        ) from error
