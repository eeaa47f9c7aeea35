"""Registration: which entry points are taken, and what a description says."""

import dataclasses
import sys
import tomllib
import types
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import cobre_shm
from cobre_shm.selection.builtin import LOCAL, MPI, SHM, TCP
from cobre_shm.selection.registry import BUILTIN, GROUP, BackendSpec, has_module, read_registry

PYPROJECT = Path(cobre_shm.__file__).parents[1] / "pyproject.toml"


def spec(name="ring", **changes):
    fields = {
        "name": name,
        "priority": 35,
        "connect": lambda config: config,
        "detect": lambda env: None,
        "configure": lambda env: None,
    }
    return BackendSpec(**{**fields, **changes})


@pytest.fixture
def register(monkeypatch):
    """Put objects behind entry points: name -> object; a name may stand several times."""

    def register(*entries):
        module = types.ModuleType("third_party_specs")
        found = []
        for number, (name, obj) in enumerate(entries):
            setattr(module, f"spec{number}", obj)
            found.append(EntryPoint(name, f"third_party_specs:spec{number}", GROUP))
        monkeypatch.setitem(sys.modules, "third_party_specs", module)
        monkeypatch.setattr(metadata, "entry_points", lambda group: found)
        return read_registry()

    return register


def test_builtin_references_equal_the_declared_entry_points():
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"][GROUP]
    assert declared == BUILTIN


def test_builtin_priorities_are_in_the_specified_order():
    assert [spec.name for spec in (MPI, TCP, SHM, LOCAL)] == ["mpi", "tcp", "shm", "local"]
    assert MPI.priority > TCP.priority > SHM.priority > LOCAL.priority


def test_registry_without_metadata_knows_the_builtin_backends(register):
    registry = register()
    assert registry.specs() == [MPI, TCP, SHM, LOCAL]
    assert registry.failures == []


def test_registry_with_own_metadata_has_each_backend_once(monkeypatch):
    installed = [EntryPoint(name, reference, GROUP) for name, reference in BUILTIN.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: installed)
    registry = read_registry()
    assert registry.specs() == [MPI, TCP, SHM, LOCAL]
    assert registry.failures == []


def test_registry_orders_third_party_by_its_priority(register):
    registry = register(("ring", spec()), ("last", spec("last", priority=-1)))
    assert [spec.name for spec in registry.specs()] == [
        "mpi",
        "ring",
        "tcp",
        "shm",
        "local",
        "last",
    ]


def test_find_loads_nothing_but_the_named_entry(register):
    registry = register(("ring", "not a spec"))
    assert registry.find("local") is LOCAL
    assert registry.failures == []
    assert registry.find("ring") is None
    assert [failure.name for failure in registry.failures] == ["ring"]


@pytest.mark.parametrize(
    ("name", "obj"),
    [
        ("ring", "not a spec"),
        ("ring", BackendSpec),
        ("ring", spec("other")),
        ("Ring", spec("Ring")),
        ("auto", spec("auto")),
        ("ring", spec(priority="high")),
        ("ring", spec(connect=None)),
        ("ring", spec(detect="here")),
        ("ring", spec(requirements=None)),
        ("ring", spec(requirements=("numba", None))),
        ("ring", spec(install_hint=3)),
        ("ring", spec(requirements="numba")),
        ("ring", spec(variables=None)),
        ("ring", spec(variables=("COBRE_RING",))),
    ],
)
def test_registry_unusable_object_is_recorded_and_harms_nobody(register, name, obj):
    registry = register((name, obj))
    assert registry.specs() == [MPI, TCP, SHM, LOCAL]
    assert [failure.name for failure in registry.failures] == [name]
    assert registry.failure_of(name).reference == "third_party_specs:spec0"


def test_registry_fields_that_can_be_worked_with_are_taken(register):
    kind = spec(priority=25.5, requirements=["sys"], variables=[], install_hint=None)
    registry = register(("ring", kind))
    assert registry.find("ring") is kind
    assert registry.available().index("tcp") < registry.available().index("ring")


def test_registry_entry_that_raises_is_recorded_once(monkeypatch):
    broken = EntryPoint("ring", "no_such_module_anywhere:SPEC", GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    registry = read_registry()
    registry.specs()
    registry.specs()
    assert [failure.reason for failure in registry.failures] == [
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    ]


def test_registry_entry_that_exits_is_recorded(register, tmp_path, monkeypatch):
    (tmp_path / "leaving_spec.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    leaving = EntryPoint("ring", "leaving_spec:SPEC", GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [leaving])
    registry = read_registry()
    assert registry.find("ring") is None
    assert registry.failures[0].reason == "SystemExit: 3"


def test_registry_third_party_cannot_take_a_builtin_name(register):
    registry = register(("local", spec("local")))
    assert registry.find("local") is LOCAL
    assert registry.failures[0].name == "local"
    assert BUILTIN["local"] in registry.failures[0].reason


def test_registry_two_claims_on_one_name_keep_the_first_and_record_the_other(register):
    first, second = spec(), spec(priority=1)
    registry = register(("ring", first), ("ring", second))
    assert registry.find("ring") is first
    assert [failure.reference for failure in registry.failures] == ["third_party_specs:spec1"]


def test_registry_damaged_metadata_leaves_the_builtin_backends(monkeypatch):
    def damaged(group):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(metadata, "entry_points", damaged)
    registry = read_registry()
    assert registry.specs() == [MPI, TCP, SHM, LOCAL]
    assert "UnicodeDecodeError" in registry.failures[0].reason


def test_available_excludes_what_misses_a_requirement(register):
    registry = register(
        ("ring", spec(requirements=("json",))),
        ("gone", spec("gone", requirements=("json", "no_such_module_anywhere"))),
    )
    assert "ring" in registry.available()
    assert "gone" not in registry.available()
    assert registry.find("gone").missing() == ("no_such_module_anywhere",)


def test_missing_counts_the_module_of_the_implementation():
    absent = spec(connect="cobre_shm.no_such_module:Ring", requirements=("json",))
    assert absent.missing() == ("cobre_shm.no_such_module",)
    assert dataclasses.replace(absent, connect="json:loads").missing() == ()


def test_open_resolves_the_reference_and_passes_the_configuration():
    assert spec(connect="json:loads").open("[1, 2]") == [1, 2]


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("json", True),
        ("json.decoder", True),
        ("json.no_such_module", False),
        ("json.decoder.deeper", False),
        ("no_such_module_anywhere", False),
        ("no_such_module_anywhere.deeper", False),
    ],
)
def test_has_module_tells_what_import_would_find(name, present):
    assert has_module(name) is present


def test_has_module_imports_neither_module_nor_parent(tmp_path, monkeypatch):
    package = tmp_path / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / "inside.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert has_module("heavy_package.inside")
    assert not has_module("heavy_package.outside")
    assert "heavy_package" not in sys.modules


def test_has_module_takes_a_module_without_spec_as_present(monkeypatch):
    stub = types.ModuleType("stub_without_spec")
    monkeypatch.setitem(sys.modules, "stub_without_spec", stub)
    assert has_module("stub_without_spec")
