"""What ``bench/peers.py`` has measured: files, rounds, ratios to the best peer, physical limits.

A run is one file, ``peers-N.json``: its conditions, and rounds in which every library was launched
once with N ranks.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OURS = ("shm", "shm-plan", "shm-shared")
PEERS = ("openmpi", "openmpi-sm", "mpich", "impi", "gloo")
OPERATIONS = ("allreduce", "allgatherv", "broadcast", "broadcast_once")
# A call that took no longer than this was hidden by the noise of what is measured around it.
NOISE_US = 1e-3

Run = dict[str, Any]


def load(path: Path) -> Run:
    """Read a run."""
    run: Run = json.loads(path.read_text())
    return run


def save(path: Path, run: Run) -> None:
    """Write a run so that a reader, or the next run, always finds a whole one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run))
    partial.replace(path)


def runs_of(folder: Path) -> list[Run]:
    """Return the runs of a folder that have a round, by number of ranks."""
    runs = [load(path) for path in folder.glob("peers-*.json")]
    runs = [run for run in runs if any(r["libraries"] for r in run["rounds"])]
    return sorted(runs, key=lambda run: int(run["conditions"]["ranks"]))


def measured(found: Run, library: str) -> dict[str, Any]:
    """Return what one launch of a round has measured, by key."""
    result: dict[str, Any] = found["libraries"].get(library, {}).get("measured", {})
    return result


def ever_ran(run: Run, libraries: Iterable[str]) -> list[str]:
    """Return the libraries of which at least one launch has succeeded."""
    return [name for name in libraries if any(measured(found, name) for found in run["rounds"])]


def is_complete(found: Run, libraries: Iterable[str], keys: Iterable[str], run: Run) -> bool:
    """Whether a round has all keys of all libraries that can run."""
    known = [measured(found, library) for library in ever_ran(run, libraries)]
    return bool(known) and all(key in has for has in known for key in keys)


def compared(run: Run) -> list[Run]:
    """Return the rounds in which every library that can run has run."""
    known = ever_ran(run, (*OURS, *PEERS))
    return [found for found in run["rounds"] if all(measured(found, name) for name in known)]


def keys_of(run: Run) -> list[str]:
    """Return all that was measured, the barrier first, then by payload."""
    keys = {
        key
        for found in run["rounds"]
        for library in found["libraries"]
        for key in measured(found, library)
    }
    return sorted(keys, key=lambda key: (int(key.split()[1]), key))


def payloads_of(run: Run) -> list[int]:
    """Return the payloads that were measured."""
    return sorted({int(key.split()[1]) for key in keys_of(run)} - {0})


def versions(run: Run) -> dict[str, str]:
    """Return the versions of the peers."""
    return {
        name: next(r["libraries"][name]["version"] for r in run["rounds"] if measured(r, name))
        for name in ever_ran(run, PEERS)
    }


def call_us(launch: dict[str, list[float]], average: Callable[[list[float]], float]) -> float:
    """Return the time of a call, by the medians or the minima of a launch's batches."""
    return max(NOISE_US, average(launch["whole"]) - average(launch["work"]))


def medians(found: Run, key: str, libraries: Iterable[str]) -> dict[str, float]:
    """Return each library's time of a call in a round, where noise did not hide it."""
    times = {
        library: call_us(measured(found, library)[key], statistics.median)
        for library in libraries
        if key in measured(found, library)
    }
    return {library: us for library, us in times.items() if us > NOISE_US}


def ratio(run: Run, key: str, ours: str) -> dict[str, Any] | None:
    """Compare one operation and payload over all rounds in which every peer has it."""
    peers = [
        name
        for name in ever_ran(run, PEERS)
        if any(key in measured(r, name) for r in run["rounds"])
    ]
    ratios, mine, theirs, names = [], [], [], []
    for found in run["rounds"]:
        times = medians(found, key, [ours, *peers])
        if not peers or len(times) < len(peers) + 1:
            continue
        best = min(peers, key=lambda name: times[name])
        ratios.append(times[ours] / times[best])
        mine.append(times[ours])
        theirs.append(times[best])
        names.append(best)
    if not ratios:
        return None
    return {
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "ours": statistics.median(mine),
        "peer": statistics.median(theirs),
        "name": max(sorted(set(names)), key=names.count),
        "rounds": len(ratios),
    }


def ratios(run: Run, ours: str) -> dict[str, tuple[float, float, float, str]]:
    """Return (ratio, our time, the best peer's, its name) of all that was compared."""
    found = {key: ratio(run, key, ours) for key in keys_of(run)}
    return {
        key: (entry["ratio"], entry["ours"], entry["peer"], entry["name"])
        for key, entry in found.items()
        if entry is not None
    }


def has_own_cores(run: Run) -> bool:
    """Whether every rank has a core."""
    return bool(run["conditions"]["ranks"] <= run["conditions"]["cpus"])


def limit_of(run: Run, payload: int) -> float:
    """Return the least time of a collective that gives every rank the payload, in microseconds.

    Shared arrays may take less, for nobody gets a copy; so may a broadcast whose root waits for
    nobody.
    """
    has, found = run["conditions"], [r["limits"] for r in run["rounds"]]
    if has_own_cores(run):
        floor = statistics.median(f["ping_pong_us"] for f in found) / 2
    else:
        # Every rank must run once.
        turns = has["ranks"] / has["cpus"]
        floor = turns * statistics.median(f["switch_us"] for f in found)
    copies = [f["copy_us"][str(payload)] for f in found if str(payload) in f["copy_us"]]
    return max(floor, statistics.median(copies) if copies else 0.0)
