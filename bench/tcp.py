"""Allreduce over tcp beside bare sockets and, where torch is installed, beside Gloo.

    python bench/tcp.py [--ranks 2,4,8] [--max-bytes 67108864] [--output-format json]

Ranks are forked on this machine and meet over loopback. For each size, rounds of the three take
turns within one run, so that their ratios hold on a busy machine, and a ratio that is beyond its
limit is measured again before it counts; the exit code is then 1.

    ours        comm.allreduce of float64, sum, full form
    raw         the same bytes through the same sockets of the same star, and no more. Up to
                32 KiB: every worker sends, rank 0 receives from one after the other, and sends to
                all. Above: every worker sends and receives at once, rank 0 serves all of them
                at once, and nothing depends on anything.
    gloo        torch.distributed.all_reduce, backend gloo, one thread, a group of its own over
                loopback

Times are those of rank 0 from a barrier to the end of a batch, the median over rounds. Limits:
ours / raw 1.5 at 8 bytes and 1.3 from 1 MB on; ours / gloo 1 everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from remeasure import first_within

from cobre_net.tcp import TcpCommunicator
from cobre_shm.selection.kinds import TcpConfig

SIZES = (8, 64, 512, 4096, 32768, 262144, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
SMALL_LIMIT, LARGE_LIMIT, GLOO_LIMIT = 1.5, 1.3, 1.0
LARGE = 1 << 20
SMALL_ROAD = 1 << 15
ROUNDS = 9
BATCH_SECS = 0.02
HEAD_BYTES = 41

Step = Callable[[], object]


class Raw:
    """The bytes of an allreduce through a communicator's own sockets, without the allreduce."""

    def __init__(self, comm: TcpCommunicator, nbytes: int) -> None:
        self._socks = [link.sock for link in comm._star.links]  # type: ignore[union-attr]
        self._is_centre = comm.rank == 0
        self._nbytes = nbytes
        # Written, as all pages that never were are one, which is always in the cache.
        self._source = memoryview(bytearray(b"\1") * (nbytes + HEAD_BYTES))
        # One for each peer: the parts have to be somewhere.
        self._targets = [memoryview(bytearray(b"\0") * (nbytes + HEAD_BYTES)) for _ in self._socks]

    def __call__(self) -> None:
        if self._nbytes > SMALL_ROAD:
            self._both_ways()
        elif self._is_centre:
            for sock, target in zip(self._socks, self._targets, strict=True):
                self._receive(sock, target)
            for sock in self._socks:
                sock.sendall(self._source)
        else:
            self._socks[0].sendall(self._source)
            self._receive(self._socks[0], self._targets[0])

    def _receive(self, sock: socket.socket, target: memoryview) -> None:
        place = 0
        while place < len(target):
            try:
                place += sock.recv_into(target[place:])
            except BlockingIOError:
                # The sockets of a communicator give up after a while, to look around.
                continue

    def _both_ways(self) -> None:
        total = len(self._source)
        poller = select.poll()
        state = {}
        for sock, target in zip(self._socks, self._targets, strict=True):
            state[sock.fileno()] = [sock, target, 0, 0]
            poller.register(sock, select.POLLIN | select.POLLOUT)
        while state:
            for descriptor, events in poller.poll(1000):
                each = state[descriptor]
                sock, target, received, sent = each
                if events & select.POLLIN and received < total:
                    each[2] += sock.recv_into(target[received:], 0, socket.MSG_DONTWAIT)
                if events & select.POLLOUT and sent < total:
                    each[3] += sock.send(self._source[sent:], socket.MSG_DONTWAIT)
                wanted = (select.POLLIN if each[2] < total else 0) | (
                    select.POLLOUT if each[3] < total else 0
                )
                if wanted:
                    poller.modify(descriptor, wanted)
                else:
                    poller.unregister(descriptor)
                    del state[descriptor]


