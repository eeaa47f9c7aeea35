"""Virtual environments that hold exactly the named distributions.

The environments are real, and what is tested is really installed by pip. Everything else they
hold (numpy, numba, ...) is linked from the environment of the test run, file for file as it was
installed there: that takes milliseconds, and needs no network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_OUTCOMES = Path(__file__).with_name("outcomes.py")
# As in scripts/mpi-environment, and as newer pips say it.
_NO_NETWORK = (
    r"^.*(NewConnectionError|NameResolutionError|ConnectTimeout|name resolution|unreachable"
    r"|Connection refused).*$"
)
_PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE", "cobre_shm", "cobre_net")


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        base = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "venv", vars=base))

    def link(self, *names: str) -> None:
        """Make distributions of the test run available."""
        for name in names:
            found = distribution(name)
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                link = self.site_packages / top
                if not link.exists():
                    link.symlink_to(Path(str(found.locate_file(top))))

    def install(self, *wheels: Path) -> None:
        """Install wheels by pip, without a look at the index and without their dependencies."""
        run_pip("--python", self.python, "install", "--no-index", "--no-deps", *wheels)
        _copy_compiled_kernels(self.site_packages)

    def install_with_extras(self, wheel: Path, extras: str, folder: Path) -> None:
        """Install a wheel, and what of its extras is absent, from ``folder`` and the index."""
        options = ("--find-links", folder, "--only-binary", ":all:")
        run_pip("--python", self.python, "install", *options, f"{wheel}[{extras}]")
        _copy_compiled_kernels(self.site_packages)

    def has_what_is_required(self) -> None:
        """Fail where a distribution lacks a dependency."""
        run_pip("--python", self.python, "check")

    def run(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = ("-I",),
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python with nothing else in its own environment than ``env``."""
        return subprocess.run(
            [self.python, *flags, *arguments],
            env={"PATH": os.defpath, "HOME": str(self.folder), **(env or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def outcomes(self, environments: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        """Call ``create_communicator()`` once in each of the environments (see outcomes.py)."""
        done = self.run(_OUTCOMES, json.dumps(environments))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def make_environment(folder: Path) -> Environment:
    """Make an empty virtual environment."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    return Environment(folder)


def build_wheels(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Build each source tree's wheel by pip; the trees stay as they are."""
    copies = []
    for source in sources:
        copy = folder / source.name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        if source == ROOT:
            copy.mkdir()
            for name in _PROJECT_FILES:
                item = source / name
                if item.is_dir():
                    shutil.copytree(item, copy / name, ignore=ignore)
                else:
                    shutil.copy(item, copy)
        else:
            shutil.copytree(source, copy, ignore=ignore)
        copies.append(copy)
    out = folder / "wheels"
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    run_pip("wheel", *options, *copies)
    return sorted(out.glob("*.whl"))


def download_wheel(requirement: str, folder: Path) -> Path:
    """Fetch one wheel from the package index; skip where that cannot be reached."""
    options = ("--no-deps", "--only-binary", ":all:", "--dest", folder)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    # Two attempts of ten seconds, where pip alone would try for minutes without a network.
    patience = ("--retries", "1", "--timeout", "10")
    done = subprocess.run(
        [*command, *patience, requirement], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        if line := re.search(_NO_NETWORK, done.stderr, re.MULTILINE):
            pytest.skip(f"no {requirement}, the package index cannot be reached: {line[0]}")
        pytest.fail(f"no {requirement} from the package index: {done.stderr}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_pip(*arguments: str | Path) -> None:
    """Run the test run's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _copy_compiled_kernels(site_packages: Path) -> None:
    # The cache knows sources by their content, so it serves every copy of them.
    kernels = site_packages / "cobre_shm" / "kernels"
    if kernels.is_dir():
        cache = kernels / "__pycache__"
        cache.mkdir(exist_ok=True)
        for compiled in (ROOT / "cobre_shm" / "kernels" / "__pycache__").glob("*.nb?"):
            shutil.copy(compiled, cache)
