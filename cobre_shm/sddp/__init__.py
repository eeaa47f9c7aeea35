"""Training of hydrothermal operation policies by SDDP on any communicator.

``train(case, comm)`` and ``simulate(...)`` run on whatever backend the communicator has; the
results are equal, bit for bit, for every number of ranks. The case format is that of the Cobre
project, https://github.com/cobre-rs/cobre. Needs the extra: ``pip install "cobre-shm[sddp]"``.

    >>> from cobre_shm import create_communicator
    >>> from cobre_shm.sddp import shipped_case_path, train
    >>> with create_communicator() as comm:  # doctest: +SKIP
    ...     result = train(shipped_case_path(), comm)
    ...     print(result.lower_bound[-1])
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cobre_shm.sddp.case import Case as Case
    from cobre_shm.sddp.case import check_case as check_case
    from cobre_shm.sddp.case import load_case as load_case
    from cobre_shm.sddp.case import share_case as share_case
    from cobre_shm.sddp.errors import CaseError as CaseError
    from cobre_shm.sddp.errors import CheckpointError as CheckpointError
    from cobre_shm.sddp.errors import DuplicateId as DuplicateId
    from cobre_shm.sddp.errors import InvalidEnum as InvalidEnum
    from cobre_shm.sddp.errors import MissingDependency as MissingDependency
    from cobre_shm.sddp.errors import MissingFile as MissingFile
    from cobre_shm.sddp.errors import MissingReference as MissingReference
    from cobre_shm.sddp.errors import OutOfRange as OutOfRange
    from cobre_shm.sddp.errors import OutputError as OutputError
    from cobre_shm.sddp.errors import ParseError as ParseError
    from cobre_shm.sddp.errors import SchemaViolation as SchemaViolation
    from cobre_shm.sddp.errors import SolverError as SolverError
    from cobre_shm.sddp.errors import TypeMismatch as TypeMismatch
    from cobre_shm.sddp.errors import Unsupported as Unsupported
    from cobre_shm.sddp.simulation import SimulationResult as SimulationResult
    from cobre_shm.sddp.simulation import simulate as simulate
    from cobre_shm.sddp.training import train as train
    from cobre_shm.sddp.training_result import Iteration as Iteration
    from cobre_shm.sddp.training_result import TrainingDetails as TrainingDetails
    from cobre_shm.sddp.training_result import series_digest as series_digest

# Loaded at first use: reading a case needs no solver, and nothing needs both at import.
_HOME = {
    "case": ("Case", "check_case", "load_case", "share_case"),
    "errors": (
        "CaseError",
        "CheckpointError",
        "DuplicateId",
        "InvalidEnum",
        "MissingDependency",
        "MissingFile",
        "MissingReference",
        "OutOfRange",
        "OutputError",
        "ParseError",
        "SchemaViolation",
        "SolverError",
        "TypeMismatch",
        "Unsupported",
    ),
    "simulation": ("SimulationResult", "simulate"),
    "training": ("train",),
    "training_result": ("Iteration", "TrainingDetails", "series_digest"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE_OF, "shipped_case_path"])


def shipped_case_path() -> Path:
    """Return the directory of the case that comes with the package."""
    return Path(__file__).parent / "cases" / "four_reservoirs"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
