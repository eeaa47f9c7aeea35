"""Kill one rank of a working group at a random microsecond, again and again.

    python bench/chaos.py --kills 10000 [--sizes 2,3,4] [--seed S] [--output-format json]

Each group is fresh, forked from a process that has loaded the kernels. Its ranks start together,
join, and do mixed collectives of random lengths, whose results they compare with what arithmetic
says. One of them gets SIGKILL at a moment that is uniform over the first ``WINDOW_SECS`` after the
start, so it is inside joining now and then, and mostly anywhere in a collective. Several drivers
do this side by side, so two processors or more are loaded by the program itself.

How to read the numbers:

    detection      from the stamp taken just before ``os.kill`` to the moment when a survivor holds
                   its ``RankFailed``; one value per survivor. The clock, CLOCK_MONOTONIC, is common
                   to all processes. It includes the wait for a processor: with more ranks than
                   processors, most of what is above a millisecond is that.
    joining        kills before the group had come together: each survivor got
                   ``InitializationFailed``. "Timed out" of them are those where the victim died
                   before it had told anybody its pid; nobody can tell that from a late start.
    mixed          kills at the very end of joining: some survivors had joined and some had not.
    hangs          survivors still running ``WATCHDOG_SECS`` after the kill.
    leaks          names in /dev/shm, and processes, that a group left behind.
    wrong answers  collectives that returned something else than arithmetic says.
    wrong blame    errors that name another rank or pid than the victim's, another kind of
                   failure, or come before the kill.
    broken         survivors that ended in any other way; the traceback is shown.

The last five must be 0; if one is not, the exit code is 1. It is 3 where ``--minutes`` were over
before all kills were made. ``--seed`` repeats the groups, victims and moments, but not how the
scheduler interleaves them.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import platform
import random
import secrets
import select
import signal
import sys
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cobre_shm.errors import CollectiveFailed, InitializationFailed
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from cobre_shm.spawn.parent import die_with

WINDOW_SECS = 0.15
WATCHDOG_SECS = 20.0
# Of joining and of collectives. Short, for a kill before the first sign of life takes all of it.
TIMEOUT_SECS = 2.0
# One value, a part of a slot, several slots.
LENGTHS = (1, 600, 40_000)
COUNTS = ("kills", "joining", "timed out", "mixed")
MUST_BE_ZERO = ("hangs", "leaks", "wrong answers", "wrong blame", "broken")
_SHOWN = 20
_SHM = Path("/dev/shm")


class WrongAnswer(Exception):
    """A collective returned something else than arithmetic says."""


def run(
    kills: int,
    sizes: tuple[int, ...] = (2, 3, 4),
    seed: int = 0,
    drivers: int = 4,
    minutes: float = 60.0,
) -> dict[str, Any]:
    """Do the kills and return the report. Call it in a process that has one thread: it forks.

    Args:
        kills: How many groups lose a rank.
        sizes: Numbers of ranks to choose from.
        seed: Of the groups, victims and moments.
        drivers: How many groups run side by side.
        minutes: After which no new group is started.
    """
    _warm_up()
    begun, load = time.monotonic(), os.getloadavg()[0]
    readers = {}
    end_with_us = die_with(os.getpid())
    for driver in range(drivers):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            end_with_us()
            mine = range(driver, kills, drivers)
            _drive(mine, sizes, seed, begun + 60 * minutes, writer)
        os.close(writer)
        readers[pid] = reader
    total: dict[str, Any] = {"detection": [], "problems": [], "counts": Counter()}
    for pid, reader in readers.items():
        with os.fdopen(reader) as stream:
            # Of a driver that died, there is nothing, which is an error here.
            part = json.load(stream)
        os.waitpid(pid, 0)
        for name, values in part.items():
            total[name] += Counter(values) if name == "counts" else values
    conditions = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begun, 1),
        "seed": seed,
        "sizes": list(sizes),
        "drivers": drivers,
        "cpus": len(os.sched_getaffinity(0)),
        "load before, after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    return _report(total, conditions)


# A rank


def _work(comm: ShmCommunicator, dice: random.Random, victim: int) -> None:
    """Collectives without end; all ranks throw the same dice, so they make the same calls."""
    size, rank, turn = comm.size, comm.rank, 0
    while True:
        turn += 1
        what, length, root = dice.randrange(6), dice.choice(LENGTHS), dice.randrange(size)
        if dice.random() < 0.05 and rank == victim:
            # The kill shall also find the others asleep.
            time.sleep(0.005)
        # Small integers: every sum is exact.
        ramp = np.arange(length) % 1000 + turn % 1000
        if what == 0:
            comm.barrier()
            continue
        if what == 1:
            got = comm.allreduce(ramp * (rank + 1.0))
            expected = ramp * (size * (size + 1) / 2)
        elif what == 2:
            got, expected = comm.allreduce(ramp - rank, op="min"), ramp - (size - 1)
        elif what == 3:
            got = comm.broadcast(ramp * (2.0 if rank == root else 0.0), root)
            expected = ramp * 2.0
        elif what == 4:
            got = comm.allgatherv(np.full(length + rank, turn * 10 + rank))
            expected = np.repeat(turn * 10 + np.arange(size), length + np.arange(size))
        else:
            region = comm.create_shared_region(length)
            region.fence()
            if rank == 0:
                region.array[:] = ramp
            region.fence()
            got, expected = region.array.copy(), ramp
            region.close()
        if not np.array_equal(got, expected):
            raise WrongAnswer(f"turn {turn}, operation {what}, length {length}, root {root}")


def _be_rank(name: str, rank: int, size: int, victim: int, dice: str, report: int) -> None:
    """Join, work until the group fails, and report how that looked from here."""
    told: dict[str, Any] = {"rank": rank, "prefix": None}
    try:
        config = ShmConfig(name=name, rank=rank, size=size, timeout_secs=TIMEOUT_SECS)
        with ShmCommunicator(config) as comm:
            # Survivors know what regions were called, which the driver cannot.
            told["prefix"] = comm._segment.region_prefix
            try:
                _work(comm, random.Random(dice), victim)
            except CollectiveFailed as error:
                told |= {"at": time.monotonic_ns(), "how": "failed", "blame": _blame(error)}
                told["text"] = str(error)[:600]
            try:
                comm.barrier()
            except CollectiveFailed as error:
                told["later"] = _blame(error)
    except InitializationFailed as error:
        told |= {"at": time.monotonic_ns(), "how": "not joined", "context": error.context}
        told["text"] = str(error)[:600]
    except WrongAnswer as error:
        told |= {"how": "wrong answers", "text": str(error)}
    except BaseException:
        told |= {"how": "broken", "text": traceback.format_exc()[-2000:]}
    # One write of less than PIPE_BUF is never mixed with another rank's.
    os.write(report, json.dumps(told, default=str).encode() + b"\n")


def _blame(error: CollectiveFailed) -> list[Any]:
    return [type(error).__name__, getattr(error, "rank", None), getattr(error, "pid", None)]


# A driver


def _drive(indices: range, sizes: tuple[int, ...], seed: int, deadline: float, report: int) -> None:
    """Be a driver: run one group after the other, report, and never return."""
    # Whatever is in the session at the end of a group, except the driver, is left over.
    os.setsid()
    total: dict[str, Any] = {"detection": [], "problems": [], "counts": Counter()}
    try:
        for index in indices:
            if time.monotonic() < deadline:
                _run_group(index, sizes, seed, total)
        with os.fdopen(report, "w") as stream:
            json.dump(total, stream)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _run_group(index: int, sizes: tuple[int, ...], seed: int, total: dict[str, Any]) -> None:
    """Start a group, kill its victim, and judge what the survivors and the machine say."""
    dice = random.Random(f"{seed}/{index}")
    size = dice.choice(sizes)
    victim, moment = dice.randrange(size), dice.uniform(0, WINDOW_SECS)
    name = f"/cobre-chaos-{secrets.token_hex(8)}"
    gate, opener = os.pipe()
    reader, writer = os.pipe()
    end_with_us = die_with(os.getpid())
    pids: list[int] = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                end_with_us()
                os.close(opener)
                os.close(reader)
                faulthandler.register(signal.SIGUSR1, all_threads=True)
                os.write(writer, b"\n")
                # All start when the driver closes its end of the gate.
                os.read(gate, 1)
                _be_rank(name, rank, size, victim, f"{seed}/{index}/work", writer)
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(gate)
    os.close(writer)
    for _ in range(size):
        os.read(reader, 1)
    os.close(opener)
    time.sleep(moment)
    killed = time.monotonic_ns()
    os.kill(pids[victim], signal.SIGKILL)
    text, ended = _read_until_closed(reader, WATCHDOG_SECS)
    os.close(reader)
    told = [json.loads(line) for line in text.splitlines() if line]
    survivors = {one["rank"]: one for one in told if one["rank"] != victim}
    problems = []
    if not ended or len(survivors) < size - 1:
        kind = "broken" if ended else "hangs"
        problems.append((kind, f"survivors that reported: {sorted(survivors)}"))
    # First they print their stacks. None is reaped yet, so every pid is still the rank's.
    for number in () if ended else (signal.SIGUSR1, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(0.5)
    for pid in pids:
        os.waitpid(pid, 0)
    for one in survivors.values():
        problems += _judge(one, victim, pids[victim], killed)
        if one["how"] == "failed":
            total["detection"].append((one["at"] - killed) / 1e6)
    prefixes = {name[1:], *(one["prefix"][1:] for one in told if one["prefix"])}
    problems += [("leaks", left) for left in _left_over(prefixes)]
    counts = total["counts"]
    hows = {one["how"] for one in survivors.values()}
    counts["kills"] += 1
    counts["joining"] += hows == {"not joined"}
    counts["mixed"] += hows == {"not joined", "failed"}
    counts["timed out"] += hows == {"not joined"} and "JoinTimeout" in text
    for kind, what in problems:
        counts[kind] += 1
        where = f"kill {index} (rank {victim} of {size} after {moment * 1e3:.3f} ms)"
        total["problems"].append(f"{where}: {kind}: {what}")


def _judge(told: dict[str, Any], victim: int, pid: int, killed: int) -> list[tuple[str, str]]:
    """Return what is wrong with the end of one survivor."""
    if told["how"] in ("wrong answers", "broken"):
        return [(told["how"], f"rank {told['rank']}: {told['text']}")]
    if told["how"] == "failed":
        is_right = told["blame"] == told.get("later") == ["RankFailed", victim, pid]
    elif told["context"]["code"] == "JoinTimeout":
        missing = told["context"]["missing_ranks"]
        # Who comes when rank 0 has noticed the death and left never meets the victim.
        is_right = missing == [victim] or (missing == [0] and "found no segment" in told["text"])
    else:
        # Before it has claimed its place, the victim has no pid.
        named = [told["context"].get(key) for key in ("code", "rank", "pid")]
        is_right = named in (["RankFailed", victim, pid], ["RankFailed", victim, 0])
    if is_right and told["at"] > killed:
        return []
    return [("wrong blame", f"{(told['at'] - killed) / 1e6:.3f} ms after the kill: {told}")]


def _left_over(prefixes: set[str]) -> list[str]:
    left = [entry.name for entry in _SHM.iterdir() if entry.name.startswith(tuple(prefixes))]
    for name in left:
        # Reported once; they are of this very group, so nobody else misses them.
        (_SHM / name).unlink(missing_ok=True)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            if pid != os.getpid() and os.getsid(pid) == os.getpid():
                left.append(f"process {pid}")
    return left


def _read_until_closed(reader: int, seconds: float) -> tuple[str, bool]:
    """Read until every process has closed its end; False if that took too long."""
    deadline, data = time.monotonic() + seconds, b""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, 65536)
        if not chunk:
            return data.decode(), True
        data += chunk
    return data.decode(), False


def _warm_up() -> None:
    """Load or compile what ranks use, so that forked ones need not."""
    config = ShmConfig(name=f"/cobre-chaos-{secrets.token_hex(8)}", rank=0, size=1)
    with ShmCommunicator(config) as comm:
        comm.barrier()
        comm.broadcast(np.zeros(2))
        comm.allgatherv(np.zeros(2, dtype=np.int64))
        comm.allreduce(np.zeros(2))
        comm.allreduce(np.zeros(2, dtype=np.int64), op="min")
        comm.create_shared_region(2).close()
    gc.collect()
    # A collection in a child would copy every page that it counts on.
    gc.freeze()


def _report(total: dict[str, Any], conditions: dict[str, Any]) -> dict[str, Any]:
    quantiles = dict.fromkeys(("median", "p99", "max"))
    if total["detection"]:
        at = np.percentile(total["detection"], [50, 99, 100], method="higher")
        quantiles = dict(zip(quantiles, np.round(at, 3).tolist(), strict=True))
    return {
        "detection ms": quantiles,
        "survivors": len(total["detection"]),
        **{name: total["counts"][name] for name in (*COUNTS, *MUST_BE_ZERO)},
        "problems": total["problems"][:_SHOWN],
        "conditions": conditions,
    }


def _text(report: dict[str, Any]) -> str:
    conditions, detection = report["conditions"], report["detection ms"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in conditions.items()),
        f"{report['kills']} kills, {report['kills'] / conditions['seconds']:.1f} a second",
        "detection ms: "
        + ", ".join(f"{key} {value}" for key, value in detection.items())
        + f" over {report['survivors']} survivors",
        *(f"{name}: {report[name]}" for name in (*COUNTS[1:], *MUST_BE_ZERO)),
    ]
    return "\n".join(lines + report["problems"])


def main() -> int:
    """Run as a program; the exit code is 1 if any count that must be 0 is not, 3 if time was up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--sizes", default="2,3,4", help="numbers of ranks (default: 2,3,4)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--drivers", type=int, default=4, help="groups at a time (default: 4)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="start no group after this; code 3 if any is then missing (default: 60)",
    )
    parser.add_argument("--output-format", choices=["text", "json"], default="text")
    options = parser.parse_args()
    sizes = tuple(int(size) for size in options.sizes.split(","))
    if min(sizes) < 2:
        parser.error("a group that shall notice a death has 2 ranks or more")
    report = run(options.kills, sizes, options.seed, options.drivers, options.minutes)
    print(json.dumps(report, indent=2) if options.output_format == "json" else _text(report))
    if any(report[name] for name in MUST_BE_ZERO):
        return 1
    if report["kills"] < options.kills:
        text = f"chaos: {report['kills']} of {options.kills} kills in {options.minutes:g} minutes"
        print(text, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
