"""Tables and plots of what ``bench/peers.py`` has measured: ``python bench/report.py [FOLDER]``.

Reads ``peers-N.json`` of FOLDER, all rounds with N ranks, and writes

    peers.md        the tables of ratios, with the goals beside them, and of times
    peers-N.png     time and bandwidth over payload (with ``pip install "cobre-shm[report]"``)
    peers.json      the ratios alone, for ``bench/readme.py``

Whatever is there makes a table, so a run may be looked at while it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from goals import goal_of, is_reached
from rounds import (
    OPERATIONS,
    OURS,
    PEERS,
    Run,
    call_us,
    compared,
    ever_ran,
    has_own_cores,
    keys_of,
    limit_of,
    measured,
    medians,
    payloads_of,
    ratio,
    ratios,
    runs_of,
    save,
    versions,
)

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
FULL_ROUNDS = 7


def cell_of(ranks: int, key: str, ours: str, found: dict[str, Any] | None) -> str:
    """Return a cell: ratio, goal beside it, in bold where it is reached."""
    if found is None:
        return ""
    goal, payload = goal_of(ranks, key, ours), int(key.split()[1])
    number = f"{found['ratio']:.2f}"
    if goal is not None:
        has_won = is_reached(found["ratio"], goal, payload)
        number = f"{f'**{number}**' if has_won else number} ({goal:.2f})"
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


def limit_text(run: Run) -> str:
    """Return what ``limit_of`` is, in words."""
    if has_own_cores(run):
        return "half a cache line's round trip, or a copy by all ranks"
    return "each rank runs once, or a copy by all ranks"


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
