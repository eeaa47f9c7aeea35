"""What the distributions hold. ``scripts/install-check`` installs and tries them."""

import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.selection.environments import ROOT

# What git ignores, and git itself; a checkout has whatever its owner made in it besides.
IGNORED = shutil.ignore_patterns(
    *("__pycache__", "*.py[cod]", "*.nb[ci]", "*.egg-info", ".git", ".venv", "build", "dist"),
    *(".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache"),
    *(".benchmarks", "bench-results"),
)
KEPT = (".ci", "bench", "cobre_net", "cobre_shm", "scripts", "tests")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    for item in ROOT.iterdir():
        if item.name in KEPT:
            shutil.copytree(item, source / item.name, ignore=IGNORED)
        elif item.suffix in (".md", ".toml", ".in") or item.name == "LICENSE":
            shutil.copy(item, source)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    built = ("egg-info", "build/")
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    return names, {name for name in files if not any(word in name for word in built)}


def test_source_distribution_is_the_repository(sdist):
    held, files = sdist
    assert sorted(files - held) == []
    assert {"tests/unit/test_layout.py", "bench/peers.py", "scripts/test", ".ci/run"} <= held


def test_wheel_holds_the_packages_and_nothing_else(wheels):
    names = zipfile.ZipFile(wheels["cobre_shm"]).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cobre_shm", "cobre_net"}
    assert "cobre_shm/py.typed" in names
    assert any(name.startswith("cobre_shm/sddp/cases/") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_source_distribution_has_whatever_git_has(sdist):
    """A new folder at the top must be named in MANIFEST.in, and above."""
    held, _ = sdist
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--full-name"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no git")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    known = {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert "pyproject.toml" in known
    # What tells git what to leave out is of no use without it.
    assert sorted(known - held - {".gitignore"}) == []
