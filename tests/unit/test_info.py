"""``python -m cobre_shm.info``: the report, its two forms, and its exit codes."""

import json
import os
import subprocess
import sys
import tempfile
import types
from dataclasses import replace
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import cobre_shm
from cobre_shm import info, limits, machine
from cobre_shm.selection import registry as registry_module
from cobre_shm.selection.builtin import SHM

LAUNCHERS = ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    ours = [name for name in os.environ if name.startswith("COBRE_")]
    for name in (*LAUNCHERS, "MPI_LOCALRANKID", "SLURM_PROCID", *ours):
        monkeypatch.delenv(name, raising=False)


def run_info(capsys, *arguments):
    code = info.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def report_of(capsys, *arguments):
    code, out, _ = run_info(capsys, "--output-format", "json", *arguments)
    return code, json.loads(out)


def test_report_json_has_every_section(capsys):
    code, report = report_of(capsys)
    assert code == 0
    assert report["version"] == cobre_shm.__version__
    assert [backend["name"] for backend in report["backends"]] == ["mpi", "tcp", "shm", "local"]
    assert report["auto"]["backend"] == report["choice"]["backend"] == "local"
    assert report["cpus"]["usable"] >= 1
    assert report["memory"]["total_bytes"] > report["memory"]["available_bytes"] > 0
    assert report["shared_memory"]["size_bytes"] >= report["shared_memory"]["free_bytes"] >= 0
    kernel = {"futex", "futex_waitv", "robust_mutex", "memfd", "pidfd"}
    assert set(report["kernel"]) == kernel
    assert report["packages"]["numpy"]
    assert "removed_segments" not in report


def test_report_requirements_say_which_module_is_absent(capsys, monkeypatch):
    monkeypatch.setattr(registry_module, "has_module", lambda module: module != "mpi4py")
    monkeypatch.setattr("cobre_shm.selection.info.has_module", lambda module: module != "mpi4py")
    mpi = report_of(capsys)[1]["backends"][0]
    assert not mpi["available"]
    assert mpi["implemented"]
    assert mpi["requirements"] == {"numba": True, "posix_ipc": True, "mpi4py": False}
    assert (mpi["feature"], mpi["install"]) == ("mpi", 'pip install "cobre-shm[mpi]"')
    lines = [line.strip() for line in run_info(capsys)[1].splitlines()]
    assert 'mpi      not available: pip install "cobre-shm[mpi]"' in lines
    assert "feature mpi, requires numba found, posix_ipc found, mpi4py not found" in lines


def test_report_shows_detection_and_what_auto_would_take(capsys, monkeypatch):
    monkeypatch.setattr(registry_module, "has_module", lambda module: True)
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("COBRE_COMM_BACKEND", "local")
    report = report_of(capsys)[1]
    assert report["backends"][0]["detected"] == "PMI_RANK is set"
    assert report["auto"] == {"backend": "mpi", "reason": "detected, as PMI_RANK is set"}
    assert report["choice"] == {"backend": "local", "reason": "COBRE_COMM_BACKEND=local"}
    assert report["variables"] == {"COBRE_COMM_BACKEND": "local"}


def test_report_tells_that_a_secret_is_set_and_not_which(capsys, monkeypatch):
    monkeypatch.setenv("COBRE_TCP_SECRET", "open-sesame")
    report = report_of(capsys)[1]
    assert report["variables"] == {"COBRE_TCP_SECRET": "set, not shown"}
    out = run_info(capsys)[1]
    assert "COBRE_TCP_SECRET=set, not shown" in out
    assert "open-sesame" not in out + json.dumps(report)
    monkeypatch.setenv("COBRE_TCP_SECRET", "")
    assert report_of(capsys)[1]["variables"] == {"COBRE_TCP_SECRET": ""}


def test_report_unknown_variables_are_named_without_their_value(capsys, monkeypatch):
    monkeypatch.setenv("COBRE_COMM_BACKND", "a-secret")
    code, out, _ = run_info(capsys)
    assert code == 0
    assert "COBRE_COMM_BACKND: nothing reads it; did you mean COBRE_COMM_BACKEND?" in out
    assert "a-secret" not in out


