"""Images of machine code: what is stored, what is trusted, and that nothing else is executed."""

import ctypes
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cobre_shm.compiler.build import build
from cobre_shm.native import cache
from cobre_shm.native.image import DamagedImage, Image
from cobre_shm.native.table import CORE

ROOT = Path(cache.__file__).parents[2]
GROUP = "sum-f8"


@pytest.fixture(scope="module")
def image():
    return build(GROUP)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The one folder for images."""
    monkeypatch.setattr(cache, "folders", lambda: iter([tmp_path / "images"]))
    return tmp_path / "images"


@pytest.fixture
def compilations(monkeypatch, image):
    """The groups that were compiled."""
    groups = []

    class Compiler:
        @staticmethod
        def build(group):
            groups.append(group)
            return image

    monkeypatch.setattr(cache.importlib, "import_module", lambda name: Compiler)
    return groups


def adds(address):
    kinds = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
    a, b, result = np.arange(1000.0), np.full(1000, 0.5), np.zeros(1000)
    function = ctypes.CFUNCTYPE(None, *kinds)(address)
    function(result.ctypes.data, a.ctypes.data, b.ctypes.data, 1000, 0)
    return (result == a + b).all()


def test_stored_image_is_the_same_and_runs(image):
    again = Image.from_bytes(image.to_bytes())
    assert again == image
    assert adds(again.load()[GROUP])


def test_no_byte_of_an_image_can_be_changed_or_lost(image):
    stored = image.to_bytes()
    for position in [*range(0, len(stored), 97), len(stored) - 1]:
        damaged = bytearray(stored)
        damaged[position] ^= 1
        with pytest.raises(DamagedImage):
            Image.from_bytes(bytes(damaged))
        with pytest.raises(DamagedImage):
            Image.from_bytes(stored[:position])


def test_image_calls_nothing_but_python_and_the_system():
    """A kernel that could raise would call abort; numba's run time has no place there at all."""
    cache.addresses(CORE)
    externals = set(cache._read(CORE).externals)
    system = {"clock_gettime", "sched_yield", "syscall", "__errno_location"}
    system |= {"memcpy", "memmove", "memset"}
    assert {name for name in externals if not name.startswith("Py")} <= system


def test_image_is_compiled_once_and_loaded_then(folder, compilations):
    announced = []
    cache.announce.append(lambda: announced.append(True))
    try:
        assert adds(cache.addresses(GROUP)[GROUP])
        assert adds(cache.addresses(GROUP)[GROUP])
    finally:
        cache.announce.clear()
    assert compilations == [GROUP]
    assert announced == [True]
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o133 == 0


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "of older sources"])
def test_image_that_cannot_be_used_is_replaced(folder, compilations, damage):
    cache.addresses(GROUP)
    (path,) = folder.iterdir()
    good = path.read_bytes()
    bad = {
        "truncated": good[:-1],
        "changed": good[:-1] + b"\1",
        "empty": b"",
        "of older sources": b"12345678" + good[8:],
    }[damage]
    path.write_bytes(bad)
    cache.addresses(GROUP)
    assert compilations == [GROUP, GROUP]
    assert path.read_bytes() == good
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("distrust", ["group", "others", "link", "owner", "pipe"])
def test_image_that_others_could_have_written_is_not_executed(folder, compilations, distrust):
    cache.addresses(GROUP)
    (path,) = folder.iterdir()
    good = path.read_bytes()
    if distrust == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root gives files to somebody else")
        os.chown(path, 65534, 65534)
    elif distrust == "pipe":
        path.unlink()
        os.mkfifo(path, 0o644)
    elif distrust == "link":
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")
    else:
        path.chmod(0o664 if distrust == "group" else 0o646)
    cache.addresses(GROUP)
    assert compilations == [GROUP, GROUP]
    # Replaced by one of this user's own.
    facts = path.lstat()
    assert (facts.st_uid, facts.st_mode & 0o177022) == (os.geteuid(), 0o100000)
    assert path.read_bytes() == good


def test_nowhere_to_write_compiles_each_time(tmp_path, monkeypatch, compilations):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "folders", lambda: iter([tmp_path / "file" / "images"]))
    for _ in range(2):
        assert adds(cache.addresses(GROUP)[GROUP])
    assert compilations == [GROUP, GROUP]


def test_filled_folder_that_cannot_be_written_is_used(tmp_path, monkeypatch, compilations):
    """As in a container whose image was filled when it was made."""
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(cache, "folders", lambda: iter([second]))
    cache.addresses(GROUP)
    monkeypatch.setattr(cache, "folders", lambda: iter([first, second]))
    cache.addresses(GROUP)
    assert compilations == [GROUP]
    assert not first.exists()


@pytest.mark.parametrize(
    "variable", ["NUMBA_CPU_NAME=generic", "NUMBA_OPT=1", "NUMBA_ENABLE_AVX=0", "COBRE_FAIL=on"]
)
def test_what_changes_code_changes_the_name(variable):
    name, _, value = variable.partition("=")
    code = "from cobre_shm.native import cache; print(cache._file_name('core'))"
    names = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), **more},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for more in ({}, {"NUMBA_NUM_THREADS": "1"}, {name: value})
    ]
    assert names[0] == names[1] != names[2]


def test_failpoints_are_in_an_image_only_where_they_are_enabled():
    code = (
        "from cobre_shm.compiler import build as module\n"
        "module._SOURCES = [s for s in module._SOURCES if s.__name__ == 'barrier']\n"
        "print(*module.build('core').externals)"
    )
    seen = [
        set(
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONPATH": str(ROOT), "COBRE_FAIL": value},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
        )
        for value in ("", "on")
    ]
    assert seen[1] - seen[0] == {"getpid", "kill"}


def test_kernel_that_could_raise_would_call_abort():
    code = (
        "from cobre_shm.compiler import build as module\n"
        "def claim(ctx, resume):\n"
        "    if ctx[resume]: raise ValueError\n"
        "    return 0\n"
        "module._SOURCES = [claim]\n"
        "print(*module.build('core').externals)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "abort" in done.stdout.split()


START = """
import sys
import numpy as np
import cobre_shm
from cobre_shm.selection.kinds import ShmConfig
with cobre_shm.create_communicator(ShmConfig(name=sys.argv[1], rank=0, size=1)) as comm:
    assert comm.backend == "shm"
    x = np.arange(10.0)
    for op in ("sum", "prod", "min", "max"):
        assert (comm.allreduce(x, op=op) == x).all()
    comm.allgatherv(x)
    comm.broadcast(x)
    comm.barrier_init()()
    comm.allreduce_shared(np.arange(1e5))
print(*sys.modules)
"""


def test_start_with_a_warm_cache_imports_no_numba():
    command = [sys.executable, "-c", START, f"/cobre-test-start-{os.getpid()}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The first may have to compile.
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "cobre_shm.native.entry" in loaded
    assert not loaded & {"numba", "llvmlite", "cobre_shm.compiler", "cobre_shm.kernels.jit"}


def test_a_lock_that_is_not_given_back_is_left_in_the_end(folder, compilations, monkeypatch):
    held = os.open(cache._KERNELS, os.O_RDONLY | os.O_DIRECTORY)
    monkeypatch.setattr(cache, "_LOCK_SECS", 0.1)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cache.addresses(GROUP)
    finally:
        os.close(held)
    assert compilations == [GROUP]
