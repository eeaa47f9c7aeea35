"""What is installed, what the machine offers, and what would be chosen: for bug reports.

``python -m cobre_shm.info`` shows it to people, ``--output-format json`` to programs, and
``--clean`` first removes the shared memory segments of runs that are dead.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cobre_shm
from cobre_shm import limits, machine
from cobre_shm.command_line import BAD_BACKEND, Parser, while_somebody_reads
from cobre_shm.cpus import cgroup_quota, count_cpus
from cobre_shm.errors import BackendError
from cobre_shm.selection.info import describe_selection
from cobre_shm.units import bytes_text

__all__ = ["collect", "main"]

_PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "posix_ipc",
    "mpi4py",
    "highspy",
    "pyarrow",
    "rich",
    "mcp",
)
# The default of containers is 64 MiB; half of the memory is that of Linux.
_SMALL_SHARED_MEMORY = 256 << 20
_ROOMY_SHARED_MEMORY = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 4 when ``create_communicator()`` would fail here, the error on standard error; 141 when
        nobody reads the report.
    """
    parser = Parser(
        prog="python -m cobre_shm.info",
        description="Show what is installed, what the machine offers, and what would be chosen.",
        epilog="Exit code 4: create_communicator() would fail here.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output-format", choices=("text", "json"), default="text", help="default: text"
    )
    parser.add_argument("--clean", action="store_true", help="remove segments of dead runs")
    options = parser.parse_args(argv)
    return while_somebody_reads(lambda: _show(options))


def _show(options: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names may be of any bytes.
        sys.stdout.reconfigure(errors="backslashreplace")
    removed = _clean() if options.clean else None
    report, error = collect()
    if removed is not None:
        report["removed_segments"] = removed
    as_json = options.output_format == "json"
    print(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report)))
    if error is None:
        return 0
    print(json.dumps(error.to_dict()) if as_json else f"error: {error}", file=sys.stderr)
    return BAD_BACKEND


def collect() -> tuple[dict[str, Any], BackendError | None]:
    """Return the report as JSON-serialisable data, and the error that a choice would end in."""
    selection, error = describe_selection(os.environ)
    memory, shared = limits.memory_bytes(), limits.shared_memory_bytes()
    cache = machine.kernel_cache()
    report = {
        "version": cobre_shm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        **selection,
        "cpus": {
            "usable": count_cpus(),
            "affinity": len(os.sched_getaffinity(0)),
            "cgroup_quota": cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")),
        },
        "memory": {
            "total_bytes": memory and memory[0],
            "available_bytes": memory and memory[1],
            "cgroup_limit_bytes": limits.memory_limit_bytes(),
        },
        "shared_memory": {
            "path": "/dev/shm",
            "size_bytes": shared and shared[0],
            "free_bytes": shared and shared[1],
        },
        "kernel": {
            "futex": machine.has_futex(),
            "futex_waitv": machine.has_futex_waitv(),
            "robust_mutex": machine.has_robust_mutex(),
            "memfd": machine.has_memfd(),
            "pidfd": machine.has_pidfd(),
        },
        "mpi_library": machine.mpi_library(),
        "kernel_cache": {
            "directory": cache and str(cache[0]),
            "images": cache[1] if cache else 0,
        },
        "segments": _segments(),
    }
    return {**report, "suggestions": list(_suggestions(report))}, error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _segments() -> list[dict[str, Any]] | None:
    """Segments of the shm backend; None where they cannot be read."""
    try:
        from cobre_shm.segment.leftovers import find_segments

        found = find_segments()
    except (ImportError, OSError):
        return None
    return [
        {
            "name": segment.name,
            "bytes": segment.nbytes,
            "user": segment.user,
            "creator_pid": segment.creator,
            "living_pid": segment.living,
            "dead": segment.is_dead,
            "problem": segment.problem,
        }
        for segment in found
    ]


def _clean() -> list[str]:
    found = _segments() or []
    if not found:
        return []
    from cobre_shm.segment.leftovers import remove_if_dead

    return [segment["name"] for segment in found if remove_if_dead(segment["name"])]


