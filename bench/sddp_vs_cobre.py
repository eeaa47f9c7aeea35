"""LPs per CPU second against Cobre 0.5.1, on the same machine at the same time.

    python bench/sddp_vs_cobre.py --cobre-python /path/to/python [--four-reservoirs CASE]

``--cobre-python`` is an interpreter (3.12 or newer) with ``pip install cobre-python==0.5.1
pyarrow``; without it, only our own figures are taken, and no ratio. The two programs take turns.
What a run costs is what it costs beyond its first iteration, in CPU time of all its threads or
ranks, so that starting, reading and writing do not count on either side.

A ratio above 1 means that we are faster; the exit code is 1 where one is below ``--require``. The
table says how loaded the machine was: wall times, and so everything with two ranks, mean something
only on two idle cores. How much two cores can do together, where they share caches, memory and
maybe more, is told by two trainings of one rank that know nothing of each other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from remeasure import first_within

HERE = Path(__file__).resolve()
TIME_LIMIT_SECONDS = 1800
REQUIRED = 0.7


def with_limit(case: Path, target: Path, iterations: int) -> Path:
    """Copy a case, with that many iterations and nothing after the training."""
    shutil.copytree(case, target, dirs_exist_ok=True)
    file = target / "config.json"
    config = json.loads(file.read_text())
    config["training"]["stopping_rules"] = [{"type": "iteration_limit", "limit": iterations}]
    config["simulation"] = {"enabled": False}
    file.write_text(json.dumps(config))
    return target


def measure_ours(case: Path, iterations: int) -> dict[str, float] | None:
    """Return what the iterations beyond the first cost on all ranks; None on other ranks."""
    import numpy as np

    from cobre_shm import create_communicator
    from cobre_shm.sddp import share_case, train

    with create_communicator() as comm:
        loaded = share_case(case, comm)
        figures = []
        for limit in (1, 1, iterations):
            cpu = time.process_time()
            result = train(loaded, comm, iterations=limit)
            own = np.array([time.process_time() - cpu])
            figures.append((float(comm.allreduce(own)[0]), result.seconds, result.lp_solves))
        return _beyond_first(figures) if comm.rank == 0 else None


def measure_cobre(case: Path, iterations: int, threads: int) -> dict[str, float]:
    """Return what the iterations beyond the first cost on all threads."""
    import cobre.run
    import pyarrow.parquet as pq

    figures = []
    for limit in (1, 1, iterations):
        with tempfile.TemporaryDirectory() as folder:
            copy = with_limit(case, Path(folder) / "case", limit)
            out = str(Path(folder) / "out")
            cpu = time.process_time()
            cobre.run.run(str(copy), output_dir=out, threads=threads, skip_simulation=True)
            cpu = time.process_time() - cpu
            table = pq.read_table(Path(out) / "training" / "convergence.parquet").to_pydict()
        figures.append((cpu, sum(table["time_total_ms"]) / 1e3, sum(table["lp_solves"])))
    return _beyond_first(figures)


def _beyond_first(figures: list[tuple[float, float, int]]) -> dict[str, float]:
    # The first run of all warms up: what loads and compiles once is in no difference.
    cpu, wall, lps = (last - first for first, last in zip(*figures[1:], strict=True))
    return {"cpu": cpu, "wall": wall, "lps": lps}


def run(python: str, *arguments: str, ranks: int = 1) -> dict[str, float]:
    """Run one measurement in a process, or on ranks, of its own."""
    launch = ["-m", "cobre_shm.spawn", "-n", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE.parents[1])
    done = subprocess.run(
        [python, *launch, str(HERE), "--measure", *arguments],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_SECONDS,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args)} failed:\n{done.stderr}")
    # The launcher may mark lines with their rank.
    line = next(line for line in reversed(done.stdout.splitlines()) if "{" in line)
    figures: dict[str, float] = json.loads(line[line.index("{") :])
    return figures


def run_apart(python: str, *arguments: str) -> dict[str, float]:
    """Run two measurements of one rank at once; the figures of both together."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: run(python, *arguments), range(2))
    return {
        "cpu": one["cpu"] + other["cpu"],
        "wall": (one["wall"] + other["wall"]) / 2,
        "lps": one["lps"] + other["lps"],
    }


