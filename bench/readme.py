"""Put measured figures where README has places for them.

    scripts/bench peers --out bench-results
    python bench/readme.py [bench-results]

Reads ``peers.json`` of that folder (``bench/report.py`` makes it) and writes what belongs between
``<!-- bench:peers -->`` and ``<!-- /bench:peers -->``: when and where it was measured, a table for
each number of ranks, and the plots, which are copied to ``bench/pictures``. Nothing else of README
is touched; nothing is measured. ``--check`` writes nothing and fails if README is not what would be
written.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from report import SHOWN, size_of

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PICTURES = ROOT / "bench/pictures"
OPERATIONS = ("allreduce", "allgatherv", "broadcast", "broadcast_once")
KINDS = {"shm": "private", "shm-plan": "plan", "shm-shared": "shared"}
LIMITS = {
    "load": "load average {:.1f}",
    "ping_pong_us": "a cache line to another core and back {:.2f} us",
    "switch_us": "a switch between processes {:.2f} us",
}


def cell(entry):
    """Ratio, our time and the best peer's, its name; empty where nothing was measured."""
    if entry is None:
        return ""
    ratio, ours, theirs, name = entry
    shown = f"**{ratio:.2f}**" if round(ratio, 2) < 1 else f"{ratio:.2f}"
    return f"{shown} ({ours:.3g} / {theirs:.3g}, {name})"


def table(ranks, result, cpus):
    """The ratios of one number of ranks, both kinds of buffers side by side."""
    found = {kind: result["ratios"].get(kind, {}) for kind in KINDS}
    measured = {int(key.split()[1]) for ratios in found.values() for key in ratios} - {0}
    crowded = f", {ranks / cpus:g} on each CPU" if ranks > cpus else ", each with a CPU of its own"
    # Of the machine in those rounds, by name.
    found_too = [LIMITS[name].format(value) for name, value in result["limits"].items()]
    rounds = result["rounds"]
    lines = [
        f"**{ranks} ranks**{crowded}; {len(rounds)} rounds from {min(rounds)} on, commit"
        f" {result['commit']}; median over the rounds: {', '.join(found_too)}.",
        "",
        f"| payload | buffers | {' | '.join(SHOWN.get(name, name) for name in OPERATIONS)} |",
        f"| --- | --- |{' --- |' * len(OPERATIONS)}",
    ]
    barrier = cell(found["shm"].get("barrier 0"))
    if barrier:
        lines.append(f"| barrier | - | {barrier} |" + " |" * (len(OPERATIONS) - 1))
    for payload in sorted(measured):
        for kind, name in KINDS.items():
            cells = [cell(found[kind].get(f"{operation} {payload}")) for operation in OPERATIONS]
            if any(cells):
                lines.append(f"| {size_of(payload)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(report):
    """Where, under which load, with what."""
    said = f"{report['machine']}, {report['cpus']} CPUs"
    versions = report.get("versions", {})
    if versions:
        # One library is there under several names: with other settings it is another peer.
        said += "; " + ", ".join(dict.fromkeys(versions.values()))
    return f"Measured on {said}."


def section(report, folder):
    """Everything between the marks."""
    parts = [conditions(report)]
    for ranks, result in report["ranks"].items():
        parts.append(table(int(ranks), result, report["cpus"]))
        picture = folder / f"peers-{ranks}.png"
        if picture.exists():
            parts.append(f"![Latency and bandwidth, {ranks} ranks](bench/pictures/{picture.name})")
    return "\n\n".join(parts)


def fill(text, name, body):
    """Return ``text`` with ``body`` between the marks of ``name``."""
    first, last = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        sys.exit(f"README needs the marks {first} and {last} once each")
    pattern = re.escape(first) + ".*?" + re.escape(last)
    return re.sub(pattern, lambda _: f"{first}\n{body}\n{last}", text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench-results"))
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would")
    args = parser.parse_args()
    source = args.folder / "peers.json"
    if not source.is_file():
        sys.exit(f"There is no {source}: run scripts/bench peers --out {args.folder}")
    report = json.loads(source.read_text())
    text = args.readme.read_text()
    filled = fill(text, "peers", section(report, args.folder))
    if args.check:
        sys.exit(f"{args.readme} is not what {source} says" if filled != text else 0)
    args.readme.write_text(filled)
    for picture in args.folder.glob("peers-*.png"):
        PICTURES.mkdir(exist_ok=True)
        shutil.copy(picture, PICTURES)


if __name__ == "__main__":
    main()
