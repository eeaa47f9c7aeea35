"""Drives the monitor from outside, as a person would."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Only ends tests that hang: no outcome depends on it.
WATCHDOG_SECS = 180.0
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


class Top:
    """Starts monitors and launchers, and ends what is left of them."""

    def __init__(self):
        self._started = []

    def start(self, *arguments, module="top", **options):
        command = [sys.executable, "-m", f"cobre_shm.{module}", *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, **options}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=ENVIRONMENT, text=True, **options
        )
        self._started.append(process)
        return process

    def run(self, *arguments, **options):
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=WATCHDOG_SECS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def facts(self, group):
        """What ``--once`` says of a group, as data."""
        done = self.run(group, "--once", "--output-format", "json")
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    def facts_when(self, group, condition):
        """The first facts that fulfil a condition, which must come true some time."""
        deadline = time.monotonic() + WATCHDOG_SECS
        while True:
            process = self.run(group, "--once", "--output-format", "json")
            # A rank that has not begun to join belongs to no group yet.
            if process.returncode == 0:
                facts = json.loads(process.stdout)
                if condition(facts):
                    return facts
            assert time.monotonic() < deadline, process

    def end(self):
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait(WATCHDOG_SECS)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture
def top():
    driver = Top()
    yield driver
    driver.end()
