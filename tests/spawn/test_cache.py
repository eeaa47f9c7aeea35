"""The cache of kernels under the launcher: cold, read-only, corrupt."""

import os
import shutil
import stat
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("spawn", ["zygote"], indirect=True),
]

PROGRAM = "import cobre_shm; cobre_shm.create_communicator().barrier(); print('done')"
COMPILING = b"cobre_shm.spawn: Compiling the kernels; later runs load them from the cache\n"


@pytest.fixture
def installed(spawn):
    """A copy of the package without any cache, and how to launch from it."""
    root = Path(__file__).parents[2]
    home = spawn.folder / "installed"
    for package in ("cobre_shm", "cobre_net"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / package, home / package, ignore=ignored)
    env = {"PYTHONPATH": str(home), "HOME": str(spawn.folder / "home")}
    (spawn.folder / "home").mkdir()
    return home, lambda: spawn.run("-n", 3, "-c", PROGRAM, env=env)


def caches(folder):
    return sorted(path for path in folder.rglob("*.image"))


def test_cold_cache_is_filled_once_with_a_line_that_says_so(installed):
    home, run = installed
    first = run()
    assert (first.returncode, first.stdout) == (0, b"done\n" * 3)
    assert first.stderr == COMPILING
    written = {path: path.stat().st_mtime_ns for path in caches(home)}
    assert written
    second = run()
    assert (second.stdout, second.stderr) == (b"done\n" * 3, b"")
    assert {path: path.stat().st_mtime_ns for path in caches(home)} == written


def test_corrupt_cache_is_made_again(installed):
    home, run = installed
    assert run().returncode == 0
    for path in caches(home):
        path.write_bytes(b"\x9c" * 100)
    done = run()
    assert (done.returncode, done.stdout) == (0, b"done\n" * 3), done.stderr


def test_package_works_from_a_read_only_directory(installed, spawn):
    home, run = installed
    if os.geteuid() == 0:
        # Permissions do not bind root; a folder in place of the cache's does.
        (home / "cobre_shm" / "kernels" / "__pycache__").write_text("no folder")
    else:
        for path in (home, *home.rglob("*")):
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        done = run()
    finally:
        for path in (home, *home.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert (done.returncode, done.stdout) == (0, b"done\n" * 3), done.stderr