def test_report_failed_registration_is_shown(capsys, monkeypatch):
    broken = EntryPoint("ring", "no_such_module_anywhere:SPEC", "cobre.backends")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    code, report = report_of(capsys)
    assert code == 0
    assert report["failed_registrations"][0]["name"] == "ring"
    assert "no_such_module_anywhere:SPEC" in run_info(capsys)[1]


@pytest.fixture
def ring(monkeypatch):
    """Register a backend of these fields beside the built-in ones."""

    def register(**fields):
        module = types.ModuleType("ring_spec")
        module.SPEC = replace(SHM, name="ring", connect=print, requirements=(), **fields)
        monkeypatch.setitem(sys.modules, "ring_spec", module)
        entry = EntryPoint("ring", "ring_spec:SPEC", "cobre.backends")
        monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])

    return register


def configure_badly(env):
    raise KeyError("COBRE_RING_SIZE")


@pytest.mark.parametrize(
    ("backend", "fields", "kind", "key"),
    [
        ("rong", {}, "IncompatibleSettings", "available_backends"),
        ("ring", {}, "IncompatibleSettings", "missing_variables"),
        ("ring", {"configure": configure_badly}, "MpiError", "error_code"),
    ],
)
def test_choice_that_would_fail_ends_with_code_four(
    capsys, monkeypatch, ring, backend, fields, kind, key
):
    ring(**fields)
    monkeypatch.setenv("COBRE_COMM_BACKEND", backend)
    code, out, err = run_info(capsys, "--output-format", "json")
    assert code == 4
    error = json.loads(err)
    assert error["kind"] == kind
    assert key in error["context"]
    assert json.loads(out)["choice"] == {"error": error}
    code, out, err = run_info(capsys)
    assert code == 4
    assert f"create_communicator() would fail: {error['message']}" in out
    assert err.startswith(f"error: {error['message']}")


def test_report_detection_that_raises_is_shown(capsys, ring):
    ring(detect=configure_badly)
    code, report = report_of(capsys)
    assert code == 0
    detected = {backend["name"]: backend["detected"] for backend in report["backends"]}
    assert detected["ring"] == "detection failed: KeyError: 'COBRE_RING_SIZE'"


def test_report_backend_without_implementation_is_no_matter_of_installing(capsys, monkeypatch):
    monkeypatch.setattr(registry_module, "has_module", lambda module: module == "numba")
    assert "not part of this version" in run_info(capsys)[1]


def test_module_runs_as_a_program():
    root = Path(cobre_shm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "cobre_shm.info"], capture_output=True, text=True, cwd=root
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"cobre-shm {cobre_shm.__version__}, Python ")


def test_report_that_nobody_reads_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "cobre_shm.info"],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=Path(cobre_shm.__file__).parents[1],
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_report_without_standard_output_is_no_error():
    command = 'exec "$0" -m cobre_shm.info >&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable],
        stderr=subprocess.PIPE,
        cwd=Path(cobre_shm.__file__).parents[1],
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_report_is_shown_where_a_name_is_no_text():
    root = Path(cobre_shm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "cobre_shm.info"],
        env={
            **os.environ,
            "PYTHONIOENCODING": "ascii:strict",
            "COBRE_SHM_NAME": "/aÿ",
            "COBRE_SHM_RANK": "0",
            "COBRE_SHM_SIZE": "1",
        },
        capture_output=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    assert rb"/a\xff" in done.stdout


def test_report_without_the_facts_says_so(capsys, monkeypatch):
    for name in ("memory_bytes", "shared_memory_bytes", "mpi_library", "kernel_cache"):
        monkeypatch.setattr(limits if "memory" in name else machine, name, lambda: None)
    monkeypatch.setattr(info, "_version", lambda package: "1.0")
    monkeypatch.setattr(info, "_segments", lambda: None)
    code, out, _ = run_info(capsys)
    assert code == 0
    assert "none found" in out
    assert "kernel cache none, as no directory for it can be written" in out
    assert "not looked at" in out
    assert "unknown" in out
    assert "Suggestions" not in out


def a_segment(**fields):
    return {
        "name": "/cobre-1",
        "bytes": 4096,
        "user": "alice",
        "creator_pid": 77,
        "living_pid": 0,
        "dead": False,
        "problem": "",
        **fields,
    }


