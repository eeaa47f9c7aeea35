"""Tables and plots of what ``bench/peers.py`` has measured: ``python bench/report.py [FOLDER]``.

Reads ``peers-N.json`` of FOLDER, all rounds with N ranks, and writes

    peers.md        the tables of ratios, with the goals beside them, and of times
    peers-N.png     time and bandwidth over payload (with ``pip install "cobre-shm[report]"``)
    peers.json      the ratios alone, for ``bench/readme.py``

Whatever is there makes a table, so a run may be looked at while it goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OURS = ("shm", "shm-plan", "shm-shared")
PEERS = ("openmpi", "openmpi-sm", "mpich", "impi", "gloo")
OPERATIONS = ("allreduce", "allgatherv", "broadcast", "broadcast_once")
TITLES = {
    "shm": "Private buffers",
    "shm-plan": "Plans",
    "shm-shared": "Shared arrays, `allreduce_shared`",
    "openmpi": "Open MPI",
    "openmpi-sm": "Open MPI, coll_sm",
    "mpich": "MPICH",
    "impi": "Intel MPI",
    "gloo": "Gloo",
}
SHOWN = {"broadcast_once": "broadcast, then barrier"}
# Ratios to the best peer that are to be reached: payload: (allreduce, allgatherv, broadcast).
# Payload 0 is the barrier.
_TRIALS = (0.55, 0.80, 0.80)
GOALS: dict[int, dict[int, tuple[float, ...]]] = {
    2: {
        0: (0.40,),
        8: (0.13, 0.10, 0.16),
        48: (0.13, 0.10, 0.16),
        1 << 10: (0.16, 0.10, 0.17),
        8 << 10: (0.20, 0.16, 0.27),
        64 << 10: (0.55, 0.35, 0.45),
        256 << 10: (0.70, 0.47, 0.80),
        1 << 20: (0.75, 0.50, 0.90),
        3_200_000: (0.65, 0.52, 0.85),
        16 << 20: (0.62, 0.78, 0.68),
        64 << 20: _TRIALS,
        206_000_000: _TRIALS,
    },
    8: {
        0: (0.38,),
        8: (0.33, 0.25, 0.70),
        48: (0.33, 0.25, 0.70),
        1 << 10: (0.28, 0.23, 0.12),
        8 << 10: (0.28, 0.23, 0.10),
        64 << 10: (0.32, 0.25, 0.28),
        256 << 10: (0.45, 0.37, 0.20),
        1 << 20: (0.45, 0.55, 0.33),
        3_200_000: (0.42, 0.75, 0.45),
        16 << 20: (0.40, 0.52, 0.85),
    },
}
# Of allreduce_shared, for 1 MiB.
SHARED_GOALS = {2: 0.30, 8: 0.14}
# Up to here so much may be added, for what the prototype behind the goals did not do.
ALLOWED, ALLOWED_BYTES = 0.03, 1 << 10
FULL_ROUNDS = 7
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


def goal_of(ranks: int, key: str, ours: str) -> float | None:
    """Return the ratio that is to be reached."""
    operation, payload = key.split()[0], int(key.split()[1])
    if ours == "shm-shared":
        is_stated = operation == "allreduce" and payload == 1 << 20
        return SHARED_GOALS.get(ranks) if is_stated else None
    row = GOALS.get(ranks, {}).get(payload)
    if row is None or operation == "broadcast_once":
        return None
    return row[0 if operation == "barrier" else OPERATIONS.index(operation)]


def cell_of(ranks: int, key: str, ours: str, found: dict[str, Any] | None) -> str:
    """Return a cell: ratio, goal beside it, in bold where it is reached."""
    if found is None:
        return ""
    goal, payload = goal_of(ranks, key, ours), int(key.split()[1])
    number = f"{found['ratio']:.2f}"
    if goal is not None:
        margin = ALLOWED if payload <= ALLOWED_BYTES else 0.0
        is_reached = round(found["ratio"], 2) <= goal + margin + 1e-9
        number = f"{f'**{number}**' if is_reached else number} ({goal:.2f})"
    return f"{number} · {in_us(found['ours'])} / {in_us(found['peer'])} {found['name']}"


def in_us(value: float) -> str:
    """Return microseconds in three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def size_of(payload: int) -> str:
    """Return a payload in the unit in which it is a small number."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if payload >= unit and payload % unit == 0:
            return f"{payload // unit} {name}"
    return f"{payload / 1e6:g} MB" if payload >= 100_000 else f"{payload} B"


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


def ratios_table(run: Run, ours: str) -> str:
    """Return the table of ratios of one of our ways."""
    ranks, keys = run["conditions"]["ranks"], set(keys_of(run))
    shown = [name for name in OPERATIONS if any(key.split()[0] == name for key in keys)]
    titles = [SHOWN.get(name, name) for name in shown]
    lines = [f"| payload | {' | '.join(titles)} |", "| --- " * (len(shown) + 1) + "|"]
    if "barrier 0" in keys:
        cell = cell_of(ranks, "barrier 0", ours, ratio(run, "barrier 0", ours))
        lines.append(f"| barrier | {cell} |" + " |" * (len(shown) - 1))
    for payload in payloads_of(run):
        cells = [
            cell_of(ranks, key, ours, ratio(run, key, ours))
            for key in (f"{name} {payload}" for name in shown)
        ]
        lines.append(f"| {size_of(payload)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times_table(run: Run) -> str:
    """Return the fastest, median and 99th percentile of all libraries."""
    libraries = ever_ran(run, (*OURS, *PEERS))
    lines = [
        "| | " + " | ".join(TITLES[name] for name in libraries) + " |",
        "| --- " * (len(libraries) + 1) + "|",
    ]
    for key in keys_of(run):
        cells = []
        for library in libraries:
            launches = [
                measured(r, library)[key] for r in run["rounds"] if key in measured(r, library)
            ]
            if not launches:
                cells.append("")
                continue
            least = min(call_us(launch, min) for launch in launches)
            middle = statistics.median(call_us(launch, statistics.median) for launch in launches)
            p99 = statistics.median(launch["p99"] for launch in launches)
            cells.append(f"{in_us(least)} / {in_us(middle)} / {in_us(p99)}")
        operation, payload = key.split()
        name = operation if operation == "barrier" else f"{operation} {size_of(int(payload))}"
        lines.append(f"| {SHOWN.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def versions(run: Run) -> dict[str, str]:
    """Return the versions of the peers."""
    return {
        name: next(r["libraries"][name]["version"] for r in run["rounds"] if measured(r, name))
        for name in ever_ran(run, PEERS)
    }


def conditions_text(run: Run) -> str:
    """Return under which conditions a run was measured, and who is missing from it."""
    has, rounds = run["conditions"], compared(run)
    found = [r["limits"] for r in rounds]
    trips, switches = [f["ping_pong_us"] for f in found], [f["switch_us"] for f in found]
    loads = [f["load"] for f in found]
    missing = {
        name: r["libraries"][name]["error"]
        for r in run["rounds"]
        for name in r["libraries"]
        if "error" in r["libraries"][name]
    }
    lines = [
        f"{has['ranks']} ranks on {has['cpus']} cores ({has['processor']}), Linux {has['kernel']},"
        f" Python {has['python']}, commit {has['commit']}; "
        + (
            f"{len(rounds)} rounds from {rounds[0]['time']} to {rounds[-1]['time']};"
            f" load {min(loads):.1f} to {max(loads):.1f};"
            f" cache line round trip {min(trips):.2f} to {max(trips):.2f} us, process switch"
            f" {min(switches):.2f} to {max(switches):.2f} us."
            if rounds
            else "no round in which every library that has run took part."
        ),
        "Versions: " + "; ".join(f"{TITLES[n]}: {v}" for n, v in versions(run).items()) + ".",
    ]
    if len(rounds) < FULL_ROUNDS:
        lines.append(f"Fewer than {FULL_ROUNDS} rounds: a look, not a result.")
    lines += [f"{TITLES[name]} failed in a launch: {error}." for name, error in missing.items()]
    return "\n".join(lines)


LEGEND = (
    "A cell: our time / the best peer's of the round, median over the rounds; in brackets the ratio"
    " that is to be reached, the cell in bold where it is (up to 1 KiB 0.03 more is allowed); then"
    " our median and the best peer's in microseconds, and the peer that was best most often. The"
    " payload of an allgatherv is what arrives in all."
)
TIMES_LEGEND = (
    "Microseconds per call: the fastest batch / the median / the 99th percentile of single calls"
    " (median over the launches)."
)


def column_text(run: Run) -> str:
    """Return everything about one number of ranks."""
    ranks = run["conditions"]["ranks"]
    parts = [f"## {ranks} ranks", conditions_text(run), LEGEND]
    for ours in ever_ran(run, OURS):
        parts += [f"### {TITLES[ours]}, {ranks} ranks", ratios_table(run, ours)]
    parts += [f"### Times, {ranks} ranks", TIMES_LEGEND, times_table(run)]
    return "\n\n".join(parts)


def has_own_cores(run: Run) -> bool:
    """Whether every rank has a core."""
    return bool(run["conditions"]["ranks"] <= run["conditions"]["cpus"])


def limit_text(run: Run) -> str:
    """Return what ``limit_of`` is, in words."""
    if has_own_cores(run):
        return "half a cache line's round trip, or a copy by all ranks"
    return "each rank runs once, or a copy by all ranks"


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


def plot(run: Run, path: Path) -> bool:
    """Draw latency and bandwidth over payload, one line per library; whether it could."""
    try:
        import matplotlib
    except ImportError:
        print('no plots: pip install "cobre-shm[report]"', file=sys.stderr)
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    payloads, ranks = payloads_of(run), run["conditions"]["ranks"]
    if not payloads:
        return False
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5), sharex=True, squeeze=False)
    for column, operation in enumerate(OPERATIONS[:3]):
        limits = [limit_of(run, payload) for payload in payloads]
        drawn = {limit_text(run): (payloads, limits)}
        for library in ever_ran(run, (*OURS, *PEERS)):
            points = {}
            for payload in payloads:
                key = f"{operation} {payload}"
                times = [medians(r, key, [library]).get(library) for r in run["rounds"]]
                values = [value for value in times if value is not None]
                if values:
                    points[payload] = statistics.median(values)
            drawn[library] = (list(points), list(points.values()))
        for name, (xs, ys) in drawn.items():
            style: dict[str, Any] = {"linewidth": 1, "linestyle": "--", "marker": "o"}
            if name in OURS:
                style = {"linewidth": 2.5, "marker": "o"}
            elif name not in TITLES:
                style = {"color": "black", "linewidth": 1.2, "linestyle": ":"}
            label = TITLES.get(name, name).replace("`", "")
            axes[0][column].loglog(xs, ys, markersize=3, label=label, **style)
            rate = [x / y / 1000 for x, y in zip(xs, ys, strict=True)]
            axes[1][column].loglog(xs, rate, markersize=3, **style)
        axes[0][column].set_title(
            f"{operation}, {ranks} ranks on {run['conditions']['cpus']} cores"
        )
        axes[1][column].set_xlabel("payload (bytes)")
        for row in (0, 1):
            axes[row][column].grid(visible=True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("time per call (us)")
    axes[1][0].set_ylabel("payload per time (GB/s)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=9, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def runs_of(folder: Path) -> list[Run]:
    """Return the runs of a folder that have a round, by number of ranks."""
    runs = [load(path) for path in folder.glob("peers-*.json")]
    runs = [run for run in runs if any(r["libraries"] for r in run["rounds"])]
    return sorted(runs, key=lambda run: int(run["conditions"]["ranks"]))


def write_report(folder: Path) -> str:
    """Write ``peers.md`` and the plots; return the text."""
    parts = []
    for run in runs_of(folder):
        name = f"peers-{run['conditions']['ranks']}.png"
        picture = (
            f"\n\n![{run['conditions']['ranks']} ranks]({name})" if plot(run, folder / name) else ""
        )
        parts.append(column_text(run) + picture)
    text = "\n\n".join(parts) + "\n"
    (folder / "peers.md").write_text(text)
    save(folder / "peers.json", summary(runs_of(folder)))
    return text


def summary(runs: list[Run]) -> Run:
    """Return the ratios of all runs without the single measurements."""
    has = runs[0]["conditions"] if runs else {}
    ranks = {
        run["conditions"]["ranks"]: {
            "rounds": [found["time"] for found in compared(run)],
            "commit": run["conditions"]["commit"],
            "limits": {
                name: statistics.median(found["limits"][name] for found in compared(run))
                for name in ("load", "ping_pong_us", "switch_us")
            },
            "ratios": {ours: ratios(run, ours) for ours in ever_ran(run, OURS)},
        }
        for run in runs
        if compared(run)
    }
    return {
        "machine": f"{has.get('processor')}, Linux {has.get('kernel')}, Python {has.get('python')}",
        "cpus": has.get("cpus"),
        "versions": {TITLES[n]: v for run in runs for n, v in versions(run).items()},
        "ranks": ranks,
    }


def ratios(run: Run, ours: str) -> dict[str, tuple[float, float, float, str]]:
    """Return (ratio, our time, the best peer's, its name) of all that was compared."""
    found = {key: ratio(run, key, ours) for key in keys_of(run)}
    return {
        key: (entry["ratio"], entry["ours"], entry["peer"], entry["name"])
        for key, entry in found.items()
        if entry is not None
    }


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench-results"))
    folder = parser.parse_args().folder
    if not any(folder.glob("peers-*.json")):
        sys.exit(f"There is no peers-N.json in {folder}: run scripts/bench peers --out {folder}")
    print(write_report(folder))


if __name__ == "__main__":
    main()
