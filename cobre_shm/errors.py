"""The errors of choosing and using a communicator, and the base of all others.

    CobreError                       kind, message, context, suggestion, to_dict()
    |-- BackendError                 choosing or starting a backend
    |   |-- BackendNotAvailable      known, but its requirements are not installed
    |   |-- InvalidBackend           no backend of that name is registered
    |   |-- InitializationFailed     chosen, but it could not start
    |   `-- MissingConfiguration     chosen, but required variables are not set
    |-- IncompatibleSettings         also a ValueError: arguments that do not go together
    |-- WorkerError                  a process that a library call started has failed
    `-- CommError                    using a communicator
        |-- InvalidBufferSize        also a ValueError
        |-- InvalidDatatype          also a TypeError
        |-- InvalidRoot              also a ValueError
        |-- InvalidCommunicator      closed, forked, or in use by another thread
        |-- AllocationFailed         also a MemoryError
        `-- CollectiveFailed         the group is lost: later calls raise the same at once
            |-- RankFailed           a rank died, left or aborted
            |-- CollectiveTimeout    nothing moved for the whole time limit
            `-- CollectiveMismatch   ranks called different collectives

The launcher's (``cobre_shm.spawn.errors``) and the trainer's derive from CobreError in modules of
their own.

Whatever is found locally, before anything was published to a peer, leaves the communicator
usable. After a CollectiveFailed the receive buffer is unspecified and the communicator can only
be closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

__all__ = [
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
]


def _restore(cls: type[CobreError], args: tuple[object, ...], state: dict[str, Any]) -> CobreError:
    # Not cls.__new__: beside CommError, MemoryError's own one refuses to make AllocationFailed.
    error = BaseException.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class CobreError(Exception):
    """Base of all errors of cobre-shm.

    Attributes:
        kind: The error kind of the structured output. It is coarser than the class: all errors of
            using a communicator are ``"MpiError"``, on any backend.
        message: One sentence: what was wrong, and where.
        context: The values behind the message, JSON-serialisable.
        suggestion: What would be right, or None.
    """

    kind: ClassVar[str] = "InternalError"

    message: str
    context: dict[str, Any]
    suggestion: str | None

    def __init__(
        self,
        message: str,
        *,
        context: Mapping[str, Any] | None = None,
        suggestion: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.context = dict(context or {})
        self.suggestion = suggestion

    def __str__(self) -> str:
        return f"{self.message}. {self.suggestion}" if self.suggestion else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses have constructors of their own shape; the attributes are the whole state.
        return _restore, (type(self), self.args, self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """Return the structured form: kind, message, context, suggestion."""
        return {
            "kind": self.kind,
            "message": self.message,
            "context": self.context,
            "suggestion": self.suggestion,
        }


class BackendError(CobreError):
    """Choosing or starting a communication backend failed. Command lines end with code 4.

    There is always a suggestion.
    """


class BackendNotAvailable(BackendError):
    """The backend is known, but its requirements are not installed.

    Attributes:
        requested: Name of the backend.
        available: Names of those that are.
    """

    kind = "IncompatibleSettings"

    def __init__(
        self, requested: str, available: Sequence[str], *, install_hint: str | None = None
    ) -> None:
        # Nothing follows the hint: what is pasted must end where the command does.
        hint = f" To use {requested.upper()}: {install_hint}" if install_hint else ""
        super().__init__(
            f"Communication backend '{requested}' is not available in this build",
            context={
                "setting": "COBRE_COMM_BACKEND",
                "requested_value": requested,
                "available_backends": list(available),
                "build_features": [name for name in available if name != "local"],
            },
            suggestion=f"Set COBRE_COMM_BACKEND to one of: {', '.join(available)}.{hint}",
        )
        self.requested = requested
        self.available: list[str] = list(available)


class InvalidBackend(BackendError):
    """No backend of this name is registered.

    Attributes:
        requested: The name.
        available: Names of the backends that are registered and installed.
    """

    kind = "IncompatibleSettings"

    def __init__(
        self, requested: str, available: Sequence[str], *, nearest: str | None = None
    ) -> None:
        meant = f"Did you mean '{nearest}'? " if nearest else ""
        super().__init__(
            f"Communication backend '{requested}' is not known",
            context={
                "setting": "COBRE_COMM_BACKEND",
                "requested_value": requested,
                "available_backends": list(available),
                "build_features": [name for name in available if name != "local"],
            },
            suggestion=f"{meant}Set COBRE_COMM_BACKEND to one of: auto, {', '.join(available)}.",
        )
        self.requested = requested
        self.available: list[str] = list(available)


class InitializationFailed(BackendError):
    """The backend was chosen but could not start.

    Attributes:
        backend: Name of the backend.
        source: The exception underneath, or None; it is also the ``__cause__``.
    """

    kind = "MpiError"

    def __init__(
        self,
        backend: str,
        detail: str,
        *,
        operation: str = "initialize",
        source: BaseException | None = None,
        context: Mapping[str, Any] | None = None,
        suggestion: str | None = None,
    ) -> None:
        code = getattr(source, "errno", None)
        super().__init__(
            detail,
            context={
                "operation": operation,
                "backend": backend,
                **(context or {}),
                "error_code": code if isinstance(code, int) else 0,
                "detail": str(source) if source is not None else detail,
            },
            suggestion=suggestion
            or "To see what this installation and this machine offer: python -m cobre_shm.info",
        )
        self.backend = backend
        self.source = source
        self.__cause__ = source


class MissingConfiguration(BackendError):
    """Variables that the chosen backend requires are not set; all of them are listed.

    Attributes:
        backend: Name of the backend.
        missing_vars: Names of the variables.
    """

    kind = "IncompatibleSettings"

    def __init__(
        self, backend: str, missing_vars: Sequence[str], *, suggestion: str | None = None
    ) -> None:
        names = list(missing_vars)
        listed = names[0]
        if len(names) == 2:
            listed = f"{names[0]} and {names[1]}"
        elif len(names) > 2:
            listed = f"{', '.join(names[:-1])}, and {names[-1]}"
        super().__init__(
            f"{backend.upper()} backend requires {listed} to be set",
            context={
                "setting": "COBRE_COMM_BACKEND",
                "requested_value": backend,
                "missing_variables": names,
            },
            suggestion=suggestion or "Set the required environment variables.",
        )
        self.backend = backend
        self.missing_vars = names


class IncompatibleSettings(CobreError, ValueError):
    """Arguments, or settings of the process, that do not go together. Nothing was started."""

    kind = "IncompatibleSettings"


class WorkerError(CobreError):
    """A worker failed. The other workers have been ended, and nothing of the group is left.

    Attributes:
        rank: The worker that failed first.
        pid: Its process id.
        exit_code: How it ended: its exit code, or minus the signal that ended it, as
            ``subprocess`` has it; None if it had to be ended after it had raised, or if this
            program ignores SIGCHLD, so that nobody knows.
        signal: Number of the signal that ended it, or None.
        cause: What else is known of why it died, such as a lack of memory; or None.
        inner: The exception that it raised, whose ``__cause__`` shows the traceback in the
            worker; None if it died without one.
    """

    kind = "WorkerError"

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        pid: int,
        exit_code: int | None = None,
        signal: int | None = None,
        inner: BaseException | None = None,
        cause: str | None = None,
    ) -> None:
        context: dict[str, Any] = {
            "rank": rank,
            "pid": pid,
            "exit_code": exit_code,
            "signal": signal,
        }
        if cause is not None:
            context["cause"] = cause
        if inner is not None:
            context["inner"] = (
                inner.to_dict()
                if isinstance(inner, CobreError)
                else {"kind": type(inner).__name__, "message": str(inner)}
            )
        super().__init__(message, context=context)
        self.rank = rank
        self.pid = pid
        self.exit_code = exit_code
        self.signal = signal
        self.cause = cause
        self.inner = inner


class CommError(CobreError):
    """Using a communicator failed.

    ``context["code"]`` is the name of the class; after a fork it is ``"ForkedCommunicator"``.
    """

    kind = "MpiError"

    def __init__(
        self,
        message: str,
        *,
        context: Mapping[str, Any] | None = None,
        suggestion: str | None = None,
    ) -> None:
        super().__init__(
            message, context={"code": type(self).__name__, **(context or {})}, suggestion=suggestion
        )


class InvalidBufferSize(CommError, ValueError):
    """A buffer, a count or a displacement does not fit the operation; nothing was sent.

    Attributes:
        operation: Name of the collective.
        expected: What would fit.
        actual: What was given.
    """

    def __init__(
        self, operation: str, expected: object, actual: object, *, what: str = "buffer size"
    ) -> None:
        super().__init__(
            f"{operation}: {what}: expected {expected}, got {actual}",
            context={"operation": operation, "expected": expected, "actual": actual},
        )
        self.operation = operation
        self.expected = expected
        self.actual = actual


class InvalidDatatype(CommError, TypeError):
    """A buffer's type cannot take part in the operation; nothing was sent.

    Attributes:
        operation: Name of the collective.
    """

    def __init__(self, operation: str, message: str) -> None:
        super().__init__(f"{operation}: {message}", context={"operation": operation})
        self.operation = operation


class InvalidRoot(CommError, ValueError):
    """The root is not a rank of the group; nothing was sent.

    Attributes:
        root: What was given; None as well where jitted code gave it, which does not tell.
        size: Number of ranks.
    """

    def __init__(self, root: object, size: int, *, is_known: bool = True) -> None:
        which = f"root {root!r}" if is_known else "the root given to jit.broadcast"
        super().__init__(
            f"broadcast: {which} is not a rank: expected an integer in 0..{size - 1}",
            context={"root": repr(root) if is_known else None, "size": size},
        )
        self.root = root
        self.size = size


class InvalidCommunicator(CommError):
    """The communicator cannot be used here: closed, inherited by fork, or busy in a thread."""


class AllocationFailed(CommError, MemoryError):
    """There is not enough memory, and nothing is left of what was begun.

    Of memory that ranks share, every rank gets this error.

    Attributes:
        requested_bytes: How much was asked for.
        detail: Why it was refused, as far as this rank knows.
    """

    def __init__(
        self,
        requested_bytes: int,
        detail: str,
        *,
        context: Mapping[str, Any] | None = None,
        suggestion: str | None = None,
    ) -> None:
        super().__init__(
            f"Allocation of {requested_bytes} bytes failed: {detail}",
            context={"requested_bytes": requested_bytes, **(context or {})},
            suggestion=suggestion,
        )
        self.requested_bytes = requested_bytes
        self.detail = detail


class CollectiveFailed(CommError):
    """A collective did not complete and the group is lost.

    State after: ``recv`` is unspecified; every later call on the communicator raises again, at
    once; ``close()`` works.
    """


class RankFailed(CollectiveFailed):
    """A rank died, left or aborted while others needed it.

    Attributes:
        rank: The rank that failed first.
        pid: Its process id.
        signal: Number of the signal that ended it, or None when unknown or not a signal.
        exit_code: Its exit code, or None when unknown or ended by a signal.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        pid: int,
        signal: int | None = None,
        exit_code: int | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            message,
            context={
                "rank": rank,
                "pid": pid,
                "signal": signal,
                "exit_code": exit_code,
                **(context or {}),
            },
        )
        self.rank = rank
        self.pid = pid
        self.signal = signal
        self.exit_code = exit_code


class CollectiveTimeout(CollectiveFailed):
    """Some rank did not arrive, and nothing moved for the whole time limit.

    Attributes:
        missing_ranks: The ranks that had not arrived, ascending.
        seconds: The time limit.
    """

    def __init__(
        self,
        message: str,
        *,
        missing_ranks: Sequence[int],
        seconds: float,
        suggestion: str | None = None,
    ) -> None:
        super().__init__(
            message,
            context={"missing_ranks": list(missing_ranks), "seconds": seconds},
            suggestion=suggestion,
        )
        self.missing_ranks: list[int] = list(missing_ranks)
        self.seconds = seconds


class CollectiveMismatch(CollectiveFailed):
    """The ranks called different collectives, or the same with different arguments.

    Raised on every rank.

    Attributes:
        calls: What each rank called, by rank: one line of text each.
    """

    def __init__(self, calls: Sequence[str]) -> None:
        table = "".join(f"\n  rank {rank}: {call}" for rank, call in enumerate(calls))
        super().__init__(
            f"The ranks do not agree on the collective:{table}", context={"calls": list(calls)}
        )
        self.calls: list[str] = list(calls)
