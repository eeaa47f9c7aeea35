"""The check around every test notices each kind of thing that a test can leave."""

import contextlib
import mmap
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest

from cobre_shm.segment.posix import create_object, remove_object
from cobre_shm.segment.unnamed import create_unnamed
from tests.support import residue
from tests.support.residue import Residue, is_a_run, snapshot

# Only ends tests that hang.
_WATCHDOG_SECS = 60.0


@contextlib.contextmanager
def a_segment():
    name = f"/cobre-test-{secrets.token_hex(8)}"
    os.close(create_object(name, 4096))
    yield
    remove_object(name)


@contextlib.contextmanager
def a_child():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield
        process.communicate()


@contextlib.contextmanager
def a_zombie():
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield


@contextlib.contextmanager
def a_grandchild():
    code = "import subprocess; subprocess.run(['cat'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + _WATCHDOG_SECS
        while not children.read_text():
            assert time.monotonic() < deadline
        yield
        process.communicate()


@contextlib.contextmanager
def an_orphan():
    """What a launcher leaves that is killed: no child of ours, nor of what we started."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=2).pid)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    fd = os.pidfd_open(int(done.stdout))
    yield
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    # It is not ours to reap.
    assert select.select([fd], [], [], _WATCHDOG_SECS)[0]
    os.close(fd)


@contextlib.contextmanager
def a_descriptor():
    fd = os.open(os.devnull, os.O_RDONLY)
    yield
    os.close(fd)


@contextlib.contextmanager
def a_thread():
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


@contextlib.contextmanager
def a_mapping(unnamed):
    name = f"/cobre-test-{secrets.token_hex(8)}"
    fd = create_unnamed(name, 4096) if unnamed else create_object(name, 4096)
    memory = mmap.mmap(fd, 4096)
    os.close(fd)
    if not unnamed:
        remove_object(name)
    yield
    memory.close()


@pytest.mark.parametrize(
    ("leak", "kind", "count"),
    [
        (a_segment, "segments", 1),
        (a_child, "processes", 1),
        (a_zombie, "processes", 1),
        (a_grandchild, "processes", 2),
        (an_orphan, "processes", 1),
        (a_descriptor, "descriptors", 1),
        (a_thread, "threads", 1),
        (lambda: a_mapping(unnamed=False), "mappings", 1),
        (lambda: a_mapping(unnamed=True), "mappings", 1),
    ],
)
def test_each_kind_of_leak_is_noticed_and_gone_when_it_is_undone(leak, kind, count):
    before = snapshot()
    with leak():
        left = snapshot() - before
        # A mapping of Python has a descriptor of its own, and a child has pipes; others' runs may
        # add segments.
        assert len(getattr(left, kind)) >= count
    left = snapshot() - before
    assert not getattr(left, kind) or kind == "segments"


def test_orphan_of_this_run_is_no_other_run_whose_segments_may_be(monkeypatch):
    monkeypatch.setattr(residue, "is_a_run", lambda command_line: b"sleep" in command_line)
    with an_orphan():
        (orphan,) = residue._marked() - residue._descendants()
        monkeypatch.setattr(residue, "_processes", lambda: [os.getpid(), orphan])
        assert not residue._is_another_run_active()
        # As a process of another run.
        monkeypatch.setattr(residue, "_mark", b"")
        assert residue._is_another_run_active()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python3 -m pytest tests", True),
        ("/venv/bin/python3.11 -X dev -m pytest", True),
        ("/venv/bin/python3 /venv/bin/pytest -q", True),
        ("pytest", True),
        ("python3 -m cobre_shm.spawn -n 2 -c pass", True),
        ("vim /home/me/cobre-shm/tests/conftest.py", False),
        ("/cobre-shm/.venv/bin/python3 -m pyright", False),
        ("grep -rn pytest .", False),
        ("", False),
    ],
)
def test_run_is_told_by_the_program_or_module(command, expected):
    assert is_a_run(b"\0".join(command.encode().split(b" ")) + b"\0") is expected


def test_file_of_a_checkout_named_after_the_project_is_no_leak(tmp_path):
    path = tmp_path / "cobre-shm" / "library.so"
    path.parent.mkdir()
    path.write_bytes(bytes(4096))
    before = snapshot()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert not (snapshot() - before).mappings


def test_nothing_is_no_leak():
    assert not Residue()
    assert {field.name for field in fields(Residue)} == {
        "segments",
        "processes",
        "descriptors",
        "threads",
        "mappings",
    }