def _suggestions(report: dict[str, Any]) -> Iterator[str]:
    """What would help here, each with a command to be pasted."""
    shared, cache, segments = report["shared_memory"], report["kernel_cache"], report["segments"]
    # Where they cannot be read there is no shm backend, or no /dev/shm, to suffer from.
    if segments is None:
        return
    free = shared["free_bytes"]
    if free is not None and free < _SMALL_SHARED_MEMORY:
        from cobre_shm.segment.posix import how_to_enlarge

        enough = max(_ROOMY_SHARED_MEMORY, 2 * shared["size_bytes"])
        yield f"{shared['path']} has {bytes_text(free)} free, little for shared regions: " + (
            how_to_enlarge(enough)
        )
    if cache["directory"] is None:
        own = Path(tempfile.gettempdir(), f"numba-{os.geteuid()}")
        # A folder that somebody else made there first is not to be used.
        make = f"mkdir -m 700 {own} && export NUMBA_CACHE_DIR={own}"
        yield f"every process compiles for itself: {make}"
    if any(segment["dead"] for segment in segments):
        yield "segments of dead runs hold memory: python -m cobre_shm.info --clean"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    packages = [f"{name} {value}" for name, value in report["packages"].items() if value]
    yield f"cobre-shm {report['version']}, Python {report['python']}, {report['platform']}"
    yield f"with {', '.join(packages)}"
    yield ""
    yield "Backends, the highest priority first"
    for backend in report["backends"]:
        yield f"  {backend['name']:<8} {_availability(backend)}"
        feature = f"feature {backend['feature']}, " if backend["feature"] else ""
        needs = [
            f"{module} {'found' if found else 'not found'}"
            for module, found in backend["requirements"].items()
        ]
        yield f"  {'':<8} {feature}requires {', '.join(needs) or 'nothing'}"
        yield f"  {'':<8} detection: {backend['detected'] or 'nothing of it in the environment'}"
    for failure in report["failed_registrations"]:
        owner = f" of {failure['distribution']}" if failure["distribution"] else ""
        yield f"  {failure['name']:<8} registration {failure['reference']}{owner} cannot be used:"
        yield f"  {'':<8} {failure['reason']}"
    yield ""
    yield "Choice"
    yield f"  auto would take {report['auto']['backend']}: {report['auto']['reason']}"
    choice = report["choice"]
    if "error" in choice:
        yield f"  create_communicator() would fail: {choice['error']['message']}"
    else:
        yield f"  create_communicator() takes {choice['backend']}: {choice['reason']}"
    for name, value in report["variables"].items():
        yield f"  {name}={value}"
    for name, nearest in report["unknown_variables"].items():
        yield f"  {name}: nothing reads it" + (f"; did you mean {nearest}?" if nearest else "")
    yield ""
    yield "Machine"
    yield from _machine_lines(report)
    yield ""
    yield "Shared memory segments"
    for name in report.get("removed_segments", ()):
        yield f"  {name}: removed, its run was dead"
    yield from _segment_lines(report["segments"])
    if report["suggestions"]:
        yield ""
        yield "Suggestions"
    for suggestion in report["suggestions"]:
        yield f"  {suggestion}"


def _availability(backend: dict[str, Any]) -> str:
    if backend["available"]:
        return "available"
    if not backend["implemented"]:
        return "not part of this version"
    install = f": {backend['install']}" if backend["install"] else ""
    return f"not available{install}"


def _machine_lines(report: dict[str, Any]) -> Iterator[str]:
    cpus, memory, shared = report["cpus"], report["memory"], report["shared_memory"]
    quota = "none" if cpus["cgroup_quota"] is None else f"{cpus['cgroup_quota']:g}"
    yield f"  CPUs         {cpus['usable']} (affinity {cpus['affinity']}, cgroup quota {quota})"
    limit = memory["cgroup_limit_bytes"]
    yield (
        f"  memory       {bytes_text(memory['total_bytes'])}, "
        f"{bytes_text(memory['available_bytes'])} available, "
        f"cgroup limit {'none' if limit is None else bytes_text(limit)}"
    )
    yield (
        f"  {shared['path']:<12} {bytes_text(shared['size_bytes'])}, "
        f"{bytes_text(shared['free_bytes'])} free"
    )
    features = [f"{name} {'yes' if has else 'no'}" for name, has in report["kernel"].items()]
    yield f"  kernel       {', '.join(features)}"
    yield f"  MPI library  {report['mpi_library'] or 'none found'}"
    cache = report["kernel_cache"]
    stored = f"{cache['images']} images in {cache['directory']}"
    if not report["packages"]["numba"]:
        stored = "not used, as numba is not installed"
    elif cache["directory"] is None:
        stored = "none, as no directory for it can be written"
    elif not cache["images"]:
        stored = f"empty, so the first start compiles: {cache['directory']}"
    yield f"  kernel cache {stored}"


def _segment_lines(segments: list[dict[str, Any]] | None) -> Iterator[str]:
    if segments is None:
        yield "  not looked at: the shm backend is not available, or /dev/shm cannot be read"
    elif not segments:
        yield "  none"
    for segment in segments or ():
        owner = f"of user {segment['user']}"
        maker = f"made by pid {segment['creator_pid']} " if segment["creator_pid"] else ""
        state = f"dead, {maker}{owner}; --clean removes it"
        if segment["problem"]:
            state = segment["problem"]
        elif segment["living_pid"]:
            state = f"in use by pid {segment['living_pid']} {owner}"
        yield f"  {segment['name']} ({bytes_text(segment['bytes'])}): {state}"


if __name__ == "__main__":
    sys.exit(main())
