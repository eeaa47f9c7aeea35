"""Where images are kept, and whether one that is found may be executed.

An image is looked for under a name that says for which processor and software it was made; the
hash of all kernel sources stands inside, so that one of older sources is replaced. It is read from
the first of these folders that has it, and written to the first that can be written:

    NUMBA_CACHE_DIR, if set     a folder in it for each place of this package
    beside the kernels          where an installation that nobody writes to may have been filled
    the user's cache            as the first

Whoever can write a file there has it executed here. So only files are read that belong to this
user or to root and that nobody else may write, whatever the folder allows; and what is executed is
the copy whose checksum was compared.

When many ranks start without an image, one compiles, under a lock on a directory, and the others
load what it has written.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from cobre_shm import failpoints
from cobre_shm.native.image import DamagedImage, Image

__all__ = ["SUFFIX", "addresses", "announce", "folders"]

SUFFIX = ".image"
_PACKAGE = Path(__file__).parents[1]
_KERNELS = _PACKAGE / "kernels"
# What images are made of: besides the kernels, what makes them and whose constants they take in.
_SOURCES = ("layout.py", "failpoints.py", "tuning.py", "native/table.py", "native/image.py")
# Settings of numba that change code.
_SETTINGS = (
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_ENABLE_AVX",
    "NUMBA_OPT",
    "NUMBA_LOOP_VECTORIZE",
    "NUMBA_SLP_VECTORIZE",
    "NUMBA_DEBUGINFO",
)
# Longer than to compile takes on a busy machine: who holds it longer was stopped.
_LOCK_SECS, _LOCK_LOOK_SECS = 120.0, 0.02
_CPU_FACTS = (b"vendor_id", b"cpu family", b"model", b"stepping", b"flags")

announce: list[Callable[[], None]] = []
"""Called before kernels are compiled."""


def addresses(group: str) -> dict[str, int]:
    """Return the addresses of a group's functions; load them, or compile them first.

    Args:
        group: One of those of ``cobre_shm.compiler``.
    """
    image = _read(group)
    if image is None:
        with _lock():
            # Somebody else may have compiled it meanwhile.
            image = _read(group) or _compile(group)
    return image.load()


def folders() -> Iterator[Path]:
    """Return where images may be, the first to be looked at first."""
    own = f"kernels_{importlib.util.source_hash(os.fsencode(_KERNELS)).hex()}"
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(chosen) / own
    yield _KERNELS / "__pycache__"
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "numba" / own


def _read(group: str) -> Image | None:
    for folder in folders():
        with suppress(OSError, DamagedImage):
            content = _trusted_content(folder / _file_name(group))
            stamp = _stamp()
            if content.startswith(stamp):
                return Image.from_bytes(content[len(stamp) :])
    return None


def _trusted_content(path: Path) -> bytes:
    """Read a file that is as good as this program.

    Raises:
        OSError: There is none.
    """
    # A pipe in its place has no writer to wait for.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags), "rb") as file:
        facts = os.fstat(file.fileno())
        is_ours = facts.st_uid in (os.geteuid(), 0)
        if not (is_ours and stat.S_ISREG(facts.st_mode)) or facts.st_mode & 0o022:
            raise PermissionError(f"{path} could have been written by others")
        return file.read()


def _compile(group: str) -> Image:
    for call in announce:
        call()
    # By name: numba is imported here and nowhere else on the way to a communicator.
    image: Image = importlib.import_module("cobre_shm.compiler.build").build(group)
    for folder in folders():
        try:
            _write(folder / _file_name(group), _stamp() + image.to_bytes())
        except OSError:
            continue
        break
    # Written nowhere: every process compiles for itself.
    return image


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o644), "wb") as file:
            os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & ~0o022)
            file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the machine-wide compilation lock; it goes with the process.

    The lock is on a directory opened for reading, so a read-only installation has it too. Where it
    cannot be had, it may be compiled twice, which does no harm: images appear whole or not at all.
    """
    fd = os.open(_KERNELS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            _try_to_lock(fd)
        yield
    finally:
        os.close(fd)


def _try_to_lock(fd: int) -> None:
    deadline = time.monotonic() + _LOCK_SECS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_LOOK_SECS)
        else:
            return


@cache
def _stamp() -> bytes:
    paths = [*sorted(_KERNELS.glob("*.py")), *sorted((_PACKAGE / "compiler").glob("*.py"))]
    paths += [_PACKAGE / name for name in _SOURCES]
    return importlib.util.source_hash(b"".join(path.read_bytes() for path in paths))


def _file_name(group: str) -> str:
    return f"{group}.{_circumstances()}{SUFFIX}"


@cache
def _circumstances() -> str:
    """Return a name for all but the sources on which machine code depends."""
    facts = [
        f"{sys.implementation.cache_tag}{sys.abiflags} {sys.version}".encode(),
        *map(_version_file, ("numba", "llvmlite")),
        _cpu(),
        repr([os.environ.get(name) for name in _SETTINGS]).encode(),
    ]
    made_for = importlib.util.source_hash(b"\0".join(facts)).hex()
    return f"{made_for}.failpoints" if failpoints.ENABLED else made_for


def _version_file(package: str) -> bytes:
    """Return what says the version of a package that is not to be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return b""
    try:
        return Path(spec.origin).with_name("_version.py").read_bytes()
    except OSError:
        return b""


def _cpu() -> bytes:
    """Return what the first processor is and can."""
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as file:
            first = file.read(8192).partition(b"\n\n")[0]
    except OSError:
        # A /proc of processes only.
        return Path("/sys/devices/system/cpu/modalias").read_bytes()
    lines = first.splitlines()
    return b"\n".join(line for line in lines if line.split(b"\t")[0].strip() in _CPU_FACTS)
