"""The names of the package, and what importing it costs."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cobre_shm

ROOT = Path(cobre_shm.__file__).parents[1]


def loaded_after(statement):
    """Top-level modules, and modules of ours, in a fresh interpreter after ``statement``."""
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", cobre_shm.__all__)
def test_public_name_is_what_its_module_defines(name):
    value = getattr(cobre_shm, name)
    home = cobre_shm._MODULE_OF.get(name)
    if home is not None:
        assert value is getattr(importlib.import_module(f"cobre_shm.{home}"), name)
        assert value.__doc__


def test_public_names_are_the_same_for_type_checkers():
    tree = ast.parse(Path(cobre_shm.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If)).body
    declared = {alias.asname: f"{node.module}" for node in guarded for alias in node.names}
    lazy = {name: f"cobre_shm.{module}" for name, module in cobre_shm._MODULE_OF.items()}
    assert declared == lazy


def test_public_names_are_listed_by_dir():
    assert dir(cobre_shm) == cobre_shm.__all__


@pytest.mark.parametrize("name", ["jit", "sddp", "spawn"])
def test_package_for_use_by_its_name_needs_no_import_of_its_own(name):
    assert f"cobre_shm.{name}" in loaded_after(f"import cobre_shm\ncobre_shm.{name}")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        cobre_shm.no_such_name  # noqa: B018 - the look-up is what is tested


def test_import_of_the_package_loads_neither_numpy_nor_numba():
    assert not {"numpy", "numba"} & loaded_after("import cobre_shm")


@pytest.mark.parametrize(
    "module", ["env", "variables", "values", "kinds", "launchers", "registry", "builtin", "factory"]
)
def test_import_of_selection_loads_no_backend(module):
    loaded = loaded_after(f"import cobre_shm.selection.{module}")
    assert not {"numpy", "numba", "posix_ipc", "mpi4py"} & loaded
    assert not {"cobre_shm.local", "cobre_shm.shm", "cobre_net"} & loaded


def test_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == cobre_shm.__version__