def test_report_text_shows_every_fact(capsys, monkeypatch):
    facts = {
        "memory_bytes": (8 << 30, 6 << 30),
        "memory_limit_bytes": 4 << 30,
        "shared_memory_bytes": (3 << 30, 2 << 30),
        "has_futex": True,
        "has_futex_waitv": False,
        "has_robust_mutex": False,
        "has_memfd": True,
        "has_pidfd": False,
        "mpi_library": "/usr/lib/libmpi.so.40",
        "kernel_cache": (Path("/home/alice/.cache/numba/kernels_1"), 7),
    }
    for name, value in facts.items():
        module = limits if "memory" in name else machine
        monkeypatch.setattr(module, name, lambda value=value: value)
    monkeypatch.setattr(info, "count_cpus", lambda: 3)
    monkeypatch.setattr(info, "cgroup_quota", lambda *_: 2.5)
    monkeypatch.setattr(info.os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(info, "_version", lambda package: "1.0")
    monkeypatch.setattr(
        info,
        "_segments",
        lambda: [
            a_segment(),
            a_segment(name="/cobre-2", living_pid=88),
            a_segment(name="/cobre-3", problem="its version is 99"),
        ],
    )
    lines = run_info(capsys)[1].splitlines()
    for line in (
        "  CPUs         3 (affinity 6, cgroup quota 2.5)",
        "  memory       8 GiB, 6 GiB available, cgroup limit 4 GiB",
        "  /dev/shm     3 GiB, 2 GiB free",
        "  kernel       futex yes, futex_waitv no, robust_mutex no, memfd yes, pidfd no",
        "  MPI library  /usr/lib/libmpi.so.40",
        "  kernel cache 7 images in /home/alice/.cache/numba/kernels_1",
        "  /cobre-1 (4 KiB): dead, made by pid 77 of user alice; --clean removes it",
        "  /cobre-2 (4 KiB): in use by pid 88 of user alice",
        "  /cobre-3 (4 KiB): its version is 99",
        "  local    available",
        "           detection: it fits any environment",
        "           detection: nothing of it in the environment",
    ):
        assert line in lines
    report = report_of(capsys)[1]
    assert report["cpus"] == {"usable": 3, "affinity": 6, "cgroup_quota": 2.5}
    assert report["memory"]["cgroup_limit_bytes"] == 4 << 30
    assert report["kernel"] == {
        "futex": True,
        "futex_waitv": False,
        "robust_mutex": False,
        "memfd": True,
        "pidfd": False,
    }
    assert report["mpi_library"] == "/usr/lib/libmpi.so.40"
    assert report["kernel_cache"]["images"] == 7
    assert report["suggestions"] == []


def test_report_empty_cache_and_absent_numba_are_told_apart(capsys, monkeypatch):
    monkeypatch.setattr(machine, "kernel_cache", lambda: (Path("/cache"), 0))
    monkeypatch.setattr(info, "_version", lambda package: "1.0")
    assert "kernel cache empty, so the first start compiles: /cache" in run_info(capsys)[1]
    monkeypatch.setattr(info, "_version", lambda package: None)
    assert "kernel cache not used, as numba is not installed" in run_info(capsys)[1]


def test_suggestions_can_be_pasted_where_something_is_small(capsys, monkeypatch):
    pytest.importorskip("posix_ipc")
    monkeypatch.setattr(limits, "shared_memory_bytes", lambda: (64 << 20, 60 << 20))
    monkeypatch.setattr(machine, "kernel_cache", lambda: None)
    monkeypatch.setattr(info, "_segments", lambda: [a_segment(dead=True)])
    code, out, _ = run_info(capsys)
    assert code == 0
    shown = [line.strip() for line in out.partition("Suggestions\n")[2].splitlines()]
    own = Path(tempfile.gettempdir(), f"numba-{os.geteuid()}")
    assert shown == [
        "/dev/shm has 60 MiB free, little for shared regions: "
        "mount -o remount,size=1g /dev/shm, or for a container --shm-size=1g",
        f"every process compiles for itself: mkdir -m 700 {own} && export NUMBA_CACHE_DIR={own}",
        "segments of dead runs hold memory: python -m cobre_shm.info --clean",
    ]
    assert report_of(capsys)[1]["suggestions"] == shown
