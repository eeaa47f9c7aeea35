"""Which backend is chosen: the rule against an independent restatement, and every way to ask."""

import dataclasses
import itertools
import json
import logging
import os
import sys
import types
from importlib import metadata
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from cobre_shm import create_communicator
from cobre_shm.errors import (
    AllocationFailed,
    BackendNotAvailable,
    InitializationFailed,
    InvalidBackend,
    InvalidRoot,
    MissingConfiguration,
)
from cobre_shm.local import LocalCommunicator
from cobre_shm.selection import factory
from cobre_shm.selection import registry as registry_module
from cobre_shm.selection.factory import available_backends, choose, detect
from cobre_shm.selection.kinds import BackendKind, LocalConfig, MpiConfig, ShmConfig, TcpConfig
from cobre_shm.selection.registry import BackendSpec, read_registry

FEATURES = ("mpi", "tcp", "shm")
MODULES = {
    "mpi": ("posix_ipc", "mpi4py", "cobre_net.mpi"),
    "tcp": ("cobre_net.tcp",),
    "shm": ("posix_ipc", "cobre_shm.shm"),
}
# The table of the specification, written out once more on purpose.
LAUNCHER_VARIABLES = (
    "PMI_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "MPI_LOCALRANKID",
    "SLURM_PROCID",
)
SUBSETS = [subset for count in range(4) for subset in itertools.combinations(FEATURES, count)]
SHM_ENV = {"COBRE_SHM_NAME": "run", "COBRE_SHM_RANK": "0", "COBRE_SHM_SIZE": "1"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, *filter(lambda key: key.startswith("COBRE_"), os.environ)):
        monkeypatch.delenv(name, raising=False)
    factory._warn_once.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Make exactly these features look installed."""

    def install(*features):
        present = {"numba", *(module for name in features for module in MODULES[name])}
        monkeypatch.setattr(registry_module, "has_module", present.__contains__)
        return read_registry()

    return install


@pytest.fixture
def register(monkeypatch):
    """Register one more backend, ``ring``, with these fields."""

    def register(**changes):
        fields = {
            "name": "ring",
            "priority": 35,
            "connect": lambda config: config,
            "detect": lambda env: None,
            "configure": lambda env: "configured",
            **changes,
        }
        module = types.ModuleType("ring_spec")
        module.SPEC = BackendSpec(**fields)
        monkeypatch.setitem(sys.modules, "ring_spec", module)
        entry = EntryPoint("ring", "ring_spec:SPEC", "cobre.backends")
        monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])

    return register


def expected_backend(features, env):
    """The rule of auto-detection, restated."""
    if "mpi" in features and any(env.get(name) for name in LAUNCHER_VARIABLES):
        return "mpi"
    if "tcp" in features and env.get("COBRE_TCP_COORDINATOR"):
        return "tcp"
    if "shm" in features and env.get("COBRE_SHM_NAME"):
        return "shm"
    return "local"


@pytest.mark.parametrize("features", SUBSETS, ids="+".join)
@pytest.mark.parametrize("launcher", [None, *LAUNCHER_VARIABLES])
@pytest.mark.parametrize("coordinator", [None, "node-1"])
@pytest.mark.parametrize("segment", [None, "run"])
def test_auto_chooses_by_the_rule(install, features, launcher, coordinator, segment):
    env = {"COBRE_TCP_COORDINATOR": coordinator, "COBRE_SHM_NAME": segment, launcher: "0"}
    env = {name: value for name, value in env.items() if name and value}
    assert detect(install(*features), env).spec.name == expected_backend(features, env)


@pytest.mark.parametrize("empty", [*LAUNCHER_VARIABLES, "COBRE_TCP_COORDINATOR", "COBRE_SHM_NAME"])
def test_auto_empty_variable_counts_as_unset(install, empty):
    assert detect(install(*FEATURES), {empty: ""}).spec.name == "local"


def test_auto_reason_names_what_was_seen_and_what_was_passed_over(install):
    choice = detect(install("shm"), {"PMI_RANK": "0", "COBRE_SHM_NAME": "run"})
    assert choice.spec.name == "shm"
    assert "COBRE_SHM_NAME is set" in choice.reason
    assert "not mpi, although PMI_RANK is set: no module mpi4py" in choice.reason


@pytest.mark.parametrize("features", SUBSETS, ids="+".join)
@pytest.mark.parametrize("value", ["local", "shm", "tcp", "mpi", " SHM\n", "Local"])
def test_named_backend_is_chosen_or_not_available(install, features, value):
    registry = install(*features)
    name = value.strip().lower()
    # What auto-detection would find does not matter to a name.
    env = {"COBRE_COMM_BACKEND": value, "PMI_RANK": "0", "COBRE_TCP_COORDINATOR": "node-1"}
    if name == "local" or name in features:
        assert choose(registry, None, env).spec.name == name
        assert choose(registry, value, {}).spec.name == name
        return
    for request, seen in ((None, env), (value, {})):
        with pytest.raises(BackendNotAvailable) as caught:
            choose(registry, request, seen)
        assert caught.value.requested == name
        assert caught.value.available == [*features, "local"]
        assert caught.value.context["build_features"] == list(features)


@pytest.mark.parametrize("value", [None, "", "  ", "auto", " AUTO "])
def test_backend_variable_unset_or_auto_detects(install, value):
    env = {"COBRE_SHM_NAME": "run"}
    if value is not None:
        env["COBRE_COMM_BACKEND"] = value
    assert choose(install(*FEATURES), None, env).spec.name == "shm"


def test_auto_asked_for_by_the_program_overrides_the_variable(install):
    env = {"COBRE_COMM_BACKEND": "local", "COBRE_SHM_NAME": "run"}
    assert choose(install(*FEATURES), "auto", env).spec.name == "shm"


@pytest.mark.parametrize(
    ("value", "nearest"), [("shn", "shm"), ("locl", "local"), ("atuo", "auto"), ("quantum", None)]
)
def test_unknown_backend_lists_the_available_and_the_nearest(install, value, nearest):
    with pytest.raises(InvalidBackend) as caught:
        choose(install("tcp"), None, {"COBRE_COMM_BACKEND": value})
    assert caught.value.requested == value
    assert caught.value.available == ["tcp", "local"]
    meant = f"Did you mean '{nearest}'? " if nearest else ""
    assert caught.value.suggestion == (
        f"{meant}Set COBRE_COMM_BACKEND to one of: auto, tcp, local."
    )


@pytest.mark.parametrize("absent", ["numba", "posix_ipc", "mpi4py"])
def test_backend_without_its_requirements_names_the_extra(monkeypatch, absent):
    monkeypatch.setattr(registry_module, "has_module", lambda module: module != absent)
    with pytest.raises(BackendNotAvailable) as caught:
        choose(read_registry(), "mpi", {})
    assert 'pip install "cobre-shm[mpi]"' in caught.value.suggestion


def test_backend_without_implementation_promises_nothing_from_an_install(monkeypatch):
    monkeypatch.setattr(registry_module, "has_module", lambda module: module == "numba")
    with pytest.raises(BackendNotAvailable) as caught:
        choose(read_registry(), "mpi", {})
    assert "pip" not in caught.value.suggestion


def test_broken_registration_is_not_available_and_says_why(monkeypatch):
    entry = EntryPoint("ring", "no_such_module_anywhere:SPEC", "cobre.backends")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    with pytest.raises(BackendNotAvailable) as caught:
        choose(read_registry(), "ring", {})
    assert "no_such_module_anywhere" in caught.value.suggestion
    assert type(create_communicator()) is LocalCommunicator


@pytest.mark.parametrize(
    "kind", [None, "auto", BackendKind.AUTO, " Local ", BackendKind.LOCAL, LocalConfig()]
)
def test_create_returns_the_concrete_class(kind):
    with create_communicator(kind) as comm:
        assert type(comm) is LocalCommunicator


def test_create_configures_from_the_environment_by_name(install, monkeypatch, register):
    register(configure=lambda env: env["COBRE_RING_SIZE"])
    monkeypatch.setenv("COBRE_RING_SIZE", "5")
    assert create_communicator("ring") == "5"


def test_create_detects_a_third_party_before_lower_priorities(monkeypatch, register):
    register(detect=lambda env: "it felt like it", priority=25)
    monkeypatch.setenv("COBRE_SHM_NAME", "run")
    assert create_communicator() == "configured"


@pytest.mark.parametrize("priority", [50, 35, 25, 10, -1])
@pytest.mark.parametrize("features", SUBSETS, ids="+".join)
def test_auto_asks_a_third_party_in_its_place(register, install, priority, features):
    register(detect=lambda env: "the ring is here", priority=priority)
    env = {"PMI_RANK": "0", "COBRE_TCP_COORDINATOR": "node-1", "COBRE_SHM_NAME": "run"}
    places = {50: "ring", 40: "mpi", 35: "ring", 30: "tcp", 25: "ring", 20: "shm", 10: "ring"}
    fitting = {"ring", "local", *features}
    expected = next(
        (
            name
            for place, name in places.items()
            if name in fitting and (name != "ring" or place == priority)
        ),
        "local",
    )
    assert detect(install(*features), env).spec.name == expected


def test_create_detection_that_raises_is_left_out(register, caplog):
    def detect(env):
        raise KeyError("COBRE_RING_SIZE")

    register(detect=detect)
    assert type(create_communicator()) is LocalCommunicator
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ShmConfig("run", 0, 1), "shm"),
        (TcpConfig("node-1", 0, 1), "tcp"),
        (MpiConfig(), "mpi"),
        (LocalConfig(), "local"),
    ],
)
def test_choose_takes_a_configuration_as_it_is(install, config, name):
    choice = choose(install(*FEATURES), config, None)
    assert (choice.spec.name, choice.config) == (name, config)


@pytest.mark.parametrize("kind", [ShmConfig("run", 0, 1), TcpConfig("a", 0, 1), BackendKind.MPI])
def test_create_configuration_of_absent_backend_is_not_available(install, kind):
    install()
    with pytest.raises(BackendNotAvailable):
        create_communicator(kind)


def test_create_passes_the_given_configuration_to_the_backend(register):
    def configure(env):
        raise AssertionError("the environment was read")

    @dataclasses.dataclass(frozen=True)
    class RingConfig:
        backend = "ring"

    register(configure=configure)
    config = RingConfig()
    assert create_communicator(config) is config


class Untouchable(dict):
    """An environment that notices every look."""

    def _refuse(self, *args):
        raise AssertionError("the environment was touched")

    get = __getitem__ = __setitem__ = __delitem__ = __iter__ = __contains__ = _refuse
    keys = values = items = pop = update = copy = __len__ = _refuse


@pytest.mark.parametrize("kind", [LocalConfig(), BackendKind.LOCAL])
def test_create_with_configuration_leaves_the_environment_alone(monkeypatch, kind):
    monkeypatch.setattr(factory.os, "environ", Untouchable())
    communicator = create_communicator(kind)
    monkeypatch.undo()
    assert type(communicator) is LocalCommunicator


@pytest.mark.parametrize("kind", [BackendKind.TCP, BackendKind.SHM])
def test_create_kind_without_its_configuration_is_refused(kind):
    with pytest.raises(TypeError, match="Config"):
        create_communicator(kind)


@pytest.mark.parametrize("kind", [3, b"local", ShmConfig, {"backend": "local"}])
def test_create_anything_else_is_refused(kind):
    with pytest.raises(TypeError, match="BackendKind"):
        create_communicator(kind)


def test_create_communicator_for_communicator_is_refused():
    with pytest.raises(TypeError), create_communicator("local") as comm:
        create_communicator(comm)


def test_create_several_kinds_live_side_by_side(register):
    register(connect=lambda config: LocalCommunicator())
    with create_communicator("ring") as one, create_communicator(LocalConfig()) as other:
        one.close()
        assert other.allreduce(np.ones(2)).tolist() == [1.0, 1.0]


def test_create_logs_choice_and_reason_once(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="cobre_shm")
    monkeypatch.setenv("COBRE_COMM_BACKEND", "local")
    create_communicator()
    assert [(record.name, record.levelname) for record in caplog.records] == [("cobre_shm", "INFO")]
    assert "local" in caplog.text
    assert "COBRE_COMM_BACKEND=local" in caplog.text


def test_create_unknown_variables_are_warned_of_once(caplog, monkeypatch):
    monkeypatch.setenv("COBRE_COMM_BACKND", "shm")
    monkeypatch.setenv("COBRE_SHN_RANK", "0")
    for _ in range(3):
        create_communicator()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "COBRE_COMM_BACKND (did you mean COBRE_COMM_BACKEND?)" in warnings[0]
    assert "COBRE_SHN_RANK (did you mean COBRE_SHM_RANK?)" in warnings[0]


def test_create_group_that_is_not_joined_is_warned_of_once(install, caplog, monkeypatch):
    install()
    monkeypatch.setenv("PMI_RANK", "1")
    for _ in range(3):
        create_communicator().close()
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "local, not mpi, although PMI_RANK is set: no module" in warning
    assert 'to use mpi: pip install "cobre-shm[mpi]"' in warning
    assert "to mean local: COBRE_COMM_BACKEND=local" in warning
    caplog.clear()
    create_communicator("local").close()
    assert caplog.records == []


def test_create_variables_of_a_third_party_are_known(caplog, monkeypatch, register):
    variable = types.SimpleNamespace(name="COBRE_RING_SIZE")
    register(variables=(variable,))
    monkeypatch.setenv("COBRE_RING_SIZE", "3")
    create_communicator()
    assert caplog.records == []


def test_create_missing_variables_come_before_anything_is_opened(install, register):
    def connect(config):
        raise AssertionError("opened")

    register(connect=connect, configure=ShmConfig.from_env)
    with pytest.raises(MissingConfiguration) as caught:
        create_communicator("ring")
    assert caught.value.missing_vars == list(SHM_ENV)


@pytest.mark.parametrize(
    "error",
    [OSError(111, "Connection refused"), ImportError("libmpi.so"), RuntimeError(""), KeyError("x")],
)
def test_create_foreign_failure_becomes_initialization_failed(register, error):
    def connect(config):
        raise error

    register(connect=connect)
    with pytest.raises(InitializationFailed) as caught:
        create_communicator("ring")
    assert caught.value.backend == "ring"
    assert caught.value.source is error
    assert caught.value.__cause__ is error
    assert caught.value.context["error_code"] == (getattr(error, "errno", None) or 0)
    assert type(error).__name__ in caught.value.message
    json.dumps(caught.value.to_dict())


def test_create_failing_import_of_implementation_becomes_initialization_failed(register):
    register(connect="json:no_such_attribute")
    with pytest.raises(InitializationFailed) as caught:
        create_communicator("ring")
    assert isinstance(caught.value.source, AttributeError)


@pytest.mark.parametrize(
    "error",
    [
        AllocationFailed(8, "no space"),
        InvalidRoot(1, 1),
        InitializationFailed("ring", "no"),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
)
def test_create_own_errors_and_interrupts_pass_unchanged(register, error):
    def connect(config):
        raise error

    register(connect=connect)
    with pytest.raises(type(error)) as caught:
        create_communicator("ring")
    assert caught.value is error


def test_available_backends_are_in_order_of_priority(install):
    install("shm", "mpi")
    assert available_backends() == ["mpi", "shm", "local"]
