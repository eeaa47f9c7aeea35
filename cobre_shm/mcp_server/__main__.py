"""Arguments of the server, and the two transports.

Over stdio the client starts the server, and owns it. Over HTTP the server listens on loopback only,
and refuses what a web page of another origin sends. Other users of the machine can reach loopback:
with ``--token-file`` it answers only to those who know the token in that file.
"""

from __future__ import annotations

import argparse
import hmac
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cobre_shm.command_line import BAD_ARGUMENTS, Parser
from cobre_shm.errors import CobreError

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

__all__ = ["main"]

_LOOPBACK = "127.0.0.1"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m cobre_shm.mcp_server",
        description="Serve training, simulation and inspection of cases to clients of the Model "
        "Context Protocol.",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="DIR",
        help="a directory in which clients may name files; may be given several times",
    )
    parser.add_argument(
        "--allow-write", action="store_true", help="results may be written there too"
    )
    parser.add_argument(
        "--transport",
        choices=("stdio", "http"),
        default="stdio",
        help="http: streamable HTTP on loopback (default: stdio)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8000,
        help="for http; 0 lets the system choose, and stderr tells it (default: 8000)",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="for http: clients must send 'Authorization: Bearer TOKEN' with this file's content",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the client leaves, or an interrupt; return the exit code."""
    options = _parser().parse_args(arguments)
    # Standard output carries the protocol.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    try:
        import anyio

        from cobre_shm.mcp_server.server import make_server
    except ImportError as error:
        print(
            f'cobre_shm.mcp_server: {error}. It needs: pip install "cobre-shm[mcp,sddp]"',
            file=sys.stderr,
        )
        return BAD_ARGUMENTS
    from cobre_shm.local import LocalCommunicator
    from cobre_shm.mcp_server.folders import Folders
    from cobre_shm.mcp_server.tools import Session

    try:
        with LocalCommunicator() as comm:
            folders = Folders(options.allow, may_write=options.allow_write)
            server = make_server(Session(comm, folders))
            if options.transport == "stdio":
                anyio.run(server.run_stdio_async)
            else:
                anyio.run(_serve_http, server, options.port, _token(options.token_file))
    except CobreError as error:
        print(f"cobre_shm.mcp_server: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except OSError as error:
        print(f"cobre_shm.mcp_server: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except KeyboardInterrupt:
        return 130
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer in 0..65535")
    return int(text)


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    token = path.read_bytes().decode("ascii", "replace").strip()
    if not token or not token.isascii():
        raise CobreError(f"{path}: holds no token of ASCII text", context={"path": str(path)})
    return token


async def _serve_http(server: MCPServer[Any], port: int, token: str | None) -> None:
    import uvicorn

    app: Any = server.streamable_http_app(host=_LOOPBACK)
    if token is not None:
        app = _Guarded(app, token)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        # Whoever reads the line below may connect at once.
        listener.listen(128)
        number = listener.getsockname()[1]
        print(f"listening on http://{_LOOPBACK}:{number}/mcp", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        await uvicorn.Server(config).serve(sockets=[listener])


class _Guarded:
    """An ASGI application that answers only to those who know the token."""

    def __init__(self, app: Any, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                headers = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)


if __name__ == "__main__":
    sys.exit(main())
