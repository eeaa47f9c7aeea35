"""Runs a program as if the interpreter had been started with it.

``python PROGRAM`` does a few things before the first line of a program: it fills ``sys.argv`` and
``sys.path[0]``, prepares the module ``__main__``, and reads and compiles the program. They are
done here in a process that exists already, a rank forked from the zygote, whose ``__main__`` is as
empty as that of ``python -c``. What Python itself does is in ``Modules/main.c`` and
``Python/pythonrun.c`` of CPython; a test compares the two.

An exception goes on to the top, where Python prints it and decides the exit code as always. Only
the traceback's entries that lead to the program are taken out, before anybody sees them.
"""

from __future__ import annotations

import importlib.machinery
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, cast

from cobre_shm.spawn.title import show_as

__all__ = ["first_path", "prepare", "run", "source"]


def first_path(words: Sequence[str]) -> str | None:
    """Return the ``sys.path[0]`` of a program; None where the interpreter adds none.

    Args:
        words: What would stand behind ``python`` and its options: ``-m MODULE ...``,
            ``-c CODE ...``, ``- ...`` or ``PROGRAM ...``.
    """
    first = words[0]
    if first not in ("-m", "-c", "-") and _is_container(first):
        # Added even under -P: the program could not be found without it.
        return _absolute(first)
    if sys.flags.safe_path:
        return None
    if first == "-m":
        return str(Path.cwd())
    if first in ("-c", "-"):
        return ""
    return str(Path(first).resolve().parent)


def source(words: Sequence[str]) -> bytes:
    """Return the source of a program's own file; empty where it is not simply there.

    Args:
        words: As of :func:`first_path`.
    """
    kind = words[0]
    if kind == "-c":
        return os.fsencode(words[1])
    if kind == "-m":
        module = words[1].replace(".", "/")
        folders = [first_path(words) or ".", *sys.path]
        files = [
            Path(folder, module + end) for folder in folders for end in (".py", "/__main__.py")
        ]
    else:
        files = [Path(kind, "__main__.py"), Path(kind)]
    for file in files:
        with suppress(OSError):
            return file.read_bytes()
    return b""


def prepare(words: Sequence[str], interpreter: Sequence[str]) -> None:
    """Set ``sys.argv``, ``sys.orig_argv``, ``sys.path`` and ``__main__`` for a program.

    And what others see of the process.

    Args:
        words: Of the program.
        interpreter: Command line of its interpreter.
    """
    # The module that is there was made before all that the garbage collector shall not look at,
    # and so would never be collected itself, nor an open file in it be written at exit.
    main = ModuleType("__main__")
    vars(main).update(vars(sys.modules["__main__"]))
    sys.modules["__main__"] = main
    sys.orig_argv = [*interpreter, *words]
    show_as(sys.orig_argv)
    # runpy puts the module's file in the place of -m.
    sys.argv = [words[0], *words[2:]] if words[0] in ("-m", "-c") else list(words)
    path = first_path(words)
    if path is not None:
        sys.path.insert(0, path)


def run(words: Sequence[str]) -> None:
    """Run the program in ``__main__``; whatever it raises is raised here."""
    try:
        _execute(words)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook = partial(_show_from_the_program_on, sys.excepthook)
        raise


def _execute(words: Sequence[str]) -> None:
    kind = words[0]
    names = sys.modules["__main__"].__dict__
    if kind == "-m":
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    elif kind == "-c":
        exec(compile(f"{words[1]}\n", "<string>", "exec", dont_inherit=True), names)
    elif kind == "-":
        source = sys.stdin.buffer.read()
        names["__file__"], names["__cached__"] = "<stdin>", None
        _execute_file(source, "<stdin>", names)
    elif _is_container(kind):
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
    else:
        _execute_script(kind, names)


def _execute_script(script: str, names: dict[str, Any]) -> None:
    path = _absolute(script)
    names["__file__"], names["__cached__"] = path, None
    if path.endswith(".pyc"):
        loader = importlib.machinery.SourcelessFileLoader("__main__", path)
        names["__loader__"] = loader
        exec(cast(CodeType, loader.get_code("__main__")), names)
        return
    with open(path, "rb") as file:
        source = file.read()
    names["__loader__"] = importlib.machinery.SourceFileLoader("__main__", path)
    _execute_file(source, path, names)


def _execute_file(source: bytes, path: str, names: dict[str, Any]) -> None:
    exec(compile(source, path, "exec", dont_inherit=True), names)


def _absolute(path: str) -> str:
    # As Python has it: other dots, and links, stay.
    if path in ("", "."):
        return str(Path.cwd())
    return path if path.startswith("/") else f"{Path.cwd()}/{path}"


def _is_container(path: str) -> bool:
    """Whether this is a directory or an archive, which is run by the ``__main__`` inside it."""
    for hook in sys.path_hooks:
        try:
            hook(path)
        except ImportError:
            continue
        return True
    return False


_OWN = (run.__code__, _execute.__code__, _execute_script.__code__, _execute_file.__code__)


def _show_from_the_program_on(
    show: Callable[..., object],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """The exception hook of a rank: the one that was set, shown a program that ran by itself."""
    while trace is not None and trace.tb_frame.f_code is not _OWN[0]:
        trace = trace.tb_next
    while trace is not None and trace.tb_frame.f_code in _OWN:
        trace = trace.tb_next
    sys.excepthook = show
    # What is called at exit may ask for it.
    sys.last_traceback = trace
    show(kind, error.with_traceback(trace), trace)
