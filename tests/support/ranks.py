"""Groups of real processes that run one function, and never outlive their test.

    outcomes = run_ranks(function, 4)          # function(comm) on four ranks over shm
    results = results_of(outcomes)             # or AssertionError with every rank's traceback

A rank's process is forked from a server that has imported the heavy modules once; the server is
started by the first group and lives as long as the test run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cobre_shm.errors import CollectiveFailed
from cobre_shm.segment.process import state_of
from tests.support.backends import BACKENDS, COLLECTIVE_TIMEOUT_SECS, Connect
from tests.support.residue import Residue, snapshot

_ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
# pytest, because the modules of tests import it.
_PRELOAD = ["__main__", "pytest", "tests.support.conformance", "tests.support.warm"]
# More tracebacks of one group say little that is new.
_FULL_REPORTS = 2
# Between the request for stack dumps and the kill.
_DUMP_SECS = 2.0
# Only ends tests that hang.
_CONDITION_SECS = 60.0


class RanksTimedOut(Exception):
    """A rank was still running at the deadline, and was killed; its stacks are in ``output``."""


class RankDied(Exception):
    """A rank's process ended without returning or raising."""


@dataclass(frozen=True)
class RankOutcome:
    """What became of one rank.

    Attributes:
        result: What the function returned, or None.
        error: What it raised, or RankDied, RanksTimedOut, or None.
        traceback: The traceback in the rank's process, or what is known instead of it.
        exit_code: Of the process, or None when a signal ended it.
        signal: That ended the process, or None.
        output: What the process wrote to stdout and stderr.
    """

    rank: int
    pid: int
    result: Any = None
    error: BaseException | None = None
    traceback: str = ""
    exit_code: int | None = None
    signal: int | None = None
    output: str = ""


def run_ranks(
    function: Callable[..., Any],
    size: int,
    backend: str = "shm",
    *args: Any,
    timeout: float = 240.0,
    collective_timeout: float = COLLECTIVE_TIMEOUT_SECS,
) -> list[RankOutcome]:
    """Run the module-level ``function(comm, *args)`` on every rank of a new group.

    Args:
        function: Found by its module and name in the processes of the ranks.
        size: Number of ranks.
        backend: A name in ``BACKENDS``.
        *args: Picklable, the same for all ranks.
        timeout: Seconds after which ranks that still run are killed.
        collective_timeout: Seconds for which a collective may stand still.

    Returns:
        One outcome per rank. All processes are gone.
    """
    connects = BACKENDS[backend].make_group(size, collective_timeout)
    if BACKENDS[backend].in_process:
        return [_run_here(connects[0], function, args)]
    with RankGroup(connects, function, args) as group:
        return group.outcomes(timeout)


def results_of(outcomes: Sequence[RankOutcome]) -> list[Any]:
    """Return every rank's result.

    Raises:
        AssertionError: A rank failed; it shows what is likely to be the cause in full.
    """
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    # A rank that lost its group suffers from what another did.
    failed.sort(key=lambda outcome: isinstance(outcome.error, CollectiveFailed))
    if failed:
        texts = [_report(outcome) for outcome in failed[:_FULL_REPORTS]]
        texts += [
            f"--- rank {outcome.rank}: {type(outcome.error).__name__}: {outcome.error}"
            for outcome in failed[_FULL_REPORTS:]
        ]
        raise AssertionError("\n".join([f"{len(failed)} of {len(outcomes)} ranks failed", *texts]))
    return [outcome.result for outcome in outcomes]


