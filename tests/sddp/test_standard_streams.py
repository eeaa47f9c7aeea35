"""Output that is lost costs no result; letters that a terminal lacks cost nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "cobre_shm.sddp"]


def unread_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("make", "code", "words"),
    [(unread_pipe, 141, ""), (full_disk, 1, "standard output: No space left on device")],
)
def test_lost_output_costs_no_result(random_path, tmp_path, make, code, words, form):
    out, stdout = tmp_path / "out", make()
    arguments = [random_path, "--iterations", "3", "--output-dir", out, "--output-format", form]
    try:
        done = subprocess.run(
            [*PROGRAM, *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=180,
        )
    finally:
        os.close(stdout)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == bool(words)
    assert words in done.stderr
    assert json.loads((out / "training" / "metadata.json").read_text())
    assert (out / "policy" / "cuts.parquet").is_file()


def test_help_that_cannot_be_written_is_an_error():
    stdout = full_disk()
    try:
        done = subprocess.run(
            [*PROGRAM, "--help"], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=180
        )
    finally:
        os.close(stdout)
    assert done.returncode == 1
    assert "standard output: No space left on device" in done.stderr


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs a shell")
def test_process_without_standard_output_trains(random_path, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, random_path, "--output-dir", out],
        stderr=subprocess.PIPE,
        text=True,
        timeout=180,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / "policy" / "cuts.parquet").is_file()


@pytest.mark.parametrize("command", [["validate"], ["--iterations", "1"]])
def test_letters_that_the_terminal_lacks_are_shown_as_numbers(random_path, tmp_path, command):
    done = subprocess.run(
        [*PROGRAM, *command, random_path.rename(tmp_path / "電")],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u96fb" in done.stdout
