"""From a request to a communicator: choose a backend, configure it, start it.

    request                         backend                       configuration
    a configuration                 the one it belongs to         itself
    BackendKind.LOCAL, MPI          that one                      nothing to configure
    a name                          that one                      from the environment
    "auto", BackendKind.AUTO        auto-detection                from the environment
    None                            COBRE_COMM_BACKEND, where     from the environment
                                    unset and "auto" detect

The communicator is returned as it is, so a choice costs nothing after it was made.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cobre_shm.errors import (
    BackendNotAvailable,
    CobreError,
    InitializationFailed,
    InvalidBackend,
)
from cobre_shm.selection.env import unknown_variables
from cobre_shm.selection.kinds import BackendConfig, BackendKind, LocalConfig, MpiConfig
from cobre_shm.selection.registry import BackendSpec, Registry, read_registry
from cobre_shm.selection.variables import BACKEND_VARIABLE, VARIABLES

if TYPE_CHECKING:
    from cobre_shm.communicator import Communicator

__all__ = [
    "Choice",
    "available_backends",
    "choose",
    "create_communicator",
    "detect",
    "start_failure",
]

logger: logging.Logger = logging.getLogger("cobre_shm")


@dataclass(frozen=True)
class Choice:
    """A backend that is available, and why it.

    Attributes:
        spec: The backend.
        reason: What led to it, for people.
        config: Its configuration; None: to be read from the environment.
        passed_over: What would have been chosen before it, if it were available, and why.
    """

    spec: BackendSpec
    reason: str
    config: Any = None
    passed_over: tuple[tuple[BackendSpec, str], ...] = ()


def available_backends() -> list[str]:
    """Return the names of the backends that can be chosen here, the highest priority first."""
    return read_registry().available()


def create_communicator(
    kind: BackendConfig | BackendKind | str | None = None,
) -> Communicator:
    """Choose a backend, start it, and return its communicator.

    Args:
        kind: A configuration (``ShmConfig(...)``), which is all that is then looked at: the
            environment is not read. ``BackendKind.LOCAL`` or ``MPI``, which need none. A name
            (``"shm"``), configured from the environment. ``"auto"`` or ``BackendKind.AUTO``: the
            first backend, by priority, that is installed and finds itself launched. None: what
            ``COBRE_COMM_BACKEND`` says, which is ``auto`` when unset.

    Returns:
        The backend's own communicator: a ``LocalCommunicator``, a ``ShmCommunicator``, ...

    Raises:
        InvalidBackend: No backend of that name is registered.
        BackendNotAvailable: It is registered, but something it requires is not installed.
        MissingConfiguration: Variables that it requires are not set; all of them are listed.
        InitializationFailed: A setting is not valid, or the backend could not start.
        CommError: The backend started and met a failure of its own, such as AllocationFailed.
        TypeError: ``kind`` is none of the above.
    """
    registry = read_registry()
    request = _request(kind)
    if isinstance(request, str | None):
        _warn_of_unknown_variables(registry, os.environ)
    choice = choose(registry, request, os.environ)
    logger.info("communicator backend %s: %s", choice.spec.name, choice.reason)
    _warn_of_passed_over(choice)
    communicator: Communicator = _start(choice, os.environ)
    return communicator


def choose(
    registry: Registry, request: BackendConfig | str | None, env: Mapping[str, str]
) -> Choice:
    """Apply the rule of this module to a configuration, a name, or None.

    Raises:
        InvalidBackend: No backend of that name is registered.
        BackendNotAvailable: It is registered, but something it requires is not installed.
    """
    if request is None:
        name = env.get(BACKEND_VARIABLE, "").strip().lower() or "auto"
        reason = f"{BACKEND_VARIABLE}={name}"
    elif isinstance(request, str):
        name = request.strip().lower()
        reason = "named by the program"
    else:
        spec = _available(registry, request.backend)
        return Choice(spec, f"the program gave a {type(request).__name__}", request)
    if name == "auto":
        return detect(registry, env)
    return Choice(_available(registry, name), reason)


def detect(registry: Registry, env: Mapping[str, str]) -> Choice:
    """Return the first backend, by priority, that is available and finds itself launched."""
    passed_over: list[tuple[BackendSpec, str]] = []
    for spec in registry.specs():
        reason = _reason(spec, env)
        if reason is None:
            continue
        missing = spec.missing()
        if not missing:
            reasons = [f"detected, as {reason}", *(why for _, why in passed_over)]
            return Choice(spec, "; ".join(reasons), passed_over=tuple(passed_over))
        why = f"not {spec.name}, although {reason}: no module {', '.join(missing)}"
        passed_over.append((spec, why))
    raise AssertionError("local is always available and accepts any environment")


def _request(kind: object) -> Any:
    """Reduce what a program may pass to a configuration, a name, or None."""
    if kind is BackendKind.AUTO:
        return "auto"
    if kind is BackendKind.LOCAL:
        return LocalConfig()
    if kind is BackendKind.MPI:
        return MpiConfig()
    if isinstance(kind, BackendKind):
        raise TypeError(
            f"{kind} is used with a configuration: {kind}({kind.value.title()}Config(...)); "
            f"the name {kind.value!r} reads the environment instead"
        )
    if isinstance(kind, str | None):
        return kind
    if is_dataclass(kind) and not isinstance(kind, type) and hasattr(kind, "backend"):
        return kind
    raise TypeError(f"expected a configuration, a BackendKind, a name or None, not {kind!r}")


def _available(registry: Registry, name: str) -> BackendSpec:
    spec = registry.find(name)
    if spec is None:
        failure = registry.failure_of(name)
        if failure is None:
            near = difflib.get_close_matches(name, ["auto", *registry.names()], n=1)
            raise InvalidBackend(name, registry.available(), nearest=next(iter(near), None))
        hint = f"repair its registration {failure.reference} ({failure.reason})"
        raise BackendNotAvailable(name, registry.available(), install_hint=hint)
    missing = spec.missing()
    if missing:
        # Nothing that can be installed brings an implementation that this version lacks.
        hint = "" if spec.implementation in missing else spec.install_hint
        raise BackendNotAvailable(name, registry.available(), install_hint=hint)
    return spec


def _reason(spec: BackendSpec, env: Mapping[str, str]) -> str | None:
    try:
        return spec.detect(env)
    except Exception:
        logger.warning("detection of backend %s failed and is left out", spec.name, exc_info=True)
        return None


def _warn_of_passed_over(choice: Choice) -> None:
    """Say that a group was started which this process does not join."""
    name = choice.spec.name
    for spec, why in choice.passed_over:
        install = f"to use {spec.name}: {spec.install_hint}; " if spec.install_hint else ""
        meant = f"to mean {name}: {BACKEND_VARIABLE}={name}"
        _warn_once(f"communicator backend {name}, {why}; {install}{meant}")


def _warn_of_unknown_variables(registry: Registry, env: Mapping[str, str]) -> None:
    known = {variable.name for variable in VARIABLES}
    if not unknown_variables(env, known):
        return
    # Descriptions of other distributions are loaded only now that one of them may know better.
    known.update(variable.name for spec in registry.specs() for variable in spec.variables)
    unknown = unknown_variables(env, known)
    if unknown:
        described = [
            f"{name} (did you mean {nearest}?)" if nearest else name
            for name, nearest in unknown.items()
        ]
        _warn_once(f"environment variables that nothing reads: {', '.join(described)}")


@lru_cache
def _warn_once(message: str) -> None:
    # A process may make many communicators; its environment stays as it is.
    logger.warning(message)


def start_failure(spec: BackendSpec, error: Exception) -> InitializationFailed:
    """Return the error that stands for a foreign one in ``spec``'s code, which it carries."""
    return InitializationFailed(
        spec.name,
        f"{spec.name.upper()} backend failed to start: {type(error).__name__}: {error}",
        source=error,
    )


def _start(choice: Choice, env: Mapping[str, str]) -> Any:
    spec = choice.spec
    try:
        config = spec.configure(env) if choice.config is None else choice.config
        return spec.open(config)
    except CobreError:
        raise
    except Exception as error:
        raise start_failure(spec, error) from error
