"""Signals that come while a run is ending already, or one after the other."""

import contextlib
import signal
import time
from pathlib import Path

import pytest

from cobre_shm import layout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_failing_run_that_is_told_to_end_is_not_started_again(spawn, number):
    code = """
import os, signal, time
def stay(*_):
    print("told", flush=True)
    time.sleep(5)
    os._exit(0)
signal.signal(signal.SIGTERM, stay)
if os.environ["COBRE_SHM_RANK"] == "0":
    while not os.path.exists("ready"):
        time.sleep(0.01)
    raise SystemExit(3)
open("ready", "w").close()
time.sleep(3600)
"""
    process = spawn.start("-n", 2, "--max-restarts", 2, "--grace", 20, "-c", code)
    line = b""
    while b"told" not in line:
        line = process.stdout.readline()
        assert line
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 3
    assert b"Starting again" not in errors


def test_second_signal_at_once_leaves_the_grace_time(spawn):
    """As of a terminal that is closed: the kernel's SIGHUP, and the shell's."""
    code = """
import os, signal, time
def save(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    os._exit(0)
signal.signal(signal.SIGHUP, save)
print("up", flush=True)
time.sleep(3600)
"""
    process = spawn.start("-n", 1, "--grace", 20, "-c", code)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert b"saved" in process.communicate()[0]
    assert process.returncode == 129


def test_signals_in_a_row_leave_no_segment(spawn):
    for turn in range(15):
        process = spawn.start("-n", 2, "-c", "import time; print('up'); time.sleep(3600)")
        assert process.stdout.readline() == b"up\n"
        with contextlib.suppress(ProcessLookupError):
            for _ in range(8):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.0005 + 0.0002 * turn)
        process.communicate()
        assert process.returncode in (143, -signal.SIGTERM)
        # Before the next launcher, which would remove it. A guard may be at it still.
        deadline = time.monotonic() + 2
        while segments_made_by(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert segments_made_by(process.pid) == []


def segments_made_by(pid):
    found = []
    for path in Path("/dev/shm").glob("cobre-*"):
        with contextlib.suppress(OSError):
            header = path.read_bytes()[: layout.HEADER_CREATOR_PID + 8]
            if int.from_bytes(header[layout.HEADER_CREATOR_PID :], "little") == pid:
                found.append(path.name)
    return found
