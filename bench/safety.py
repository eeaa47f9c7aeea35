"""What each safety feature costs, on against off: ``scripts/bench safety``.

    python bench/safety.py [--ranks 2,8] [--launches 7] [--payloads 65536] [--out FOLDER]

The product has no switch for them, and shall have none. So the package is copied, once as it is and
once for each feature without it, and the copies' kernels are compiled anew; what is taken out of
which function stands in ``FEATURES``, and a function or statement that is no longer there is an
error. Launches of all copies take turns in changing order; a cell is the median over launches of a
copy's median time, as a difference to the whole package's. The copies and their compiled kernels
stay in FOLDER for the next run, until a source changes. A copy without a feature is for measuring
only: it hangs, or computes nonsense, where the whole one says what is wrong.

    signature   of the call, which all ranks compare before they use a payload
    poison      the word that tells all waits of a failure, and the look for dead ranks
    recorder    the ring of the last calls, with times
    deadline    the clock in waits; without it a wait yields for ever, and spins no more and no
                less than it began with
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHOLE = "all on"
LAUNCH_SECS = 300
SHOWN = {
    "barrier": "barrier",
    "allreduce_8": "allreduce 8 B",
    "jit_barrier": "jit barrier",
    "jit_allreduce_8": "jit allreduce 8 B",
}


class Drop:
    """Take out of a function the outermost statements in which one of some texts stands."""

    def __init__(self, file: str, function: str, *texts: str) -> None:
        self.file, self.function, self._texts = file, function, texts

    def apply(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Return the body without them."""
        kept = body
        for text in self._texts:
            shorter = [node for node in kept if text not in ast.unparse(node)]
            if len(shorter) == len(kept):
                raise SystemExit(f"{self.file}: {self.function} has no {text!r}: see FEATURES")
            kept = shorter
        return kept or [ast.Pass()]


