"""Switch points of the shm algorithms: what they are, their defaults, and the file that sets them.

They select algorithms and chunks, so they must be equal on all ranks: rank 0 writes them into the
header of the segment before any rank returns from joining, and every rank reads them there.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path

__all__ = [
    "AUTO",
    "NAMES",
    "NEVER",
    "default_tuning",
    "last_level_cache_bytes",
    "load_tuning",
    "tuned_file",
]

AUTO = "auto"
_KIB, _MIB = 1 << 10, 1 << 20

# Indices of the words, in bytes unless said otherwise.
DIRECT_BYTES = 0  # largest allreduce in one round
CHAIN_MIN_BYTES = 1  # an allreduce from here on goes from rank to rank
CHAIN_CHUNK = 2  # of it, at most half a slot
STREAM_BYTES = 3  # payload times ranks from which stores go past the caches
STREAM_RANKS = 4  # number of ranks up to which a larger allreduce is rounds of the direct kind
DIRECT_CHUNK = 5  # of a streaming direct allreduce
SCATTER_CHUNK = 6  # of an allreduce by reduce-scatter
SCATTER_STREAM_CHUNK = 7  # the same, past the caches
GATHER_CHUNK = 8  # of each block of an allgatherv
GATHER_STREAM_CHUNK = 9  # the same, past the caches
BROADCAST_SMALL_CHUNK = 10  # of a broadcast of at most ...
BROADCAST_SMALL_BYTES = 11  # ... so many bytes
BROADCAST_CHUNK = 12  # of a larger one
# Payload of an allgatherv from which shared arrays need no slots; in a broadcast twice that, in an
# allreduce divided by the peers of a rank.
SHARE_BYTES = 14
SPIN_PAUSES = 13  # turns of a wait before it yields, to begin with; 0: ranks share cores
READ_BYTES = 15  # payload from which ranks read private memory of peers; likewise
COMMON_BYTES = 16  # payload from which allreduce_shared makes one result for all ranks

NAMES = (
    "direct_bytes",
    "chain_min_bytes",
    "chain_chunk",
    "stream_bytes",
    "stream_ranks",
    "direct_chunk",
    "scatter_chunk",
    "scatter_stream_chunk",
    "gather_chunk",
    "gather_stream_chunk",
    "broadcast_small_chunk",
    "broadcast_small_bytes",
    "broadcast_chunk",
    "spin_pauses",
    "share_bytes",
    "read_bytes",
    "common_bytes",
)
_CHUNKS = tuple(name for name in NAMES if name.endswith("chunk"))
_SMALLEST_CHUNK = 4096
# As a size: what is measured against it never happens.
NEVER = 1 << 62


def default_tuning(size: int, cpus: int) -> dict[str, int]:
    """Return the switch points for ``size`` ranks on ``cpus`` processors."""
    shared = size > cpus
    return {
        "direct_bytes": 256 * _KIB if size == 2 and not shared else 8 * _KIB,
        "chain_min_bytes": 96 * _KIB if shared else NEVER,
        "chain_chunk": 32 * _KIB,
        # Of a cache of hundreds of MiB the rest belongs to other cores, or virtual machines.
        "stream_bytes": min(last_level_cache_bytes() // 4, 64 * _MIB),
        "stream_ranks": 2,
        "direct_chunk": 128 * _KIB,
        "scatter_chunk": 256 * _KIB,
        "scatter_stream_chunk": 256 * _KIB,
        "gather_chunk": 256 * _KIB,
        "gather_stream_chunk": 256 * _KIB,
        "broadcast_small_chunk": 64 * _KIB if not shared else 256 * _KIB,
        "broadcast_small_bytes": _MIB,
        "broadcast_chunk": 256 * _KIB,
        "spin_pauses": 0 if shared else 2000,
        # What a peer has read of a buffer has to go from its cache before it can be written again.
        # Slots are used in turn, so that this has happened long before. An allgatherv of 1 MiB with
        # two ranks takes 0.4 to 0.6 of the time through them, a broadcast of 1 MiB with eight ranks
        # on two cores 0.6 (medians of 6 and 14 launches, 2026-11-29); from here on it is as long.
        "share_bytes": 2 * _MIB if not shared else 3 * _MIB,
        # On cores of their own: ranks that take turns on one find what they copied in its cache.
        # With two ranks an allreduce of 3.2 MB takes 0.6 of the time through slots, one of 8 MiB
        # 0.8; one of 16 MiB 0.8 or 2.0, one of 64 MiB 0.9 or 2.0, on hyperthreads of one core or on
        # distant cores (medians of 7 launches, 4 of the last, 2026-11-29).
        "read_bytes": 16 * _MIB if not shared else NEVER,
        # With 256 KiB a result on each rank takes 0.8 to 1.0 of the time of one for all with two
        # ranks, 0.5 to 0.9 with eight on two cores; with 512 KiB 1.1 and 1.4 (medians and minima of
        # 6 and 4 launches, 2026-11-29).
        "common_bytes": 512 * _KIB,
    }


def load_tuning(name: str) -> dict[str, int]:
    """Read switch points from a JSON object; those it does not name keep their defaults.

    Args:
        name: Of the file; ``auto``: the one that ``python -m cobre_shm.tune`` wrote for this
            machine, or none.

    Raises:
        ValueError: It is no such file; the message says what is wrong with it.
    """
    path = _reachable_file() if name == AUTO else Path(name)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object of switch points")
    for name, value in found.items():
        if name not in NAMES:
            raise ValueError(f"{path}: unknown switch point {name!r}; known: {', '.join(NAMES)}")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= NEVER:
            raise ValueError(f"{path}: {name} must be an integer from 0, got {value!r}")
        if name in _CHUNKS and (value < _SMALLEST_CHUNK or value & (value - 1)):
            raise ValueError(
                f"{path}: {name} must be a power of two from {_SMALLEST_CHUNK}, got {value}"
            )
    return found


def _reachable_file() -> Path | None:
    """Return the file of this machine, if this user has a home and there is one in it."""
    with suppress(OSError, RuntimeError):
        path = tuned_file()
        return path if path.exists() else None
    return None


def tuned_file() -> Path:
    """Return where ``python -m cobre_shm.tune`` writes what it measured on this machine.

    Raises:
        RuntimeError: This user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "cobre-shm" / f"tuning-{platform.node()}.json"


def last_level_cache_bytes() -> int:
    """Return the size of the last-level cache; 32 MiB where the system does not tell."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    levels: dict[int, int] = {}
    for entry in folder.glob("index*"):
        try:
            level = int((entry / "level").read_text())
            text = (entry / "size").read_text().strip()
            levels[level] = int(text[:-1]) * {"K": _KIB, "M": _MIB}[text[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return levels[max(levels)] if levels else 32 * _MIB
