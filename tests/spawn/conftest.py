"""Drives the launcher as a person would: by its command line, from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.processes import processes_with

# Only ends tests that hang: no outcome depends on it.
WATCHDOG_SECS = 180.0
COMPILE_SECS = 600.0


class Spawn:
    """Starts launchers, and knows every process that came of them by a mark they inherit."""

    def __init__(self, folder: Path, method: str) -> None:
        self.folder = folder
        self.method = method
        self.mark = f"SPAWN_TEST={uuid.uuid4().hex}"
        self._started: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: object) -> list[str]:
        start = ["-m", "cobre_shm.spawn", f"--start-method={self.method}"]
        return [sys.executable, *start, *map(str, arguments)]

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        name, value = self.mark.split("=")
        root = str(Path(__file__).parents[2])
        paths = [root, os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [root]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), name: value, **(extra or {})}

    def start(
        self,
        *arguments: object,
        env: dict[str, str] | None = None,
        command: list[str] | None = None,
        **options: object,
    ) -> subprocess.Popen[bytes]:
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.folder,
            **options,
        }
        process = subprocess.Popen(
            command or self.command(*arguments), env=self.environment(env), **options
        )
        self._started.append(process)
        return process

    def run(
        self, *arguments: object, input: bytes | None = None, **options: object
    ) -> subprocess.CompletedProcess[bytes]:
        if input is not None:
            options["stdin"] = subprocess.PIPE
        process = self.start(*arguments, **options)
        out, err = process.communicate(input, timeout=WATCHDOG_SECS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def processes(self) -> list[int]:
        """Pids of living processes that carry the mark."""
        return processes_with(self.mark)

    @staticmethod
    def wait_for(condition: Callable[[], object], seconds: float = WATCHDOG_SECS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.01)

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name

    def end(self) -> list[int]:
        """End whatever is left and return it, with a little time to go by itself."""
        with suppress(TimeoutError):
            self.wait_for(lambda: not self.processes(), seconds=10)
        left = self.processes()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait(WATCHDOG_SECS)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        return left


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Have numba's cache filled: the line that says so is in the way of tests of output."""
    subprocess.run(
        [sys.executable, "-m", "cobre_shm.spawn", "-n", "1", "-c", "pass"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=COMPILE_SECS,
        check=False,
    )


@pytest.fixture
def spawn(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Spawn]:
    """A driver; the parameter is its start method.

    Where nothing else is said, ranks are fresh interpreters: those of programs that do without
    numba are up sooner.
    """
    driver = Spawn(tmp_path, getattr(request, "param", "spawn"))
    yield driver
    assert driver.end() == [], "processes were left behind"