class Swap:
    """Put one text in the place of another in a function."""

    def __init__(self, file: str, function: str, old: str, new: str) -> None:
        self.file, self.function, self._old, self._new = file, function, old, new

    def apply(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Return the changed body."""
        text = "\n".join(map(ast.unparse, body))
        if self._old not in text:
            raise SystemExit(f"{self.file}: {self.function} has no {self._old!r}: see FEATURES")
        return ast.parse(text.replace(self._old, self._new)).body


class Body:
    """Put another body in the place of a function's."""

    def __init__(self, file: str, function: str, text: str) -> None:
        self.file, self.function, self._text = file, function, text

    def apply(self, _: list[ast.stmt]) -> list[ast.stmt]:
        """Return the new body."""
        inside = ast.parse(f"def function():\n    {self._text}").body[0]
        assert isinstance(inside, ast.FunctionDef)
        return inside.body


Edit = Drop | Swap | Body
FEATURES: dict[str, list[Edit]] = {
    "signature": [
        Drop("rounds.py", "begin", "context.SIGNATURE"),
        Swap(
            "rounds.py",
            "publish",
            "store_plain(line + layout.SIGNATURE, ctx[context.SIGNATURE])",
            "pass",
        ),
        Body("rounds.py", "_calls_agree", "return True"),
    ],
    "poison": [
        Drop("waiting.py", "publish_arrival", "context.POISON"),
        Drop("waiting.py", "_yield_or_sleep", "context.POISON", "_some_rank_died"),
    ],
    "recorder": [
        Drop(
            "rounds.py",
            "begin",
            "layout.ENTRY_",
            "context.ENTRY",
            "layout.RECORDED",
            "monotonic_ns",
        ),
        Drop("rounds.py", "end", "layout.ENTRY_"),
        Body("rounds.py", "recorded_wait", "pass"),
    ],
    "deadline": [
        Swap("waiting.py", "_yield_or_sleep", "monotonic_ns()", "1"),
        Body("waiting.py", "_adapt_spinning", "pass"),
    ],
}
COPIES: dict[str, list[Edit]] = {
    WHOLE: [],
    **FEATURES,
    "all of them": [edit for edits in FEATURES.values() for edit in edits],
}


def edited(source: str, edits: Iterable[Edit]) -> str:
    """Return a source after edits of its functions."""
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for edit in edits:
        if edit.function not in functions:
            raise SystemExit(f"{edit.file} has no function {edit.function}: see FEATURES")
        function = functions[edit.function]
        function.body = edit.apply(function.body)
    return ast.unparse(tree)


def stamp_of(package: Path, edits: Iterable[Edit]) -> str:
    """Return what identifies a copy."""
    digest = hashlib.blake2b(repr([vars(edit) for edit in edits]).encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_copy(folder: Path, edits: list[Edit]) -> None:
    """Copy the package without some features, unless that is there."""
    package = ROOT / "cobre_shm"
    stamp, file = stamp_of(package, edits), folder / "stamp"
    if file.exists() and file.read_text() == stamp:
        return
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "cobre_shm", ignore=ignored)
    kernels = folder / "cobre_shm" / "kernels"
    for name in {edit.file for edit in edits}:
        path = kernels / name
        path.write_text(edited(path.read_text(), [edit for edit in edits if edit.file == name]))
    file.write_text(stamp)


def launch(copy: Path, ranks: int, payloads: list[int]) -> dict[str, float]:
    """Return the medians of one launch of a copy."""
    with tempfile.TemporaryDirectory(prefix="cobre-bench-") as folder:
        out = Path(folder) / "out.json"
        line = [sys.executable, "-m", "cobre_shm.spawn", "-n", str(ranks)]
        line += [str(ROOT / "bench/in_ranks.py"), str(out), "--rounds", "7", "--payloads"]
        env = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(
            [*line, *map(str, payloads)],
            env=env,
            cwd=folder,
            timeout=LAUNCH_SECS,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{copy}: ended with {done.returncode}\n{done.stderr[-2000:]}")
        found = json.loads(out.read_text())
    return {name: median_of_known(values) for name, values in found.items()}


def median_of_known(values: list[float]) -> float:
    """Return the median without what noise has hidden, which is NaN."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def table(ranks: int, found: dict[str, list[dict[str, float]]]) -> str:
    """Return the differences in nanoseconds, and the times they are parts of."""
    names = [n for n in found[WHOLE][0] if n in SHOWN or n.startswith("allreduce_")]
    names = [n for n in names if not n.startswith("allreduce_shared")]
    titles = [SHOWN.get(n, f"allreduce {n.rpartition('_')[2]} B") for n in names]
    middle = {
        copy: {n: median_of_known([one[n] for one in launches]) * 1000 for n in names}
        for copy, launches in found.items()
    }
    lines = [
        f"### {ranks} ranks, {len(found[WHOLE])} launches of each, nanoseconds",
        "",
        f"| | {' | '.join(titles)} |",
        "| --- " * (len(names) + 1) + "|",
        f"| {WHOLE} | {' | '.join(f'{middle[WHOLE][n]:.0f}' for n in names)} |",
    ]
    for copy in list(COPIES)[1:]:
        cells = [f"{middle[WHOLE][n] - middle[copy][n]:+.0f}" for n in names]
        lines.append(f"| {copy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write ``safety.json`` and ``safety.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,8")
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--payloads", type=int, nargs="*", default=[64 << 10])
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    args = parser.parse_args()
    copies = {name: args.out.absolute() / "safety" / name.replace(" ", "-") for name in COPIES}
    report: dict[str, Any] = {"load": [os.getloadavg()[0]], "ranks": {}}
    for name, folder in copies.items():
        make_copy(folder, COPIES[name])
        print(f"{name}: compiling", file=sys.stderr)
        launch(folder, 1, args.payloads)
    tables = []
    for ranks in map(int, args.ranks.split(",")):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in copies}
        for number in range(args.launches):
            for name in random.sample(list(copies), len(copies)):
                found[name].append(launch(copies[name], ranks, args.payloads))
            print(f"{ranks} ranks: {number + 1} of {args.launches}", file=sys.stderr)
        report["ranks"][ranks] = found
        tables.append(table(ranks, found))
    report["load"].append(os.getloadavg()[0])
    (args.out / "safety.json").write_text(json.dumps(report, indent=1))
    text = "\n\n".join(tables) + "\n"
    (args.out / "safety.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
