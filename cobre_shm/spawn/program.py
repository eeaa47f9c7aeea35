"""What a rank runs, checked before anything starts: one message instead of one per rank."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cobre_shm.spawn.errors import InvalidArguments, ProgramNotFound, ProgramNotRunnable

__all__ = ["DEFAULT_PROGRAM", "Program", "interpreter", "resolve_program"]

DEFAULT_PROGRAM = ("-m", "cobre_shm.sddp")


@dataclass(frozen=True)
class Program:
    """What each rank runs.

    Attributes:
        words: What stands behind ``python``: ``-m MODULE ...``, ``-c CODE ...``, ``- ...`` or
            ``PROGRAM ...``; or a command of its own.
        is_python: Whether an interpreter runs it.
        source: The program itself, where it is read from standard input; every rank's standard
            input is then that.
    """

    words: list[str]
    is_python: bool = True
    source: bytes | None = None

    @property
    def command(self) -> list[str]:
        """The command line of one rank."""
        return [*interpreter(), *self.words] if self.is_python else self.words


# Where these are others than ours, ranks do not find what we would.
_PLACES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")

# Finds a module exactly as ``python -m`` would, parents imported, and says nothing else.
_PROBE = """
import importlib.util, sys
name = sys.argv[1]
try:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(name + ".__main__")
        name += ".__main__"
except ModuleNotFoundError as error:
    spec, name = None, error.name or name
except (ImportError, ValueError):
    if name.strip(".") == name:
        raise
    spec = None
if spec is None:
    sys.stdout.write(f"\\0No module named '{name}'")
"""


def interpreter() -> list[str]:
    """Return the command of a fresh interpreter with the -X, -W and similar flags of this one."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # It knows some of the -X options only.
    for name, value in sys._xoptions.items():
        option = name if value is True else f"{name}={value}"
        if option not in flags:
            flags += ["-X", option]
    return [sys.executable, *flags]


def resolve_program(
    words: Sequence[str], *, environment: Mapping[str, str], is_python: bool = True
) -> Program:
    """Return the program that the words name.

    Args:
        words: ``-m MODULE args...``, ``-c CODE args...``, ``- args...`` for a program on our
            standard input, which is read here, ``PROGRAM args...``, or nothing, which means the
            training program with its shipped case.
        environment: Of the ranks, which find modules and commands by it.
        is_python: Whether they are for an interpreter; otherwise they are any command.

    Raises:
        InvalidArguments: ``-m`` or ``-c`` stands last, or there is no command.
        ProgramNotFound: There is no such module, file or command.
        ProgramNotRunnable: The file is not one that can be run.
    """
    if not is_python:
        if not words:
            raise InvalidArguments("--no-python needs a command")
        _check_command(words[0], environment)
        return Program(list(words), is_python=False)
    if not words:
        words = DEFAULT_PROGRAM
    flag = words[0]
    if flag in ("-m", "-c"):
        if len(words) == 1:
            what = "the name of a module" if flag == "-m" else "the code to run"
            raise InvalidArguments(f"{flag} needs {what}")
        if flag == "-m":
            _check_module(words[1], environment)
    elif flag == "-":
        return Program(list(words), source=_read_standard_input())
    else:
        _check_file(flag)
    return Program(list(words))


def _read_standard_input() -> bytes:
    try:
        with open(0, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise ProgramNotRunnable(
            f"The program cannot be read from standard input: {error.strerror}"
        ) from None


def _check_command(name: str, environment: Mapping[str, str]) -> None:
    # Only now, as below: it imports what packs archives.
    import shutil

    context = {"program": name}
    if shutil.which(name, path=environment.get("PATH", os.defpath)) is not None:
        return
    if "/" in name and Path(name).exists():
        raise ProgramNotRunnable(f"{name!r} is not executable", context=context)
    raise ProgramNotFound(f"There is no command {name!r}", context=context)


def _check_module(name: str, environment: Mapping[str, str]) -> None:
    # What a finder raises for a parent that is not imported is its own affair; see below.
    with contextlib.suppress(Exception):
        is_found_alike = all(environment.get(each) == os.environ.get(each) for each in _PLACES)
        if is_found_alike and _is_runnable(name):
            return
    # A package may extend its __path__, or a finder may need the parents imported: only a fresh
    # interpreter knows. This costs its start-up, but only on the way to an error or for ranks with
    # another PYTHONPATH.
    probe = subprocess.run(
        [*interpreter(), "-c", _PROBE, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        check=False,
    )
    # What comes before the mark was written by what was imported.
    _, mark, why = probe.stdout.rpartition(b"\0")
    if probe.returncode == 0 and mark:
        raise ProgramNotFound(
            why.decode(errors="replace"),
            context={"module": name},
            suggestion="-m takes a module or a package that has a __main__",
        )


def _is_runnable(name: str) -> bool:
    """Whether the module can be found without importing any parent, which may be heavy."""
    path: Sequence[str] | None = None
    names = name.split(".")
    for depth in range(1, len(names) + 2):
        full = ".".join(names[:depth]) if depth <= len(names) else f"{name}.__main__"
        for finder in sys.meta_path:
            spec = finder.find_spec(full, path) if hasattr(finder, "find_spec") else None
            if spec is not None:
                break
        else:
            return False
        if spec.submodule_search_locations is None:
            return depth >= len(names)
        path = list(spec.submodule_search_locations)
    return False


def _check_file(program: str) -> None:
    path = Path(program)
    context = {"program": program}
    try:
        path.stat()
    except PermissionError:
        raise ProgramNotRunnable(f"No permission to read {program!r}", context=context) from None
    except (OSError, ValueError):
        import shutil

        found = shutil.which(program)
        raise ProgramNotFound(
            f"There is no file {program!r}",
            context=context,
            suggestion=f"{found} is a command: put --no-python before it" if found else None,
        ) from None
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            raise ProgramNotRunnable(
                f"{program!r} is a directory without a __main__.py",
                context=context,
                suggestion=f"To train a case directory: -m cobre_shm.sddp {program}",
            )
        return
    if not path.is_file():
        # Each rank opens the program for itself; a pipe could be read by one of them only.
        raise ProgramNotRunnable(f"{program!r} is not a regular file", context=context)
    try:
        with path.open("rb") as file:
            is_machine_code = file.read(4) == b"\x7fELF"
    except OSError as error:
        raise ProgramNotRunnable(
            f"{program!r} cannot be read: {error.strerror}", context=context
        ) from None
    if is_machine_code:
        raise ProgramNotRunnable(
            f"{program!r} is not a Python program",
            context=context,
            suggestion="Put --no-python before it",
        )