class RankGroup:
    """Running ranks. Leaving the ``with`` block kills those that are left.

    Attributes:
        pids: Process id of each rank.
    """

    def __init__(
        self,
        connects: Sequence[Connect],
        function: Callable[..., Any],
        args: tuple[Any, ...] = (),
    ) -> None:
        start_server()
        self._folder = tempfile.TemporaryDirectory(prefix="cobre-ranks-")
        self._reports: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for rank, connect in enumerate(connects):
                reader, writer = _CONTEXT.Pipe(duplex=False)
                self._reports.append(reader)
                with writer:
                    process = _CONTEXT.Process(
                        target=_run_rank,
                        args=(connect, function, args, writer, str(self._path_of_output(rank))),
                        name=f"rank {rank}",
                    )
                    process.start()
                self._processes.append(process)
        except BaseException:
            self.close()
            raise
        self.pids = [process.pid for process in self._processes]

    def send_signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids[rank], number)

    def output(self, rank: int) -> str:
        """What a rank has written until now."""
        path = self._path_of_output(rank)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for what these ranks do to come true."""
        deadline = time.monotonic() + _CONDITION_SECS
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError("\n".join(map(self.output, range(len(self.pids)))))
            time.sleep(0.005)

    def wait_until_stopped(self, rank: int) -> None:
        """Wait for a rank that stops itself."""
        self.wait_until(lambda: state_of(self.pids[rank]) == "stopped")

    def outcomes(self, timeout: float) -> list[RankOutcome]:
        """Wait until all processes have ended, kill those that have not in time, and report."""
        deadline = time.monotonic() + timeout
        reports: dict[int, dict[str, Any]] = {}
        self._wait(reports, deadline)
        late = [rank for rank, process in enumerate(self._processes) if process.is_alive()]
        # What those that ended at the last moment have left.
        self._wait(reports, deadline)
        if late:
            for rank in late:
                self.send_signal(rank, signal.SIGUSR1)
            self._wait(reports, time.monotonic() + _DUMP_SECS)
            self._kill()
            self._wait(reports, time.monotonic() + 10)
        return [
            self._outcome(rank, reports.get(rank), timeout if rank in late else None)
            for rank in range(len(self._processes))
        ]

    def close(self) -> None:
        """Kill and reap every process and give everything back."""
        self._kill()
        for process in self._processes:
            process.join()
            process.close()
        for report in self._reports:
            report.close()
        self._folder.cleanup()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wait(self, reports: dict[int, dict[str, Any]], deadline: float) -> None:
        """Read reports until every process has ended or the deadline has passed."""
        while True:
            waiting: dict[Any, int] = {}
            for rank, process in enumerate(self._processes):
                if process.exitcode is None:
                    waiting[process.sentinel] = rank
                if not self._reports[rank].closed and rank not in reports:
                    waiting[self._reports[rank]] = rank
            if not waiting:
                return
            left = deadline - time.monotonic()
            for ready in wait(list(waiting), timeout=max(0.0, left)):
                if isinstance(ready, Connection):
                    with contextlib.suppress(EOFError, ConnectionError):
                        reports[waiting[ready]] = pickle.loads(ready.recv_bytes())
                    ready.close()
            if left <= 0:
                return

    def _outcome(
        self, rank: int, report: dict[str, Any] | None, timeout: float | None
    ) -> RankOutcome:
        process = self._processes[rank]
        code = process.exitcode
        number = -code if code is not None and code < 0 else None
        how = f"was ended by signal {number}" if number else f"ended with code {code}"
        if timeout is not None:
            error: BaseException = RanksTimedOut(f"rank {rank} was running after {timeout} s")
            report = {"error": error, "traceback": str(error)}
        elif report is None:
            error = RankDied(f"rank {rank} {how}")
            report = {"error": error, "traceback": str(error)}
        return RankOutcome(
            rank=rank,
            pid=self.pids[rank],
            exit_code=None if number else code,
            signal=number,
            output=self.output(rank),
            **report,
        )

    def _path_of_output(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.txt"

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()


_server_residue: Residue | None = None


def start_server() -> None:
    """Start the server that ranks are forked from, once."""
    global _server_residue
    if _server_residue is not None:
        return
    before = snapshot()
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    # The server finds the modules to preload by PYTHONPATH alone.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), path]))
    try:
        forkserver.ensure_running()
        resource_tracker.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    _server_residue = snapshot() - before


def server_residue() -> Residue:
    """Return the processes and descriptors that belong to the server."""
    return _server_residue or Residue()


def _run_here(connect: Connect, function: Callable[..., Any], args: tuple[Any, ...]) -> RankOutcome:
    try:
        with connect() as comm:
            result = function(comm, *args)
    except (Exception, SystemExit) as error:
        return RankOutcome(0, os.getpid(), error=error, traceback=traceback.format_exc())
    return RankOutcome(0, os.getpid(), result=result)


def _run_rank(
    connect: Connect,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    report: Connection,
    output: str,
) -> None:
    """Be one rank: the main function of its process."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    code = 0
    try:
        with connect() as comm:
            message = {"result": function(comm, *args)}
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        message = {"error": error, "traceback": traceback.format_exc()}
    report.send_bytes(_pickled(message))
    sys.exit(code)


def _pickled(message: dict[str, Any]) -> bytes:
    try:
        data = pickle.dumps(message)
        pickle.loads(data)
    except Exception:
        what = message.get("traceback") or repr(message["result"])
        return pickle.dumps({"error": TypeError(f"not picklable: {what}"), "traceback": what})
    return data


def _report(outcome: RankOutcome) -> str:
    text = f"--- rank {outcome.rank} (pid {outcome.pid}):\n{outcome.traceback}"
    return f"{text}\n--- its output:\n{outcome.output}" if outcome.output else text
