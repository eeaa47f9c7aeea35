"""The cache of kernels under the launcher, where reductions alone are missing: half a second each.

``test_cache.py`` has the same with none at all, which takes too long for every run.
"""

import os
import shutil
from importlib.util import source_hash
from pathlib import Path

import pytest

from cobre_shm.native import cache

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)

PROGRAM = (
    "import numpy as np, cobre_shm\n"
    "comm = cobre_shm.create_communicator()\n"
    "print(comm.allreduce(np.ones(3)).tolist())"
)
RIGHT = b"[3.0, 3.0, 3.0]\n" * 3
COMPILING = b"cobre_shm.spawn: Compiling the kernels; later runs load them from the cache\n"


@pytest.fixture
def installed(spawn):
    """A copy of the package with the largest image alone, and how to launch from it."""
    home, user = spawn.folder / "installed", spawn.folder / "home"
    user.mkdir()
    for package in ("cobre_shm", "cobre_net"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(cache.__file__).parents[2] / package, home / package, ignore=ignored)
    own = home / "cobre_shm" / "kernels" / "__pycache__"
    own.mkdir()
    # Of each place, the first last: it is the one that counts.
    for folder in reversed(list(cache.folders())):
        for image in folder.glob("core.*.image"):
            shutil.copy(image, own)
    env = {"PYTHONPATH": str(home), "HOME": str(user), "NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": ""}
    return own, lambda: spawn.run("-n", 3, "-c", PROGRAM, env=env)


def reductions(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*.image")
        if not path.name.startswith("core.")
    }


def test_missing_reductions_are_made_once_with_a_line_that_says_so(installed):
    own, run = installed
    core = {path: path.stat().st_mtime_ns for path in own.iterdir()}
    first = run()
    assert (first.returncode, first.stdout) == (0, RIGHT), first.stderr
    assert first.stderr == COMPILING
    # Those of the others were as good as before.
    assert {path: path.stat().st_mtime_ns for path in core} == core
    written = reductions(own)
    assert any(path.name.startswith("sum-f8.") for path in written)
    second = run()
    assert (second.stdout, second.stderr) == (RIGHT, b"")
    assert reductions(own) == written


def test_damaged_reduction_is_made_again(installed):
    own, run = installed
    assert run().returncode == 0
    (path,) = own.glob("sum-f8.*.image")
    others = {each: facts for each, facts in reductions(own).items() if each != path}
    # What would run: a byte of its code is another.
    content = bytearray(path.read_bytes())
    content[-4000] ^= 0xFF
    path.write_bytes(content)
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, RIGHT, COMPILING)
    now = reductions(own)
    assert now.pop(path)[1] != bytes(content)
    assert now == others


def test_reductions_go_to_the_users_cache_where_the_package_cannot_be_written(installed, spawn):
    own, run = installed
    # Permissions do not bind root; a file in the place of the folder does.
    own.rename(spawn.folder / "core")
    own.write_text("no folder")
    name = f"kernels_{source_hash(os.fsencode(own.parent)).hex()}"
    users = spawn.folder / "home" / ".cache" / "numba" / name
    shutil.copytree(spawn.folder / "core", users)
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, RIGHT, COMPILING)
    assert own.read_text() == "no folder"
    assert any(path.name.startswith("sum-f8.") for path in reductions(users))
    assert run().stderr == b""
