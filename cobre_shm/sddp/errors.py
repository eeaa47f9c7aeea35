"""Errors of the training workload.

CobreError
|-- CaseError                 the case directory cannot be used
|   |-- MissingFile           a required file is absent
|   |-- ParseError            a file is not readable JSON or Parquet
|   |-- SchemaViolation       a field is absent or has the wrong shape
|   |   |-- TypeMismatch      a field has the wrong type
|   |   |-- InvalidEnum       a word is none of those allowed
|   |   `-- DuplicateId       two entities have the same id
|   |-- OutOfRange            a value breaks a bound
|   |-- MissingReference      an id names nothing
|   `-- Unsupported           the format knows it, this program does not
|-- SolverError               a stage problem could not be solved
|-- OutputError               the output directory cannot be used
|-- CheckpointError           a checkpoint or policy cannot be gone on with
`-- MissingDependency         an optional package is not installed
"""

from __future__ import annotations

from typing import ClassVar

from cobre_shm.errors import CobreError


class CaseError(CobreError):
    """The case directory cannot be used.

    ``context`` holds what is known of ``file``, ``field``, ``entity_id``, ``value`` and
    ``expected``.
    """

    kind: ClassVar[str] = "CaseError"

    @property
    def is_configuration(self) -> bool:
        """Whether the fault lies in ``config.json`` rather than in the data files."""
        return self.context.get("file") == "config.json"


class MissingFile(CaseError):
    """A required file or the case directory itself is absent."""

    kind: ClassVar[str] = "MissingFile"


class ParseError(CaseError):
    """A file is not readable as JSON or Parquet."""

    kind: ClassVar[str] = "ParseError"


class SchemaViolation(CaseError):
    """A field is absent or has the wrong shape."""

    kind: ClassVar[str] = "SchemaViolation"


class TypeMismatch(SchemaViolation):
    """A field has the wrong type."""

    kind: ClassVar[str] = "TypeMismatch"


class InvalidEnum(SchemaViolation):
    """A word is none of those that are allowed."""

    kind: ClassVar[str] = "InvalidEnum"


class DuplicateId(SchemaViolation):
    """Two entities of one kind have the same id."""

    kind: ClassVar[str] = "DuplicateId"


class OutOfRange(CaseError):
    """A value breaks a bound."""

    kind: ClassVar[str] = "OutOfRange"


class MissingReference(CaseError):
    """An id names an entity or stage that does not exist."""

    kind: ClassVar[str] = "MissingReference"


class Unsupported(CaseError):
    """A feature of the format that this program refuses rather than ignores."""

    kind: ClassVar[str] = "Unsupported"


class SolverError(CobreError):
    """A stage problem has no optimal solution, or the solver refuses a part of it.

    ``context`` names ``stage`` (its id) with what the solver reported, and of a problem that has
    no optimal solution ``iteration``, ``scenario``, ``opening`` and the file that holds it, if one
    was written.
    """

    kind: ClassVar[str] = "SolverFailure"


class OutputError(CobreError):
    """The output directory cannot be created or written."""

    kind: ClassVar[str] = "OutputError"


class CheckpointError(CobreError):
    """A checkpoint or a policy is damaged or belongs to something else."""

    kind: ClassVar[str] = "CheckpointFailed"


class MissingDependency(CobreError):
    """A package of the ``sddp`` or ``report`` extra is not installed."""

    kind: ClassVar[str] = "MissingDependency"


# By kind: the errors that one rank finds and every rank raises.
SHARED_ERRORS: dict[str, type[CobreError]] = {
    cls.kind: cls
    for cls in (
        CaseError,
        MissingFile,
        ParseError,
        SchemaViolation,
        TypeMismatch,
        InvalidEnum,
        DuplicateId,
        OutOfRange,
        MissingReference,
        Unsupported,
        SolverError,
        OutputError,
        CheckpointError,
        MissingDependency,
    )
}


def require(package: str, extra: str = "sddp") -> MissingDependency:
    """Return the error that names the extra to install for ``package``."""
    return MissingDependency(
        f"the training workload needs the package {package!r}, which is not installed",
        context={"package": package},
        suggestion=f'pip install "cobre-shm[{extra}]"',
    )
