"""Collectives over files: every rank writes its part of a collective, and reads all the others.

    member.R     pid of rank R: it has joined
    N.R          rank R's part of collective number N: a line that describes the call, the bytes
    gone.R       rank R has closed
    aborted      the rank that took the group down

A part is renamed into place, so a file that exists is complete. A rank that has read all parts of
collective N removes its own part of N-1: whoever wrote a part of N has read all of N-1.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO, NoReturn

import numpy as np

from cobre_shm import (
    CollectiveFailed,
    CollectiveMismatch,
    CollectiveTimeout,
    Communicator,
    InitializationFailed,
    InvalidCommunicator,
    LocalCommunicator,
    RankFailed,
    ReduceOp,
)
from cobre_shm.errors import AllocationFailed
from cobre_shm.heap import HeapRegion
from cobre_shm.validate import (
    check_allgatherv,
    check_allreduce,
    check_broadcast,
    check_gather_buffers,
    check_gathered,
    check_region,
)
from spool_backend import SpoolConfig


def _multiply(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    if left.dtype.kind != "c":
        np.multiply(left, right, out=out)
        return
    # numpy's product of complex arrays may round differently from the plain formula.
    real = left.real * right.real - left.imag * right.imag
    out.imag = left.real * right.imag + left.imag * right.real
    out.real = real


_REDUCTIONS = {
    ReduceOp.SUM: np.add,
    ReduceOp.PROD: _multiply,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
}
_CHUNK = 4096
_YIELDS = 200
_NAP_SECS = 0.0002


class SpoolCommunicator(Communicator):
    """Ranks that exchange files in one directory."""

    backend = "spool"
    is_leader = True

    def __init__(self, config: SpoolConfig) -> None:
        self.rank = config.rank
        self.size = config.size
        self._dir = config.dir
        self._timeout = config.timeout_secs
        self._number = 0
        self._failed: CollectiveFailed | None = None
        self._closed = False
        self._dir.mkdir(parents=True, exist_ok=True)
        self._publish(f"member.{self.rank}", str(os.getpid()).encode())
        self._pids = [0] * self.size
        for rank in range(self.size):
            if not self._wait_for(lambda rank=rank: self._has(f"member.{rank}")):
                raise InitializationFailed("spool", f"Rank {rank} has not joined in time")
            self._pids[rank] = int((self._dir / f"member.{rank}").read_text())

    def __repr__(self) -> str:
        return f"<SpoolCommunicator rank {self.rank} of {self.size}>"

    def allgatherv(self, send, recv=None, counts=None, displs=None):
        self._check_usable()
        send, recv = check_gather_buffers(self.size, send, recv, displs)
        mistakes = []
        if counts is None:
            counts = self._gather_numbers(["counts of allgatherv", send.dtype], send.size)
            layout, mistakes = check_gathered(self.rank, self.size, send, recv, counts, displs)
        else:
            layout = check_allgatherv(self.rank, self.size, send, recv, counts, displs)
        call = ["allgatherv", send.dtype, layout.counts.tolist()]
        with self._exchange(call, _bytes_of(send)) as parts:
            flat = layout.recv.reshape(-1)
            for part, start, count in zip(parts, layout.displs, layout.counts, strict=True):
                part.readinto(_bytes_of(flat[start : start + count]))
        if mistakes:
            raise mistakes.pop()
        return layout.recv

    def allreduce(self, send, recv=None, op=ReduceOp.SUM):
        self._check_usable()
        send, recv, op = check_allreduce(send, recv, op)
        call = ["allreduce", send.dtype, send.size, op.name]
        with self._exchange(call, _bytes_of(send)) as parts, np.errstate(all="ignore"):
            scratch = np.empty(_CHUNK, send.dtype)
            result = recv.reshape(-1)
            for start in range(0, result.size, _CHUNK):
                piece = result[start : start + _CHUNK]
                parts[0].readinto(_bytes_of(piece))
                for part in parts[1:]:
                    other = scratch[: piece.size]
                    part.readinto(_bytes_of(other))
                    _REDUCTIONS[op](piece, other, out=piece)
        return recv

    def broadcast(self, buf, root=0):
        self._check_usable()
        buf = check_broadcast(self.size, self.rank, buf, root)
        mine = _bytes_of(buf) if self.rank == root else b""
        with self._exchange(["broadcast", buf.dtype, buf.size, int(root)], mine) as parts:
            if self.rank != root:
                parts[root].readinto(_bytes_of(buf))
        return buf

    def barrier(self) -> None:
        self._check_usable()
        with self._exchange(["barrier"]):
            pass

    def create_shared_region(self, shape, dtype=np.float64):
        self._check_usable()
        shape, dtype = check_region(shape, dtype)
        with self._exchange(["create_shared_region", list(shape), dtype]):
            region = refused = None
        try:
            region = HeapRegion(shape, dtype)
        except AllocationFailed as error:
            refused = error
        if 0 in self._gather_numbers(["allocated"], int(region is not None)):
            nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
            raise refused or AllocationFailed(nbytes, "another rank has no memory for it")
        return region

    def split_local(self) -> Communicator:
        self._check_usable()
        with self._exchange(["split_local"]):
            return LocalCommunicator()

    def abort(self, code: int = 1) -> NoReturn:
        self._publish("aborted", str(self.rank).encode())
        self._failed = self._rank_failed(self.rank, f"aborted with code {code}")
        raise SystemExit(code)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(FileNotFoundError):
            self._publish(f"gone.{self.rank}", b"")
            if all(self._has(f"gone.{rank}") for rank in range(self.size)):
                shutil.rmtree(self._dir)

    def _gather_numbers(self, call: list[Any], number: int) -> list[int]:
        with self._exchange(call, b"%d" % number) as parts:
            return [int(part.read()) for part in parts]

    @contextmanager
    def _exchange(self, call: list[Any], payload: Any = b"") -> Iterator[list[BinaryIO]]:
        """Publish this rank's part of the next collective; yield all parts by rank, opened."""
        self._number += 1
        line = json.dumps(call, default=lambda dtype: np.dtype(dtype).descr)
        self._publish(f"{self._number}.{self.rank}", line.encode() + b"\n", payload)
        with ExitStack() as opened:
            try:
                parts = [opened.enter_context(self._open(rank)) for rank in range(self.size)]
                calls = [part.readline().decode().strip() for part in parts]
                if any(other != line for other in calls):
                    raise CollectiveMismatch(calls)
            except CollectiveFailed as error:
                self._failed = error
                raise
            yield parts
        with suppress(FileNotFoundError):
            (self._dir / f"{self._number - 1}.{self.rank}").unlink()

    def _open(self, rank: int) -> BinaryIO:
        part = f"{self._number}.{rank}"
        if not self._wait_for(lambda: self._has(part) or self._lost(rank, part)):
            raise CollectiveTimeout(
                f"Rank {rank} did not come to collective {self._number}",
                missing_ranks=[rank],
                seconds=self._timeout,
            )
        return (self._dir / part).open("rb")

    def _lost(self, rank: int, part: str) -> bool:
        """Raise if ``rank`` will never write ``part``; False otherwise."""
        if self._has("aborted"):
            culprit = int((self._dir / "aborted").read_text())
            raise self._rank_failed(culprit, "aborted")
        gone = self._has(f"gone.{rank}") or not _is_running(self._pids[rank])
        # It may have written the part between the two looks.
        if gone and not self._has(part):
            raise self._rank_failed(rank, "is gone")
        return False

    def _rank_failed(self, rank: int, what: str) -> RankFailed:
        pid = self._pids[rank]
        return RankFailed(f"Rank {rank} (pid {pid}) {what}", rank=rank, pid=pid)

    def _wait_for(self, is_there: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + self._timeout
        turns = 0
        while not is_there():
            if time.monotonic() > deadline:
                return False
            turns += 1
            time.sleep(0 if turns < _YIELDS else _NAP_SECS)
        return True

    def _publish(self, name: str, *contents: Any) -> None:
        unfinished = self._dir / f"{name}.{self.rank}.unfinished"
        with unfinished.open("wb") as file:
            file.writelines(contents)
        unfinished.rename(self._dir / name)

    def _has(self, name: str) -> bool:
        return (self._dir / name).exists()

    def _check_usable(self) -> None:
        if self._closed:
            raise InvalidCommunicator("The communicator is closed")
        if self._failed is not None:
            raise self._failed


def _bytes_of(array: np.ndarray) -> memoryview:
    # As bytes: assigning records would leave out their padding.
    return memoryview(array.reshape(-1).view(np.uint8))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
