"""What a backend says about itself, and where such descriptions are found.

A backend is registered by an entry point of the group ``cobre.backends`` whose name is the
backend's and whose object is a :class:`BackendSpec`. A description is loaded when a choice needs
it; the backend itself, with everything it depends on, when it is chosen.

The entry points of other distributions are read when a name, or all of them, are asked for that
are none of ours: reading them takes longer than the rest of a start with a backend that was named.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cobre_shm.selection.variables import Variable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "BackendSpec",
    "Capabilities",
    "RegistrationFailure",
    "Registry",
    "has_module",
    "read_registry",
]

GROUP = "cobre.backends"

# The entry points of this distribution once more. They stand before all others, so that no other
# distribution can take these names, and so that a checkout on PYTHONPATH, which has no metadata,
# knows its own backends. From here on nothing sets them apart.
BUILTIN = {
    "local": "cobre_shm.selection.builtin:LOCAL",
    "shm": "cobre_shm.selection.builtin:SHM",
    "tcp": "cobre_shm.selection.builtin:TCP",
    "mpi": "cobre_shm.selection.builtin:MPI",
}


@dataclass(frozen=True)
class Capabilities:
    """What may be expected of a backend.

    Attributes:
        true_shared_memory: Shared regions have one copy per node.
        detects_peer_loss: The death of a rank is an error on the others at once, not after the
            time limit.
        deterministic_sum: ``allreduce`` adds in rank order, so that its bits do not depend on the
            backend.
    """

    true_shared_memory: bool = False
    detects_peer_loss: bool = False
    deterministic_sum: bool = False


@dataclass(frozen=True)
class BackendSpec:
    """A backend, without the backend.

    Attributes:
        name: Lower case; the value of ``COBRE_COMM_BACKEND`` and the name of the entry point.
        priority: Auto-detection asks the highest first; mpi, tcp, shm and local have 40, 30, 20
            and 0. ``local`` always accepts, so a negative priority means: by name only.
        connect: Takes the configuration and returns the communicator: a callable, or
            ``"module:attribute"``, which is imported when the backend is chosen and whose module
            is then a requirement as well.
        detect: Takes the environment and returns why this backend fits it, or None. It looks at
            the mapping and at nothing else.
        configure: Takes the environment and returns the configuration, or raises
            MissingConfiguration or InitializationFailed.
        requirements: Modules without which the backend is not available. They are searched for
            and not imported.
        install_hint: Command that installs the requirements.
        variables: The ``COBRE_*`` variables that ``configure`` reads.
        capabilities: What may be expected of its communicators.
    """

    name: str
    priority: int
    connect: str | Callable[[Any], Any]
    detect: Callable[[Mapping[str, str]], str | None]
    configure: Callable[[Mapping[str, str]], Any]
    requirements: tuple[str, ...] = ()
    install_hint: str = ""
    variables: tuple[Variable, ...] = ()
    capabilities: Capabilities = Capabilities()

    @property
    def implementation(self) -> str | None:
        """Module of ``connect``, or None where a callable stands."""
        return self.connect.partition(":")[0] if isinstance(self.connect, str) else None

    def missing(self) -> tuple[str, ...]:
        """Return the required modules that cannot be found; empty: the backend is available."""
        required = (*self.requirements, *filter(None, [self.implementation]))
        return tuple(module for module in required if not has_module(module))

    def open(self, config: Any) -> Any:
        """Import what ``connect`` names and return the communicator that it makes."""
        connect = self.connect
        if isinstance(connect, str):
            connect = pkgutil.resolve_name(connect)
        return connect(config)


@dataclass(frozen=True)
class RegistrationFailure:
    """An entry point that could not be used.

    Attributes:
        name: Of the entry point.
        reference: What it points to, ``module:attribute``.
        distribution: Name of the distribution that installed it.
        reason: Why it could not be used.
    """

    name: str
    reference: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """An entry point.

    Attributes:
        name: Of the entry point.
        reference: What it points to, ``module:attribute``.
        load: Imports that.
        distribution: Name of the distribution that installed it.
    """

    name: str
    reference: str
    load: Callable[[], object]
    distribution: str = ""

    @classmethod
    def of(cls, found: EntryPoint) -> Entry:
        """Return what ``importlib.metadata`` has found."""
        distribution = found.dist.name if found.dist is not None else ""
        return cls(found.name, found.value, found.load, distribution)

    @classmethod
    def builtin(cls, name: str) -> Entry:
        """Return one of ``BUILTIN``."""
        reference = BUILTIN[name]
        return cls(name, reference, lambda: pkgutil.resolve_name(reference))

    def failure(self, reason: str) -> RegistrationFailure:
        """Return that it could not be used."""
        return RegistrationFailure(self.name, self.reference, self.distribution, reason)


class Registry:
    """The entry points that there are; each is found, and loaded, when it is asked for."""

    def __init__(self) -> None:
        self._failures: list[RegistrationFailure] = []
        self._loaded: dict[str, BackendSpec | None] = {}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        found = [Entry.builtin(name) for name in BUILTIN]
        try:
            found += _installed()
        except Exception as error:
            damaged = Entry(f"group {GROUP}", "", lambda: None)
            self._failures.append(damaged.failure(f"{type(error).__name__}: {error}"))
        entries: dict[str, Entry] = {}
        for entry in found:
            first = entries.setdefault(entry.name, entry)
            if first.reference != entry.reference:
                reason = f"the name is taken by {first.reference}"
                self._failures.append(entry.failure(reason))
        return entries

    @property
    def failures(self) -> list[RegistrationFailure]:
        """Entry points that could not be used so far. One that fails takes nothing from others."""
        self.names()
        return self._failures

    def names(self) -> list[str]:
        """Return the registered names, whether or not their entry points can be loaded."""
        return list(self._entries)

    def find(self, name: str) -> BackendSpec | None:
        """Return the description of ``name``; None: not registered, or in ``failures``."""
        if name not in self._loaded:
            # Nobody else can have taken one of these.
            entry = Entry.builtin(name) if name in BUILTIN else self._entries.get(name)
            self._loaded[name] = None if entry is None else self._load(entry)
        return self._loaded[name]

    def specs(self) -> list[BackendSpec]:
        """Return all descriptions that can be loaded, the highest priority first."""
        found = [spec for name in self._entries if (spec := self.find(name)) is not None]
        return sorted(found, key=lambda spec: (-spec.priority, spec.name))

    def available(self) -> list[str]:
        """Return the names whose requirements are installed, the highest priority first."""
        return [spec.name for spec in self.specs() if not spec.missing()]

    def failure_of(self, name: str) -> RegistrationFailure | None:
        """Return why ``name`` could not be loaded, or None."""
        return next((failure for failure in self.failures if failure.name == name), None)

    def _load(self, entry: Entry) -> BackendSpec | None:
        try:
            spec = entry.load()
        except (Exception, SystemExit) as error:
            self._failures.append(entry.failure(f"{type(error).__name__}: {error}"))
            return None
        if not isinstance(spec, BackendSpec):
            reason = f"expected a BackendSpec, found {type(spec).__name__}"
        elif spec.name != entry.name or spec.name != spec.name.strip().lower():
            reason = f"the BackendSpec's name {spec.name!r} must equal it, in lower case"
        elif spec.name == "auto":
            reason = "the name stands for auto-detection"
        elif field := _wrong_field(spec):
            reason = f"the BackendSpec's {field} is {getattr(spec, field)!r}"
        else:
            return spec
        self._failures.append(entry.failure(reason))
        return None


def _wrong_field(spec: BackendSpec) -> str:
    """Return the name of a field with which nothing can be done, or nothing."""
    good = {
        "priority": isinstance(spec.priority, int | float),
        "connect": isinstance(spec.connect, str) or callable(spec.connect),
        "detect": callable(spec.detect),
        "configure": callable(spec.configure),
        "requirements": _are(str, spec.requirements),
        "install_hint": isinstance(spec.install_hint, str | None),
        "variables": _are(object, spec.variables)
        and all(isinstance(getattr(each, "name", None), str) for each in spec.variables),
        "capabilities": isinstance(spec.capabilities, Capabilities),
    }
    return next((field for field, is_good in good.items() if not is_good), "")


def _are(kind: type, values: object) -> bool:
    return isinstance(values, tuple | list) and all(isinstance(value, kind) for value in values)


def read_registry() -> Registry:
    """Return the registered backends as they are now; nothing of theirs is imported."""
    return Registry()


def _installed() -> list[Entry]:
    """Find the entry points of all installed distributions, our own included."""
    from importlib.metadata import entry_points

    # Order within a directory of installed distributions is that of the file system.
    found = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    return [Entry.of(entry) for entry in found]


def has_module(name: str) -> bool:
    """Whether ``import name`` would find something; neither it nor its parents are imported."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        # Already imported, by someone who made it without a spec.
        return True
    path = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        path = f"{path}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(path, spec.submodule_search_locations)
    return spec is not None
