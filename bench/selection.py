"""What choosing a backend costs, as ratios taken in one run: ``python bench/selection.py``.

- One call through the communicator that ``create_communicator()`` returned, over the same call on
  one that was constructed directly. There is no wrapper, so the ratio is 1 within noise.
- ``import cobre_shm`` and ``python -m cobre_shm.spawn --help``, over ``import numpy``: whole
  interpreters, fastest of several, taken in turns so that a slow phase of the machine hits all.
"""

from __future__ import annotations

import json
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from cobre_shm import Communicator, LocalConfig, ShmConfig, create_communicator
from cobre_shm.local import LocalCommunicator
from cobre_shm.shm import ShmCommunicator

ROUNDS = 41
CALLS = 2000
STARTS = 9


def shm_config() -> ShmConfig:
    return ShmConfig(f"/cobre-bench-{secrets.token_hex(8)}", rank=0, size=1)


def seconds_of_calls(comm: Communicator) -> float:
    send, recv = np.ones(1), np.empty(1)
    start = time.perf_counter()
    for _ in range(CALLS):
        comm.allreduce(send, recv)
    return time.perf_counter() - start


def ratio_of_calls(chosen: Communicator, direct: Communicator) -> float:
    """Median over rounds of the ratio of neighbouring measurements; who is first alternates."""
    ratios = []
    for turn in range(ROUNDS):
        if turn % 2:
            first = seconds_of_calls(chosen)
            ratios.append(first / seconds_of_calls(direct))
        else:
            first = seconds_of_calls(direct)
            ratios.append(seconds_of_calls(chosen) / first)
    return statistics.median(ratios)


def seconds_of_start(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def ratios_of_starts() -> dict[str, float]:
    commands = {
        "import numpy": ("-c", "import numpy"),
        "import cobre_shm": ("-c", "import cobre_shm"),
        "spawn --help": ("-m", "cobre_shm.spawn", "--help"),
    }
    fastest = dict.fromkeys(commands, float("inf"))
    for _ in range(STARTS):
        for name, arguments in commands.items():
            fastest[name] = min(fastest[name], seconds_of_start(*arguments))
    numpy_alone = fastest.pop("import numpy")
    return {f"{name} / import numpy": value / numpy_alone for name, value in fastest.items()}


def main() -> None:
    makers: dict[str, tuple[Callable[[], Communicator], Callable[[], Communicator]]] = {
        "local": (lambda: create_communicator(LocalConfig()), LocalCommunicator),
        "shm": (lambda: create_communicator(shm_config()), lambda: ShmCommunicator(shm_config())),
    }
    ratios = {}
    for name, (choose, construct) in makers.items():
        with choose() as chosen, construct() as direct:
            ratios[f"{name} call chosen / constructed"] = ratio_of_calls(chosen, direct)
    ratios.update(ratios_of_starts())
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}, indent=2))


if __name__ == "__main__":
    main()
