"""Whether ranks can be run here, for ``--doctor``: what was looked at, and what to change.

The facts are those of ``cobre_shm.info``, with the limits of this process. The last check is the
one that counts: a launcher starts the ranks, and they meet in one barrier.

    ok     nothing to do
    note   it works, but slower or with less than elsewhere
    bad    it does not work; the exit code is then 4
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cobre_shm import layout
from cobre_shm.info import collect
from cobre_shm.spawn.descriptors import descriptors_of
from cobre_shm.spawn.program import interpreter
from cobre_shm.units import bytes_text

__all__ = ["Check", "examine", "has_passed", "to_json", "to_text"]

_BARRIER_SECS = 120
_BARRIER = "import cobre_shm\nwith cobre_shm.create_communicator() as comm: comm.barrier()"
# Read by a process itself, without the kernel's help.
_FAST_CLOCKS = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page")
_LOST = {
    "futex": "a rank that waits sleeps in steps and wakes late",
    "futex_waitv": "a rank that waits wakes ten times a second to look for deaths",
    "robust_mutex": "the death of a rank is found in the process table, five times a second",
    "memfd": "everything needs room in /dev/shm",
    "pidfd": "the launcher sees ends of ranks by SIGCHLD",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: Of the thing.
        verdict: ``ok``, ``note`` or ``bad``.
        found: How it is.
        advice: What to do about it, or None.
    """

    name: str
    verdict: str
    found: str
    advice: str | None = None


def examine(size: int, backend: str) -> Iterator[Check]:
    """Look at everything that a run of so many ranks needs.

    Args:
        size: Number of ranks on this machine.
        backend: In which they would meet, ``shm`` or ``tcp``.
    """
    report, _ = collect()
    yield _installed(report, backend)
    yield _cpus(report["cpus"], size)
    if backend == "shm":
        yield _shared_memory(report, size)
    yield _kernel(report["kernel"])
    yield _descriptors(size)
    yield _processes(size)
    yield _clock()
    yield _cache(report["kernel_cache"])
    yield _mpi(report)
    yield _leftovers(report["segments"])
    yield _barrier(size, backend)


def has_passed(checks: list[Check]) -> bool:
    """Whether nothing is bad."""
    return all(check.verdict != "bad" for check in checks)


def to_text(check: Check) -> str:
    """Return the lines for people."""
    line = f"{check.verdict:<5} {check.name:<14} {check.found}"
    return line if check.advice is None else f"{line}\n{'':<21}{check.advice}"


def to_json(checks: list[Check]) -> dict[str, Any]:
    """Return what can be serialised as JSON."""
    return {"passed": has_passed(checks), "checks": [asdict(check) for check in checks]}


def _installed(report: Mapping[str, Any], backend: str) -> Check:
    (spec,) = (each for each in report["backends"] if each["name"] == backend)
    found = f"backend {backend} of cobre-shm {report['version']}, Python {report['python']}"
    if spec["available"]:
        return Check("installed", "ok", found)
    return Check("installed", "bad", f"{found}: not available", spec["install"])


def _cpus(cpus: Mapping[str, Any], size: int) -> Check:
    usable = cpus["usable"]
    found = f"{usable} for {size} ranks (affinity {cpus['affinity']}"
    found += ")" if cpus["cgroup_quota"] is None else f", cgroup quota {cpus['cgroup_quota']:g})"
    if size <= usable:
        return Check("CPUs", "ok", found)
    return Check("CPUs", "note", found, "ranks will take turns; -n auto starts one for each CPU")


def _shared_memory(report: Mapping[str, Any], size: int) -> Check:
    from cobre_shm.segment.posix import how_to_enlarge

    needed = layout.segment_bytes(size, layout.DEFAULT_SLOT_BYTES)
    free, total = (report["shared_memory"][name] for name in ("free_bytes", "size_bytes"))
    found = f"{bytes_text(free)} free, {bytes_text(needed)} needed, without shared regions"
    if free is None:
        return Check("/dev/shm", "note", found, "what /dev/shm has cannot be told: is it mounted?")
    if free >= needed:
        return Check("/dev/shm", "ok", found)
    advice = how_to_enlarge(total + needed)
    if report["kernel"]["memfd"]:
        return Check("/dev/shm", "note", f"{found}; memory without a name serves instead", advice)
    return Check("/dev/shm", "bad", found, advice)


