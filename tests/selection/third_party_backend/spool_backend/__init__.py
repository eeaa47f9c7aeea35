"""Registration of the spool backend. It imports nothing of the backend itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cobre_shm import BackendSpec, Capabilities
from cobre_shm.selection.env import read_settings
from cobre_shm.selection.values import Integer, Seconds
from cobre_shm.selection.variables import Variable


class Directory:
    """A path that need not exist yet."""

    expected = "a path"

    def parse(self, text: str) -> Path:
        return Path(text)

    def check(self, value: Any) -> Path:
        return Path(value)


VARIABLES = (
    Variable(
        "COBRE_SPOOL_DIR",
        "spool",
        Directory(),
        "Directory of the group, the same on all ranks",
        default=None,
        example="/tmp/my-run",
        required=True,
    ),
    Variable(
        "COBRE_SPOOL_RANK",
        "spool",
        Integer(0, 999),
        "Rank of this process",
        default=None,
        example="0",
        required=True,
    ),
    Variable(
        "COBRE_SPOOL_SIZE",
        "spool",
        Integer(1, 1000),
        "Number of ranks",
        default=None,
        example="2",
        required=True,
    ),
    Variable(
        "COBRE_SPOOL_TIMEOUT_SECS",
        "spool",
        Seconds(),
        "How long a collective may stand still",
        default="60",
        example="60",
        unit="s",
    ),
)


@dataclass(frozen=True)
class SpoolConfig:
    """A group of processes on one machine that meet in a directory."""

    backend: ClassVar[str] = "spool"

    dir: Path
    rank: int
    size: int
    timeout_secs: float = 60.0


def detect(env: Mapping[str, str]) -> str | None:
    return "COBRE_SPOOL_DIR is set" if env.get("COBRE_SPOOL_DIR") else None


def configure(env: Mapping[str, str]) -> SpoolConfig:
    return SpoolConfig(**read_settings("spool", VARIABLES, env))


SPEC = BackendSpec(
    name="spool",
    priority=35,
    connect="spool_backend.communicator:SpoolCommunicator",
    detect=detect,
    configure=configure,
    requirements=("numpy",),
    install_hint="pip install cobre-spool-backend",
    variables=VARIABLES,
    capabilities=Capabilities(detects_peer_loss=True, deterministic_sum=True),
)