def measure(arguments: list[str]) -> None:
    """Be the process of one measurement."""
    program, case, iterations, threads = arguments
    figures = (
        measure_ours(Path(case), int(iterations))
        if program == "ours"
        else measure_cobre(Path(case), int(iterations), int(threads))
    )
    if figures is not None:
        print(json.dumps(figures))


def cobre_works(python: str) -> bool:
    """Return whether an interpreter has the reference program."""
    probe = subprocess.run([python, "-c", "import cobre.run, pyarrow"], capture_output=True)
    return probe.returncode == 0


def compare(case: Path, iterations: int, options: argparse.Namespace, cobre: bool) -> float | None:
    """Measure one case in turns, print its line, return the ratio of the throughputs."""
    programs = {"one": (sys.executable, "ours", 1), "two": (sys.executable, "ours", 2)}
    if cobre:
        programs |= {"cobre": (options.cobre_python, "cobre", 1)}
        programs |= {"cobre two": (options.cobre_python, "cobre", 2)}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, (python, program, width) in programs.items():
            figures = run(
                python,
                *(program, str(case), str(iterations), str(width)),
                ranks=width if program == "ours" else 1,
            )
            taken[name].append(figures)
        words = ("ours", str(case), str(iterations), "1")
        taken.setdefault("apart", []).append(run_apart(sys.executable, *words))

    def median(name: str, key: str) -> float:
        return statistics.median(figures[key] / figures["lps"] * 1e6 for figures in taken[name])

    def ratio(above: str, below: str, key: str) -> float:
        # Round by round: what disturbs one program disturbs its neighbour in time as well.
        pairs = zip(taken[above], taken[below], strict=True)
        return statistics.median(a[key] / a["lps"] / (b[key] / b["lps"]) for a, b in pairs)

    cells = [f"{case.name}, {iterations}", f"{median('one', 'cpu'):.0f}"]
    cells.append(f"{median('cobre', 'cpu'):.0f}" if cobre else "-")
    cells.append(f"{ratio('cobre', 'one', 'cpu'):.2f}" if cobre else "-")
    cells.append(f"{ratio('one', 'two', 'wall'):.2f}")
    cells.append(f"{ratio('one', 'apart', 'wall'):.2f}")
    cells.append(f"{ratio('cobre two', 'two', 'wall'):.2f}" if cobre else "-")
    print("| " + " | ".join(cells) + " |", flush=True)
    return ratio("cobre", "one", "cpu") if cobre else None


def cases(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the cases to measure and their iterations."""
    from large_case import write_large_case

    if options.four_reservoirs:
        for iterations in options.iterations:
            yield options.four_reservoirs, iterations
    large = write_large_case(folder / "24 hydros", options.large_iterations)
    yield large, options.large_iterations


def main() -> int:
    """Run the command line."""
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cobre-python", metavar="PYTHON")
    parser.add_argument("--four-reservoirs", type=Path, metavar="CASE", help="Cobre's case 4ree")
    parser.add_argument("--iterations", type=int, nargs="+", default=[16, 64], help="of 4ree")
    parser.add_argument("--large-iterations", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--require", type=float, help=f"lowest ratio that passes (default: {REQUIRED})"
    )
    options = parser.parse_args()
    cobre = options.cobre_python is not None
    if cobre and not cobre_works(options.cobre_python):
        parser.error(f"{options.cobre_python} has no cobre-python==0.5.1 with pyarrow")
    if not cobre:
        if options.require is not None:
            parser.error("--require is of the ratio to Cobre: give --cobre-python")
        print("no --cobre-python, so no ratio is measured, and none required")
    required = REQUIRED if options.require is None else options.require

    def is_within(ratio: float | None) -> bool:
        return ratio is None or ratio >= required

    print(f"{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}\n")
    header = ("case, iterations", "our CPU us/LP", "Cobre's", "ratio", "2 ranks / 1")
    header += ("2 apart / 1", "2 / Cobre 2")
    print("| " + " | ".join(header) + " |\n" + "| --- " * len(header) + "|", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for case, iterations in cases(options, Path(folder)):
            ratios = first_within(
                partial(compare, case, iterations, options, cobre),
                is_within,
            )
            failed |= not is_within(ratios[-1])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
