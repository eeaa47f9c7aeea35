"""Servers as their clients meet them: real processes, over both transports."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mcp", reason='needs the extra "mcp"')
pytest.importorskip("highspy", reason='needs the extra "sddp"')

import anyio
import mcp

from tests.sddp.editing import random_case

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "cobre_shm.mcp_server")


@pytest.fixture
def allowed(tmp_path) -> Path:
    """A directory that the server may use, with the case ``case`` in it."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    random_case(folder / "case")
    return folder


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def http_server(*words):
    """Start a server on loopback; give its address."""
    process = subprocess.Popen(
        [*COMMAND, "--transport", "http", "--port", "0", *map(str, words)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/mcp", line)
        assert found, line + process.stderr.read()
        yield found[0]
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=90)


@contextlib.asynccontextmanager
async def client_of(transport, *words):
    """Give a client of a new server."""
    if transport == "stdio":
        parameters = mcp.StdioServerParameters(
            command=COMMAND[0], args=[*COMMAND[1:], *map(str, words)], env=environment()
        )
        with open(os.devnull, "w") as null:
            async with mcp.Client(mcp.stdio_client(parameters, errlog=null)) as client:
                yield client
    else:
        with http_server(*words) as url:
            async with mcp.Client(url) as client:
                yield client


@pytest.fixture(params=["stdio", "http"])
def session(request, allowed):
    """Run an async function of a client of a server, which may write."""

    def run(function, *words, transport=request.param):
        async def main():
            with anyio.fail_after(200):
                words_ = words or ("--allow", allowed, "--allow-write")
                async with client_of(transport, *words_) as client:
                    return await function(client)

        return anyio.run(main)

    return run