def _kernel(features: Mapping[str, bool]) -> Check:
    missing = [name for name, has in features.items() if not has]
    mode = _status("Seccomp")
    found = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in features.items())
    found += "; a seccomp filter is active" if mode == "2" else ""
    if not missing:
        return Check("kernel", "ok", found)
    lost = "; ".join(f"without {name}, {_LOST[name]}" for name in missing)
    filtered = "; a container's filter can allow them (--security-opt)" if mode == "2" else ""
    return Check("kernel", "note", found, lost + filtered)


def _descriptors(size: int) -> Check:
    needed = descriptors_of(size)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{needed} needed by the launcher, {_limit(hard)} allowed"
    if hard == resource.RLIM_INFINITY or needed <= hard:
        return Check("open files", "ok", found)
    return Check("open files", "bad", found, f"raise the hard limit: ulimit -Hn {needed}")


def _processes(size: int) -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    found = f"{_limit(soft)} of this user allowed, {size} ranks wanted"
    if soft == resource.RLIM_INFINITY or size < soft:
        return Check("processes", "ok", found)
    # Only the barrier knows: root has no limit, and others have processes already.
    return Check("processes", "note", found, f"raise the limit: ulimit -u {4 * size}")


def _clock() -> Check:
    path = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    try:
        source = path.read_text().strip()
    except OSError:
        return Check("clock", "ok", "the kernel does not say which")
    if source in _FAST_CLOCKS:
        return Check("clock", "ok", source)
    advice = "each reading is a system call, which waits notice; see clocksource= of the kernel"
    return Check("clock", "note", source, advice)


def _cache(cache: Mapping[str, Any]) -> Check:
    if cache["directory"] is None:
        advice = "every process compiles for itself: export NUMBA_CACHE_DIR=DIRECTORY"
        return Check("kernel cache", "note", "no directory for it can be written", advice)
    stored = f"{cache['images']} images" if cache["images"] else "empty, the start compiles"
    return Check("kernel cache", "ok", f"{stored}: {cache['directory']}")


def _mpi(report: Mapping[str, Any]) -> Check:
    package, library = report["packages"]["mpi4py"], report["mpi_library"]
    found = f"mpi4py {package or 'not installed'}, library {library or 'none found'}"
    if package and not library:
        advice = "MPI is not needed here; for the backend mpi: pip install mpich"
        return Check("MPI", "note", found, advice)
    return Check("MPI", "ok", found)


def _leftovers(segments: list[dict[str, Any]] | None) -> Check:
    dead = [each for each in segments or () if each["dead"]]
    found = f"{len(dead)} of dead runs, {len(segments or ()) - len(dead)} others"
    if not dead:
        return Check("segments", "ok", found)
    advice = "to remove them: python -m cobre_shm.info --clean"
    return Check("segments", "note", found, advice)


def _barrier(size: int, backend: str) -> Check:
    began = time.monotonic()
    done = subprocess.run(
        [
            *(*interpreter(), "-m", "cobre_shm.spawn", "--backend", backend),
            *("-n", str(size), "--timeout", str(_BARRIER_SECS), "-c", _BARRIER),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    took = f"{time.monotonic() - began:.1f} s"
    if done.returncode == 0:
        return Check("a barrier", "ok", f"{size} ranks were started, met and ended in {took}")
    words = done.stderr.decode(errors="backslashreplace").splitlines()
    return Check(
        "a barrier",
        "bad",
        f"{size} ranks did not meet, code {done.returncode} after {took}",
        words[-1] if words else None,
    )


def _status(name: str) -> str | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
    return None


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)
