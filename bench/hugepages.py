"""What huge pages change for a shared region: making it, reading it in order and at random.

    python bench/hugepages.py [--mb 512] [--rounds 5]

One rank makes a region under each of the policies of ``COBRE_SHM_HUGEPAGES``, in turns, and reads
it: a sum over all of it, and a sum over elements at random places, one on average in every page
of the usual size. Figures are medians; beside them the median over the rounds of the ratio to
``never`` in the same round. *huge* is how much of the region the kernel has in huge pages
(``ShmemPmdMapped``): where it is 0, the system has refused, and the ratios are noise.
"""

from __future__ import annotations

import argparse
import platform
import secrets
import statistics
import time
from pathlib import Path

import numpy as np

from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator

POLICIES = ("never", "auto", "always")


def huge_mb(prefix: str) -> float:
    """Return how much of the group's memory this process has mapped in huge pages."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = prefix in line
        elif ours and line.startswith("ShmemPmdMapped:"):
            total += int(line.split()[1])
    return total / 1024


def measure(policy: str, nbytes: int, places: np.ndarray) -> dict[str, float]:
    config = ShmConfig(f"/cobre-bench-{secrets.token_hex(8)}", 0, 1, hugepages=policy)
    with ShmCommunicator(config) as comm:
        clock = [time.perf_counter()]
        with comm.create_shared_region(nbytes // 8) as region:
            region.array[:] = 1.0
            clock.append(time.perf_counter())
            total = region.array.sum()
            clock.append(time.perf_counter())
            assert region.array[places].sum() == len(places)
            clock.append(time.perf_counter())
            assert total == region.array.size
            huge = huge_mb(comm._segment.region_prefix)
    steps = np.diff(clock) * 1e3
    return {"made and filled": steps[0], "in order": steps[1], "at random": steps[2], "huge": huge}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    nbytes = options.mb << 20
    places = np.random.default_rng(1).integers(0, nbytes // 8, nbytes // 4096)
    rounds = [
        {policy: measure(policy, nbytes, places) for policy in POLICIES}
        for _ in range(options.rounds + 1)
    ][1:]  # the first one warms up
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    print(
        f"{options.mb} MiB, {options.rounds} rounds, Linux {platform.release()}, shmem_enabled "
        f"{setting.read_text().strip() if setting.exists() else 'absent'}\n"
    )
    print("| policy | made and filled, ms | sum in order, ms | sum at random, ms | huge, MiB |")
    print("| --- | --- | --- | --- | --- |")
    for policy in POLICIES:
        cells = []
        for what in ("made and filled", "in order", "at random"):
            middle = statistics.median(each[policy][what] for each in rounds)
            ratio = statistics.median(each[policy][what] / each["never"][what] for each in rounds)
            cells.append(f"{middle:.1f} ({ratio:.2f})")
        huge = statistics.median(each[policy]["huge"] for each in rounds)
        print(f"| `{policy}` | {' | '.join(cells)} | {huge:.0f} |")


if __name__ == "__main__":
    main()
