"""Facts about the machine, read from files as the kernel writes them."""

import ctypes
import errno
import os
import sys
from pathlib import Path

import pytest

from cobre_shm import limits, machine
from cobre_shm.native import cache

ROOT = Path(machine.__file__).parents[1]


def test_memory_is_read_in_bytes(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16 kB\nMemFree: 1 kB\nMemAvailable:    8 kB\nHuge: 0\n")
    assert limits.memory_bytes(meminfo) == (16384, 8192)


@pytest.mark.parametrize("text", ["", "MemTotal: 16 kB\n", "MemTotal: x kB\n", "MemTotal:\n"])
def test_memory_unreadable_is_unknown(tmp_path, text):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(text)
    assert limits.memory_bytes(meminfo) is None
    assert limits.memory_bytes(tmp_path / "absent") is None


def make_groups(tmp_path, membership, files):
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "fs" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def groups(tmp_path, membership, **files):
    make_groups(tmp_path, membership, files)
    return limits.memory_limit_bytes(tmp_path / "cgroup", tmp_path / "fs")


def test_memory_limit_is_the_tightest_of_all_ancestors(tmp_path):
    files = {
        "memory_dot_max": "max\n",
        "job__memory_dot_max": "1000\n",
        "job__step__memory_dot_max": "4000\n",
    }
    assert groups(tmp_path, "0::/job/step\n", **files) == 1000


def test_memory_limit_of_a_container_is_at_the_root_of_the_mount(tmp_path):
    assert groups(tmp_path, "0::/docker/0af3\n", memory_dot_max="2000\n") == 2000


def test_memory_limit_of_the_older_interface_is_read(tmp_path):
    limit = "memory__job__memory_dot_limit_in_bytes"
    membership = "4:cpu,cpuacct:/\n3:memory:/job\n"
    assert groups(tmp_path, membership, **{limit: "3000\n"}) == 3000
    assert groups(tmp_path, membership, **{limit: "9223372036854771712\n"}) is None


def test_memory_limit_absent_or_damaged_is_none(tmp_path):
    assert limits.memory_limit_bytes(tmp_path / "absent", tmp_path) is None
    assert groups(tmp_path, "nonsense\n") is None
    assert groups(tmp_path, "0::/\n", memory_dot_max="max\n") is None


def available(tmp_path, membership, **files):
    make_groups(tmp_path, membership, files)
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 8 kB\n")
    places = (tmp_path / name for name in ("meminfo", "cgroup", "fs"))
    return limits.available_bytes(*places)


def test_available_memory_is_what_the_limit_leaves_beside_what_is_used(tmp_path):
    job = {
        "job__memory_dot_max": "5000\n",
        "job__memory_dot_current": "4000\n",
        "job__memory_dot_stat": "anon 1000\ninactive_file 900\nactive_file 600\n"
        "total_inactive_file 9\n",
    }
    assert available(tmp_path, "0::/\n") == 8192
    assert available(tmp_path, "0::/job/step\n", **job) == 2500
    # Of a child with a limit of its own, the tighter of the two counts.
    step = {"job__step__memory_dot_max": "3000\n", "job__step__memory_dot_current": "2900\n"}
    assert available(tmp_path, "0::/job/step\n", **job, **step) == 100
    used = {"job__memory_dot_current": "9000\n"}
    assert available(tmp_path, "0::/job\n", **{**job, **used}) == 0


def test_available_memory_of_the_older_interface_counts_what_is_used(tmp_path):
    files = {
        "memory__job__memory_dot_limit_in_bytes": "3000\n",
        "memory__job__memory_dot_usage_in_bytes": "2000\n",
        "memory__job__memory_dot_stat": "inactive_file 7\ntotal_inactive_file 300\n"
        "total_active_file 200\n",
        "memory__memory_dot_limit_in_bytes": "9223372036854771712\n",
    }
    assert available(tmp_path, "3:memory:/job\n", **files) == 1500


def test_available_memory_that_nothing_tells_is_unknown(tmp_path):
    absent = tmp_path / "absent"
    assert limits.available_bytes(absent, absent, absent) is None
    make_groups(tmp_path, "0::/\n", {"memory_dot_max": "2000\n", "memory_dot_stat": "damaged\n"})
    assert limits.available_bytes(absent, tmp_path / "cgroup", tmp_path / "fs") == 2000


def test_shared_memory_of_an_absent_mount_is_unknown(tmp_path):
    assert limits.shared_memory_bytes(tmp_path / "absent") is None


def test_shared_memory_is_that_of_the_file_system(tmp_path):
    usage = os.statvfs(tmp_path)
    size, free = limits.shared_memory_bytes(tmp_path)
    assert size == usage.f_blocks * usage.f_frsize
    assert 0 < free <= size


def test_shared_memory_without_a_limit_is_that_of_the_machine(monkeypatch):
    class Unlimited:
        f_blocks = f_bavail = 0
        f_frsize = 4096

    monkeypatch.setattr(limits.os, "statvfs", lambda path: Unlimited)
    monkeypatch.setattr(limits, "memory_bytes", lambda: (16384, 8192))
    assert limits.shared_memory_bytes() == (16384, 8192)


def test_kernel_features_that_the_shm_backend_needs_are_seen_here():
    assert machine.has_futex()
    assert machine.has_robust_mutex()
    assert machine.has_memfd()


def test_futex_refused_by_the_system_is_told(monkeypatch):
    from cobre_shm.segment import libc

    class Refusing:
        def syscall(self, *args):
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr(libc, "_LIBC", Refusing())
    assert not machine.has_futex()
    assert not machine.has_futex_waitv()


def test_robust_mutex_that_stays_locked_is_told(monkeypatch):
    from cobre_shm.segment import libc

    monkeypatch.setattr(machine, "_THREAD_EXIT_SECS", 0.0)
    monkeypatch.setattr(libc.RobustMutex, "try_lock", lambda self: False)
    assert not machine.has_robust_mutex()


def test_robust_mutex_refused_by_the_system_is_told(monkeypatch):
    from cobre_shm.segment import libc

    def refuse(self):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(libc.RobustMutex, "initialise", refuse)
    assert not machine.has_robust_mutex()


def test_memfd_refused_by_the_system_is_told(monkeypatch):
    def refuse(name):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(machine.os, "memfd_create", refuse)
    assert not machine.has_memfd()


def test_mpi_library_of_the_environment_comes_first(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libmpi.so.40"
    library.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libmpi.so.12")
    assert machine.mpi_library() == str(library)
    library.unlink()
    assert machine.mpi_library() == "libmpi.so.12"


@pytest.mark.parametrize("chosen", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_kernel_cache_is_where_images_are(tmp_path, monkeypatch, chosen):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv(chosen, str(tmp_path))
    monkeypatch.setattr(cache, "_KERNELS", tmp_path / "file")
    (tmp_path / "file").touch()
    folder, images = machine.kernel_cache()
    assert (folder.is_relative_to(tmp_path), images) == (True, 0)
    folder.mkdir(parents=True)
    (folder / f"core{cache.SUFFIX}").touch()
    assert machine.kernel_cache() == (folder, 1)


def test_kernel_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "_KERNELS", tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert machine.kernel_cache() is None
