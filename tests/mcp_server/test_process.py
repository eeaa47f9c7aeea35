"""The server as a process: what it imports, who may talk to it, and what it does with nonsense."""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import urllib.parse

import pytest

from cobre_shm.errors import CobreError
from cobre_shm.mcp_server.__main__ import _token
from tests.mcp_server.conftest import COMMAND, environment, http_server
from tests.support.processes import started

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": "begin",
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    },
}
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}
LIST = {"jsonrpc": "2.0", "id": "end", "method": "tools/list", "params": {}}
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "query-convergence", "arguments": {"result": "train-1", "first": 1}},
}


def nonsense(count):
    """Messages that are none: pieces, other types, unknown methods, depths, and plain bytes."""
    rng = random.Random(20261123)
    values = [None, True, -1, 1e308, "", "x" * 5000, [], {}, [[]], {"": None}, "\u0000", 10**30]
    for turn in range(count):
        text = json.dumps(CALL)
        kind = turn % 8
        if kind == 0:
            yield text[: rng.randrange(len(text))].encode()
        elif kind == 1:
            yield bytes(rng.choices(range(256), k=rng.randrange(1, 200))).replace(b"\n", b"")
        elif kind == 2:
            message = json.loads(text)
            message[rng.choice(list(message))] = rng.choice(values)
            yield json.dumps(message).encode()
        elif kind == 3:
            message = json.loads(text)
            message["params"][rng.choice(["name", "arguments"])] = rng.choice(values)
            yield json.dumps(message).encode()
        elif kind == 4:
            message = json.loads(text)
            message["params"]["arguments"][rng.choice(["result", "first", "new"])] = rng.choice(
                values
            )
            yield json.dumps(message).encode()
        elif kind == 5:
            yield json.dumps([CALL] * rng.randrange(4)).encode()
        elif kind == 6:
            depth = rng.choice([10, 1000, 100_000])
            yield b"[" * depth + b"]" * rng.choice([0, depth])
        else:
            data = bytearray(text.encode())
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield bytes(data).replace(b"\n", b" ")


def write_all(stream, data):
    stream.write(data)
    stream.flush()


def over_stdio(allowed):
    return started(
        [*COMMAND, "--allow", allowed],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def test_nonsense_over_stdio_is_answered_or_refused(allowed):
    with over_stdio(allowed) as process:
        lines = [json.dumps(INITIALIZE).encode(), json.dumps(INITIALIZED).encode()]
        lines += [*nonsense(400), json.dumps(LIST).encode()]
        # All at once, while it answers. The input ends after the last answer: a server whose client
        # has gone answers nothing more.
        writer = threading.Thread(target=write_all, args=(process.stdin, b"\n".join(lines) + b"\n"))
        writer.start()
        answers = []
        for line in process.stdout:
            answers.append(json.loads(line))
            if answers[-1].get("id") == "end":
                break
        writer.join(30)
        process.stdin.close()
        answers += [json.loads(line) for line in process.stdout]
        assert process.wait(30) == 0
    assert all(answer["jsonrpc"] == "2.0" for answer in answers)
    (last,) = [answer for answer in answers if answer.get("id") == "end"]
    assert len(last["result"]["tools"]) == 9


def post(url, body, **headers):
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        base = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
        }
        connection.request("POST", parts.path, body, {**base, **headers})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def test_nonsense_over_http_is_answered_or_refused(allowed):
    with http_server("--allow", allowed) as url:
        status, _, headers = post(url, json.dumps(INITIALIZE))
        assert status == 200
        known = {"Mcp-Session-Id": headers["Mcp-Session-Id"]}
        post(url, json.dumps(INITIALIZED), **known)
        for body in nonsense(160):
            status, _, _ = post(url, body, **known)
            assert status in range(200, 500), body
        status, body, _ = post(url, json.dumps(LIST), **known)
        assert status == 200
        assert b"get-config-schema" in body


def test_other_origins_and_hosts_are_refused(allowed):
    with http_server("--allow", allowed) as url:
        assert post(url, json.dumps(INITIALIZE), Origin="http://example.org")[0] == 403
        assert post(url, json.dumps(INITIALIZE), Host="example.org")[0] == 421


def test_only_those_who_know_the_token_are_served(allowed, tmp_path):
    (tmp_path / "token").write_text("open sesame\n")
    with http_server("--allow", allowed, "--token-file", tmp_path / "token") as url:
        for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "open sesame"}):
            assert post(url, json.dumps(INITIALIZE), **header)[0] == 401
        header = {"Authorization": "Bearer open sesame"}
        assert post(url, json.dumps(INITIALIZE), **header)[0] == 200


def test_server_imports_no_other_backend(allowed):
    code = (
        "import sys\nfrom cobre_shm.mcp_server import __main__, tools, server\n"
        "from cobre_shm.mcp_server.folders import Folders\n"
        "from cobre_shm import LocalCommunicator\n"
        "session = tools.Session(LocalCommunicator(), Folders([sys.argv[1]]))\n"
        "server.make_server(session)\n"
        "case = sys.argv[1] + '/case'\n"
        "few = {'training': {'forward_passes': 1}}\n"
        "done = session.train(case, few, None, False, print, list)\n"
        "session.simulate(case, done['result'], 1, None, list)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(allowed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "cobre_shm.local" in loaded
    others = {"cobre_shm.shm", "cobre_shm.segment", "cobre_shm.kernels", "cobre_net"}
    assert not loaded & (others | {"numba", "posix_ipc", "mpi4py"})


@pytest.mark.parametrize(
    "words", [("--allow", "/no/such/directory"), ("--token-file", "/none"), ("--port", "65536")]
)
def test_wrong_arguments_are_told_in_one_line(words):
    done = subprocess.run(
        [*COMMAND, "--transport", "http", "--port", "0", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "cobre_shm.mcp_server: " in done.stderr.splitlines()[-1]
    assert words[1] in done.stderr


@pytest.mark.parametrize("content", [b"", "kennwört".encode()])
def test_file_without_a_token_is_refused(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(CobreError, match="holds no token"):
        _token(tmp_path / "token")


def test_missing_extra_is_told_by_the_line_that_installs_it():
    code = (
        "import sys; sys.modules['mcp'] = None\n"
        "from cobre_shm.mcp_server.__main__ import main\nsys.exit(main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'pip install "cobre-shm[mcp,sddp]"' in done.stderr


def test_interrupt_ends_the_server_in_the_middle_of_a_training(allowed):
    with over_stdio(allowed) as process:
        limits = {"training": {"stopping_rules": [{"type": "iteration_limit", "limit": 10**6}]}}
        arguments = {"case": str(allowed / "case"), "config_overrides": limits}
        train = {
            **CALL,
            "params": {"name": "train", "arguments": arguments, "_meta": {"progressToken": "p"}},
        }
        for message in (INITIALIZE, INITIALIZED, train):
            process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        while b"notifications/progress" not in process.stdout.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=180)
    assert process.returncode == 130