def gloo_step(nbytes: int) -> Step:
    import torch
    import torch.distributed as dist

    tensor = torch.ones(nbytes // 8, dtype=torch.float64)
    return lambda: dist.all_reduce(tensor)


def start_gloo(rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def measure(comm: TcpCommunicator, steps: dict[str, Step]) -> dict[str, float]:
    """Median seconds of each step, measured in turns; the same on all ranks."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    count = np.ones(1)
    for name, step in steps.items():
        step()
        comm.barrier()
        begin = time.perf_counter()
        step()
        once = time.perf_counter() - begin
        count[0] = max(count[0], BATCH_SECS / max(once, 1e-6))
        times[name].clear()
    # Rank 0's clock decides how many are a batch.
    comm.broadcast(count)
    repeats = int(min(count[0], 500))
    for turn in range(ROUNDS):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            step = steps[name]
            comm.barrier()
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name].append((time.perf_counter() - begin) / repeats)
    medians = np.array([statistics.median(each) for each in times.values()])
    comm.broadcast(medians)
    return dict(zip(steps, medians.tolist(), strict=True))


def too_slow(nbytes: int, seconds: dict[str, float]) -> list[str]:
    """What is beyond its limit."""
    found = []
    ratio = seconds["ours"] / seconds["raw"]
    if (nbytes == 8 and ratio > SMALL_LIMIT) or (nbytes >= LARGE and ratio > LARGE_LIMIT):
        found.append(f"{ratio:.2f} x raw")
    if "gloo" in seconds and seconds["ours"] > GLOO_LIMIT * seconds["gloo"]:
        found.append(f"{seconds['ours'] / seconds['gloo']:.2f} x gloo")
    return found


def be_rank(
    rank: int, size: int, port: int, store: str, max_bytes: int, with_gloo: bool, report: int
) -> None:
    rows = []
    config = TcpConfig("127.0.0.1", rank, size, port=port, secret="bench")
    with TcpCommunicator(config) as comm:
        if with_gloo:
            start_gloo(rank, size, store)
        for nbytes in SIZES:
            if nbytes > max_bytes:
                break
            send, recv = np.ones(nbytes // 8), np.empty(nbytes // 8)
            steps: dict[str, Step] = {
                "ours": lambda send=send, recv=recv: comm.allreduce(send, recv),
                "raw": Raw(comm, nbytes),
            }
            if with_gloo:
                steps["gloo"] = gloo_step(nbytes)
            # All ranks know the same seconds, so they agree on whether to go on.
            seconds = first_within(
                partial(measure, comm, steps),
                lambda found, nbytes=nbytes: not too_slow(nbytes, found),
            )[-1]
            slow = too_slow(nbytes, seconds)
            rows.append({"ranks": size, "bytes": nbytes, "seconds": seconds, "beyond": slow})
        if with_gloo:
            import torch.distributed as dist

            dist.destroy_process_group()
    if rank == 0:
        with os.fdopen(report, "w") as stream:
            json.dump(rows, stream)


def run(size: int, max_bytes: int, with_gloo: bool) -> list[dict[str, Any]]:
    """Fork the ranks; return one row per size in bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    be_rank(rank, size, port, f"{folder}/store", max_bytes, with_gloo, writer)
                    status = 0
                except BaseException:
                    # Nobody else says it.
                    traceback.print_exc()
                finally:
                    os._exit(status)
            pids.append(pid)
        os.close(writer)
        with os.fdopen(reader) as stream:
            text = stream.read()
        failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    if failed:
        raise SystemExit(f"{len(failed)} of {size} ranks failed")
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | bytes | ours, us | raw, us | ours / raw | gloo, us | ours / gloo |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = row["seconds"]
        gloo = seconds.get("gloo")
        cells = [
            str(row["ranks"]),
            str(row["bytes"]),
            f"{seconds['ours'] * 1e6:.0f}",
            f"{seconds['raw'] * 1e6:.0f}",
            f"{seconds['ours'] / seconds['raw']:.2f}",
            f"{gloo * 1e6:.0f}" if gloo else "-",
            f"{seconds['ours'] / gloo:.2f}" if gloo else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--max-bytes", type=int, default=SIZES[-1])
    parser.add_argument("--output-format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    with_gloo = find_spec("torch") is not None
    conditions = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "gloo": with_gloo,
    }
    rows = []
    for size in map(int, options.ranks.split(",")):
        rows += run(size, options.max_bytes, with_gloo)
    conditions["load after"] = round(os.getloadavg()[0], 1)
    if options.output_format == "json":
        print(json.dumps({"conditions": conditions, "rows": rows}, indent=2))
    else:
        print(conditions, table(rows), sep="\n")
    beyond = [row for row in rows if row["beyond"]]
    for row in beyond:
        text = f"{row['ranks']} ranks, {row['bytes']} bytes: {', '.join(row['beyond'])}"
        print(text, file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
