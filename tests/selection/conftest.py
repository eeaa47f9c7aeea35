"""Wheels and environments, made once a test run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.selection.environments import ROOT, Environment, build_wheels, make_environment

HERE = Path(__file__).parent
SHM_FEATURE = ("numpy", "numba", "llvmlite", "posix_ipc")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels of the project and of two third parties, by the first words of their names."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.fail('wheels are built with setuptools 77 or later: pip install -e ".[test]"')
    sources = [ROOT, HERE / "third_party_backend", HERE / "broken_backend"]
    built = build_wheels(sources, tmp_path_factory.mktemp("wheels"))
    return {path.name.partition("-")[0]: path for path in built}


@pytest.fixture(scope="session")
def numpy_alone(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """The test and CI profile: no feature."""
    environment = make_environment(tmp_path_factory.mktemp("numpy_alone"))
    environment.link("numpy")
    environment.install(wheels["cobre_shm"])
    return environment


@pytest.fixture(scope="session")
def wheel_profile(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """The plain install."""
    environment = make_environment(tmp_path_factory.mktemp("wheel_profile"))
    environment.link(*SHM_FEATURE)
    environment.install(wheels["cobre_shm"])
    return environment


@pytest.fixture(scope="session")
def third_party(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """The plain install, one distribution with a backend, and one with broken registrations."""
    environment = make_environment(tmp_path_factory.mktemp("third_party"))
    environment.link(*SHM_FEATURE)
    environment.install(
        wheels["cobre_shm"], wheels["cobre_spool_backend"], wheels["cobre_broken_backend"]
    )
    return environment
