"""Wheels and environments, made once a test run."""

from __future__ import annotations

from importlib.metadata import distributions, version
from pathlib import Path

import pytest

from tests.selection.environments import (
    ROOT,
    Environment,
    build_wheels,
    download_wheel,
    make_environment,
)

HERE = Path(__file__).parent
SHM_FEATURE = ("numpy", "numba", "llvmlite", "posix_ipc")
SDDP_FEATURE = ("highspy", "pyarrow", "rich", "markdown-it-py", "mdurl", "pygments")


def is_installed(name: str) -> bool:
    return next(iter(distributions(name=name)), None) is not None


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
def mpi4py_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mpi4py as users get it: its wheel needs no MPI library to be installed."""
    return download_wheel("mpi4py>=4.1,<5", tmp_path_factory.mktemp("mpi4py_wheel"))


@pytest.fixture(scope="session")
def mpi4py_without_library(
    tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path], mpi4py_wheel: Path
) -> Environment:
    """The plain install and mpi4py, on a machine where it finds no MPI."""
    environment = make_environment(tmp_path_factory.mktemp("mpi4py_without_library"))
    environment.link(*SHM_FEATURE)
    environment.install(wheels["cobre_shm"], mpi4py_wheel)
    if environment.run("-c", "from mpi4py import MPI").returncode == 0:
        pytest.skip("this machine has an MPI library, which mpi4py finds")
    return environment


@pytest.fixture(scope="session")
def everything(
    tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path], mpi4py_wheel: Path
) -> Environment:
    """All extras; what the test run has of them is linked, pip brings the rest."""
    environment = make_environment(tmp_path_factory.mktemp("everything"))
    environment.link(*SHM_FEATURE, *(name for name in SDDP_FEATURE if is_installed(name)))
    environment.install_with_extras(wheels["cobre_shm"], "all", mpi4py_wheel.parent)
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
