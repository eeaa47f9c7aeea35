"""One ``Communicator`` for many processes: shared memory, one process, TCP, or MPI.

``create_communicator()`` chooses the backend from the environment. Names are loaded when they
are first used, so that importing the package costs no more than numpy, and the launcher less.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cobre_shm.api.asynchronous import train_async as train_async
    from cobre_shm.api.policy import Policy as Policy
    from cobre_shm.api.result import History as History
    from cobre_shm.api.result import ProgressEvent as ProgressEvent
    from cobre_shm.api.result import TrainingResult as TrainingResult
    from cobre_shm.api.result import WorkerInfo as WorkerInfo
    from cobre_shm.api.training import simulate as simulate
    from cobre_shm.api.training import train as train
    from cobre_shm.communicator import Communicator as Communicator
    from cobre_shm.communicator import SharedRegion as SharedRegion
    from cobre_shm.datatypes import ReduceOp as ReduceOp
    from cobre_shm.errors import AllocationFailed as AllocationFailed
    from cobre_shm.errors import BackendError as BackendError
    from cobre_shm.errors import BackendNotAvailable as BackendNotAvailable
    from cobre_shm.errors import CobreError as CobreError
    from cobre_shm.errors import CollectiveFailed as CollectiveFailed
    from cobre_shm.errors import CollectiveMismatch as CollectiveMismatch
    from cobre_shm.errors import CollectiveTimeout as CollectiveTimeout
    from cobre_shm.errors import CommError as CommError
    from cobre_shm.errors import IncompatibleSettings as IncompatibleSettings
    from cobre_shm.errors import InitializationFailed as InitializationFailed
    from cobre_shm.errors import InvalidBackend as InvalidBackend
    from cobre_shm.errors import InvalidBufferSize as InvalidBufferSize
    from cobre_shm.errors import InvalidCommunicator as InvalidCommunicator
    from cobre_shm.errors import InvalidDatatype as InvalidDatatype
    from cobre_shm.errors import InvalidRoot as InvalidRoot
    from cobre_shm.errors import MissingConfiguration as MissingConfiguration
    from cobre_shm.errors import RankFailed as RankFailed
    from cobre_shm.errors import WorkerError as WorkerError
    from cobre_shm.local import LocalCommunicator as LocalCommunicator
    from cobre_shm.sddp.simulation import SimulationResult as SimulationResult
    from cobre_shm.selection.factory import available_backends as available_backends
    from cobre_shm.selection.factory import create_communicator as create_communicator
    from cobre_shm.selection.kinds import BackendKind as BackendKind
    from cobre_shm.selection.kinds import LocalConfig as LocalConfig
    from cobre_shm.selection.kinds import MpiConfig as MpiConfig
    from cobre_shm.selection.kinds import ShmConfig as ShmConfig
    from cobre_shm.selection.kinds import TcpConfig as TcpConfig
    from cobre_shm.selection.registry import BackendSpec as BackendSpec
    from cobre_shm.selection.registry import Capabilities as Capabilities
    from cobre_shm.shm import ShmCommunicator as ShmCommunicator

_HOME = {
    "api.asynchronous": ("train_async",),
    "api.policy": ("Policy",),
    "api.result": ("History", "ProgressEvent", "TrainingResult", "WorkerInfo"),
    "api.training": ("simulate", "train"),
    "communicator": ("Communicator", "SharedRegion"),
    "datatypes": ("ReduceOp",),
    "errors": (
        "AllocationFailed",
        "BackendError",
        "BackendNotAvailable",
        "CobreError",
        "CollectiveFailed",
        "CollectiveMismatch",
        "CollectiveTimeout",
        "CommError",
        "IncompatibleSettings",
        "InitializationFailed",
        "InvalidBackend",
        "InvalidBufferSize",
        "InvalidCommunicator",
        "InvalidDatatype",
        "InvalidRoot",
        "MissingConfiguration",
        "RankFailed",
        "WorkerError",
    ),
    "local": ("LocalCommunicator",),
    "sddp.simulation": ("SimulationResult",),
    "selection.factory": ("available_backends", "create_communicator"),
    "selection.kinds": ("BackendKind", "LocalConfig", "MpiConfig", "ShmConfig", "TcpConfig"),
    "selection.registry": ("BackendSpec", "Capabilities"),
    "shm": ("ShmCommunicator",),
}
# Packages and modules for use by their names, as in ``cobre_shm.spawn.run``.
_MODULES = ("jit", "sddp", "spawn")
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
