"""The four backends of this project, registered like anyone's.

    priority   backend   is chosen when
    40         mpi       an MPI launcher started the process
    30         tcp       COBRE_TCP_COORDINATOR is set
    20         shm       COBRE_SHM_NAME is set
    0          local     nothing else was

Implementations are named and not imported, for they stand above this layer.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from cobre_shm.selection.kinds import LocalConfig, MpiConfig, ShmConfig, TcpConfig
from cobre_shm.selection.launchers import LAUNCHER_VARIABLES
from cobre_shm.selection.registry import BackendSpec, Capabilities
from cobre_shm.selection.variables import variables_of

__all__ = ["LOCAL", "MPI", "SHM", "TCP"]


def _when_set(*names: str) -> Callable[[Mapping[str, str]], str | None]:
    def detect(env: Mapping[str, str]) -> str | None:
        return next((f"{name} is set" for name in names if env.get(name)), None)

    return detect


def _otherwise(env: Mapping[str, str]) -> str:  # noqa: ARG001 - accepts any environment
    return "it fits any environment"


def _open_local(config: LocalConfig) -> Any:  # noqa: ARG001 - there is nothing to configure
    return pkgutil.resolve_name("cobre_shm.local:LocalCommunicator")()


MPI = BackendSpec(
    name="mpi",
    priority=40,
    connect="cobre_net.mpi:MpiCommunicator",
    detect=_when_set(*LAUNCHER_VARIABLES),
    configure=MpiConfig.from_env,
    requirements=("numba", "posix_ipc", "mpi4py"),
    install_hint='pip install "cobre-shm[mpi]"',
    variables=variables_of("mpi"),
    capabilities=Capabilities(true_shared_memory=True, deterministic_sum=True),
)

TCP = BackendSpec(
    name="tcp",
    priority=30,
    connect="cobre_net.tcp:TcpCommunicator",
    detect=_when_set("COBRE_TCP_COORDINATOR"),
    configure=TcpConfig.from_env,
    requirements=("numba",),
    install_hint='pip install "cobre-shm[tcp]"',
    variables=variables_of("tcp"),
    capabilities=Capabilities(detects_peer_loss=True, deterministic_sum=True),
)

SHM = BackendSpec(
    name="shm",
    priority=20,
    connect="cobre_shm.shm:ShmCommunicator",
    detect=_when_set("COBRE_SHM_NAME"),
    configure=ShmConfig.from_env,
    requirements=("numba", "posix_ipc"),
    install_hint='pip install "cobre-shm[shm]"',
    variables=variables_of("shm"),
    capabilities=Capabilities(
        true_shared_memory=True, detects_peer_loss=True, deterministic_sum=True
    ),
)

LOCAL = BackendSpec(
    name="local",
    priority=0,
    connect=_open_local,
    detect=_otherwise,
    configure=LocalConfig.from_env,
    variables=variables_of("local"),
    capabilities=Capabilities(detects_peer_loss=True, deterministic_sum=True),
)
