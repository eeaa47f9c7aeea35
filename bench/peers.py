"""The collectives against MPI and Gloo on one machine: ``scripts/bench peers``.

    python bench/peers.py [--ranks 2,8] [--launches 7] [--peers openmpi,openmpi-sm,mpich,impi,gloo]
                          [--out FOLDER]

Each round launches every library once, in changing order, and the cache-line ping-pong between two
cores is measured with it. A round's ratio is our median over the best peer's median of that round;
reported is the median over the rounds. Launches are repeated and not only iterations, because
where a launch's pages lie and how its processes are placed stays for its whole life.

What is easily got wrong, and how it is avoided here:

- pages that were never written are all one zero page, and reading them costs nothing: sources are
  filled with numbers, destinations touched;
- an unchanged send buffer stays in the peer's cache: it is changed before each call;
- a virtual machine's cores move: ratios are made within a round, never between rounds;
- one launch may be twice as slow as the next: at least seven launches;
- broadcast in a loop measures throughput, in which a root that runs ahead looks faster.

Writes ``peers.json``, ``peers.md`` and, with matplotlib, plots of latency and bandwidth.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = ("shm", "shm-shared")
PEERS = ("openmpi", "openmpi-sm", "mpich", "impi", "gloo")
OPERATIONS = ("allreduce", "allgatherv", "broadcast")
WORKER = str(HERE / "collectives.py")
TIMEOUT_SECS = 300


def command(peer, ranks, out, seconds, largest):
    """The command line that runs the worker under ``peer``."""
    kind = peer if peer in (*OURS, "gloo") else "mpi"
    worker = [WORKER, "--peer", kind, "--seconds", str(seconds), "--largest", str(largest)]
    worker += ["--out", str(out)]
    if peer in OURS:
        return [sys.executable, "-m", "cobre_shm.spawn", "-n", str(ranks), *worker]
    if peer == "gloo":
        python = os.environ.get("GLOO_PYTHON", sys.executable)
        torchrun = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        return [*torchrun, "--standalone", *worker]
    return [str(ROOT / "scripts/mpi"), peer.partition("-")[0], str(ranks), *worker]


def environment(peer):
    env = {**os.environ, "MPI_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    if peer == "openmpi-sm":
        env["OMPI_MCA_coll_sm_priority"] = "90"
    return env


def launch(peer, ranks, seconds, largest):
    """Run one launch; return its medians by "operation payload" in microseconds, or None."""
    with tempfile.TemporaryDirectory(prefix="cobre-bench-") as folder:
        out = Path(folder) / "out.json"
        done = subprocess.run(
            command(peer, ranks, out, seconds, largest),
            env=environment(peer),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECS,
            check=False,
        )
        if done.returncode != 0 or not out.exists():
            print(f"{peer}: ended with {done.returncode}\n{done.stderr[-800:]}", file=sys.stderr)
            return None
        batches = json.loads(out.read_text())
    return {key: statistics.median(values) for key, values in batches.items()}


def rounds(peers, ranks, launches, seconds, largest):
    """Return one dictionary of medians per library and round."""
    found = []
    missing = set()
    for number in range(launches):
        order = [peer for peer in (*OURS, *peers) if peer not in missing]
        random.shuffle(order)
        result = {}
        for peer in order:
            medians = launch(peer, ranks, seconds, largest)
            if medians is None:
                missing.add(peer)
            else:
                result[peer] = medians
        found.append(result)
        print(f"round {number + 1} of {launches}: {', '.join(result)}", file=sys.stderr)
    return found


def ratios(found, ours, peers):
    """Return {key: (median ratio, our median, best peer's median, its name)} over the rounds."""
    table = {}
    for key in found[0][ours]:
        values, mine, theirs, names = [], [], [], []
        for result in found:
            known = {p: result[p][key] for p in peers if p in result and key in result[p]}
            if not known or ours not in result:
                continue
            best = min(known, key=known.get)
            values.append(result[ours][key] / known[best])
            mine.append(result[ours][key])
            theirs.append(known[best])
            names.append(best)
        if values:
            table[key] = (
                statistics.median(values),
                statistics.median(mine),
                statistics.median(theirs),
                max(set(names), key=names.count),
            )
    return table


def markdown(ranks, table, found):
    lines = [
        f"### {ranks} ranks, {len(found)} rounds",
        "",
        "| payload | allreduce | allgatherv | broadcast |",
        "| --- | --- | --- | --- |",
    ]
    if "barrier 0" in table:
        ratio, mine, theirs, name = table["barrier 0"]
        lines.append(f"| barrier | {ratio:.2f} ({mine:.2f} / {theirs:.2f} us, {name}) | | |")
    payloads = sorted({int(key.split()[1]) for key in table if not key.startswith("barrier")})
    for payload in payloads:
        cells = []
        for operation in OPERATIONS:
            entry = table.get(f"{operation} {payload}")
            cells.append(
                f"{entry[0]:.2f} ({entry[1]:.4g} / {entry[2]:.4g} us, {entry[3]})" if entry else ""
            )
        lines.append(f"| {payload} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(folder, ranks, found):
    """Latency and bandwidth over payload, one line per library."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
        return
    libraries = sorted({peer for result in found for peer in result})
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), sharex=True)
    for column, operation in enumerate(OPERATIONS):
        for library in libraries:
            points = {}
            for result in found:
                for key, value in result.get(library, {}).items():
                    name, payload = key.split()
                    if name == operation:
                        points.setdefault(int(payload), []).append(value)
            xs = sorted(points)
            ys = [statistics.median(points[x]) for x in xs]
            style = {"linewidth": 2.5} if library in OURS else {"linewidth": 1, "linestyle": "--"}
            axes[0][column].loglog(xs, ys, marker="o", markersize=3, label=library, **style)
            bandwidth = [x / y / 1000 for x, y in zip(xs, ys, strict=True)]
            axes[1][column].loglog(xs, bandwidth, marker="o", markersize=3, **style)
        axes[0][column].set_title(f"{operation}, {ranks} ranks")
        axes[1][column].set_xlabel("payload (bytes)")
        for row in (0, 1):
            axes[row][column].grid(visible=True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("time per call (us)")
    axes[1][0].set_ylabel("payload per time (GB/s)")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(folder / f"peers-{ranks}.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", default="2,8")
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--seconds", type=float, default=0.02, help="of each batch")
    parser.add_argument("--largest", type=int, default=64 << 20)
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    args = parser.parse_args()
    peers = [peer for peer in args.peers.split(",") if peer]
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "ranks": {},
    }
    text = []
    for ranks in map(int, args.ranks.split(",")):
        # More than 16 MiB on ranks that share cores says nothing new.
        largest = args.largest if ranks <= report["cpus"] else min(args.largest, 16 << 20)
        found = rounds(peers, ranks, args.launches, args.seconds, largest)
        tables = {ours: ratios(found, ours, peers) for ours in OURS}
        report["ranks"][ranks] = {"rounds": found, "ratios": tables}
        text.append(f"## Private buffers\n\n{markdown(ranks, tables['shm'], found)}")
        text.append(f"## Shared arrays\n\n{markdown(ranks, tables['shm-shared'], found)}")
        plot(args.out, ranks, found)
    (args.out / "peers.json").write_text(json.dumps(report, indent=1))
    (args.out / "peers.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
