"""The zygote: a process that imports what ranks need once and is then forked into all of them.

Actors: the launcher; the zygote, a fresh interpreter with the environment of the ranks, started by
it; ranks, forked from the zygote. They talk over one socket, a JSON object per packet.

    zygote    imports; tells {"ready"} or {"unfit": why}
    launcher  orders one rank: {"environment", "cpus", ...}, with its standard descriptors, the
              gate, and what the ranks meet in where that is inherited
    zygote    forks; tells {"pid"} or {"error"}; waits for the next order
    launcher  has all pids: kills the zygote
    kernel    makes the ranks children of the launcher, which is their subreaper
    launcher  opens the gate: a byte for each rank
    rank      asks to be killed when the launcher ends, takes the zygote's traces off, runs

So the zygote is gone before any program runs, and the launcher is the parent of all ranks: it
reads exit codes and signals from the kernel itself, as for interpreters that it has started. If
the launcher dies, the zygote is killed by its parent-death signal, a rank before the gate sees the
gate's end, and one behind it is killed by a parent-death signal of its own. If the zygote dies,
the launcher sees the socket's end and has ranks that have run nothing: they are killed.

What fork would share and a program should not see, and what is done about it:

    threads            none exists: the launcher is told {"unfit"} where an import started one
    memory             the garbage collector never looks at what was imported (``gc.freeze``), so
                       that its pages stay shared; at exit it is not taken apart either
    random numbers     numpy's global generator is seeded anew; ``random`` does so by itself;
                       numba's generators and hashes of strings are shared by design
    ``__main__``       is made anew, as empty as that of ``python -c``; ``direct`` fills it
    descriptors        all are closed on the way, or moved to 0, 1 and 2
    standard streams   output of the zygote goes into pipes as that of ranks does; ``sys.stdin``
                       is made anew for rank 0, whose input may be of any kind
    processes          the secret by which ``multiprocessing`` knows its children is made anew
    modules            a program whose folder has another file of a name that was imported here
                       would not get it: {"unfit"}

Unfit: ranks are started as fresh interpreters instead.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.machinery
import io
import json
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from cobre_shm.errors import CobreError
from cobre_shm.spawn import direct
from cobre_shm.spawn.parent import die_with

__all__ = ["ORDER_BYTES", "main", "rank_process"]

# Found by name at run time only: the launcher shares this package, and must not import these.
_PRELOADED = ("numpy", "cobre_shm.selection.factory")
_BACKENDS = {"shm": "cobre_shm.shm", "tcp": "cobre_net.tcp"}
ORDER_BYTES = 65536
_MAX_DESCRIPTORS = 8
# An error of an import may be of any length, a packet not.
_WHY_CHARACTERS = 2000

_Order = dict[str, Any]


def main() -> list[str]:
    """Be the zygote; returns in each rank only, and there the words of the program."""
    _, descriptor, preload, *words = sys.argv
    link = socket.socket(fileno=int(descriptor))
    imported: set[str] = set()
    # The first to be registered is called last.
    atexit.register(_keep, imported)
    bare = set(sys.modules)
    gc.disable()
    try:
        _import_all(link, preload, words)
        imported |= set(sys.modules) - bare
        why = _why_unfit(words, imported)
        # Python takes these apart last, and a rank shall neither.
        imported |= bare - {"__main__", "sys", "builtins"}
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    gc.freeze()
    _tell(link, {"unfit": why[:_WHY_CHARACTERS]} if why else {"ready": True})
    _serve(link, words)
    return words


def _import_all(link: socket.socket, preload: str, words: list[str]) -> None:
    """Import what every rank needs, and the modules of ``--preload``."""
    kernels = importlib.import_module("cobre_shm.native.cache")

    def announce() -> None:
        kernels.announce.clear()
        _tell(link, {"compiling": True})

    kernels.announce.append(announce)
    # A program that is given another backend imports it for itself.
    backend = os.environ.get("COBRE_COMM_BACKEND", "")
    for name in (*_PRELOADED, *filter(None, [_BACKENDS.get(backend)])):
        importlib.import_module(name)
    _import_more(preload, words)
    if backend == "shm":
        # Where it is refused, ranks will say so.
        with contextlib.suppress(CobreError, OSError):
            _call_once()
    # Ranks would inherit it, without the link: programs may have more to compile.
    kernels.announce.clear()


def _import_more(preload: str, words: list[str]) -> None:
    if preload == "auto":
        for name in _used_by(words):
            importlib.import_module(name)
    elif preload:
        # Those that the user names may lie beside the program, where it would find them.
        path = direct.first_path(words)
        if path is not None:
            sys.path.insert(0, path)
        try:
            for name in preload.split(","):
                importlib.import_module(name)
        finally:
            # They may have done so themselves.
            if path in sys.path:
                sys.path.remove(path)


def _call_once() -> None:
    """Make a group of one, in memory without a name, and call what ranks will call.

    Much is set up at the first call, on pages that would otherwise be copied in every rank.
    """
    from cobre_shm.segment.watch import WatchedSegment
    from cobre_shm.selection.factory import create_communicator
    from cobre_shm.selection.kinds import ShmConfig

    numpy = sys.modules["numpy"]
    segment = WatchedSegment.create_unnamed(1, launched=True)
    try:
        config = ShmConfig(name=segment.name, rank=0, size=1)
        with create_communicator(config) as comm:
            comm.barrier()
            comm.broadcast(numpy.zeros(1))
            comm.allgatherv(numpy.zeros(1))
            # 128 KiB: smaller ones are an allreduce.
            comm.allreduce_shared(numpy.zeros(1 << 14))
            for operation in ("sum", "min", "max"):
                comm.allreduce(numpy.zeros(1), op=operation)
    finally:
        segment.close()


def _used_by(words: list[str]) -> list[str]:
    """Return which module that takes long to import the program's own file imports: numba."""
    source = direct.source(words)
    if b"numba" not in source and b"jit" not in source:
        return []
    import ast

    imported: set[str] = set()
    # What is wrong with it, the ranks will say.
    with contextlib.suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported.update(name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.update(f"{node.module}.{name.name}" for name in node.names)
    uses = any(f"{name}.".startswith(("numba.", "cobre_shm.jit.")) for name in imported)
    return ["numba"] if uses else []


def _why_unfit(words: list[str], imported: set[str]) -> str | None:
    """Return why a program would see something else than if it had been started by itself."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"imports have started {threads - 1} threads"
    path = direct.first_path(words)
    first = [] if path is None else [path]
    for name in {module.partition(".")[0] for module in imported}:
        spec = importlib.machinery.PathFinder.find_spec(name, first)
        if spec is not None and not _is_loaded_from(spec):
            return f"the program's own {spec.origin} has the name of an imported module"
    package = _find("cobre_shm", [*first, *sys.path])
    if package is None or not _is_loaded_from(package):
        return "the program does not find this cobre_shm"
    return None


def _find(name: str, path: list[str]) -> importlib.machinery.ModuleSpec | None:
    """Find a module as an import would, with that ``sys.path``."""
    for finder in sys.meta_path:
        where = path if finder is importlib.machinery.PathFinder else None
        spec = finder.find_spec(name, where)
        if spec is not None:
            return spec
    return None


def _is_loaded_from(spec: importlib.machinery.ModuleSpec) -> bool:
    loaded = getattr(sys.modules.get(spec.name), "__file__", None)
    if spec.origin is None or loaded is None:
        # A folder without __init__.py gives way to a module found anywhere else.
        return spec.origin is None
    with contextlib.suppress(OSError):
        return Path(loaded).samefile(spec.origin)
    return False


def _tell(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode())


def _serve(link: socket.socket, words: list[str]) -> None:
    """Fork a rank for each order; returns in each of them, and never in the zygote."""
    while True:
        packet, descriptors, _, _ = socket.recv_fds(link, ORDER_BYTES, _MAX_DESCRIPTORS)
        if not packet:
            os._exit(0)
        order = json.loads(packet)
        try:
            pid = os.fork()
        except OSError as error:
            _tell(link, {"error": str(error)})
            continue
        if pid == 0:
            link.close()
            try:
                rank_process(order, descriptors, words)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(126)
            return
        for each in descriptors:
            os.close(each)
        _tell(link, {"pid": pid})


def rank_process(order: _Order, descriptors: list[int], words: list[str]) -> None:
    """Make this forked process the one in which the program would have been started."""
    os.setpgid(0, 0)
    gate, *standard = descriptors[:4]
    inherited = descriptors[4:]
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    numbers = zip(order["inherited"], inherited, strict=True)
    renamed = {f"fd:{old}": f"fd:{new}" for old, new in numbers}
    own = order["environment"].items()
    os.environ.update({name: renamed.get(value, value) for name, value in own})
    if order["cpus"]:
        os.sched_setaffinity(0, order["cpus"])
    if order["reads"]:
        _renew_standard_input()
    _renew_identity()
    _wait_at(gate, order["launcher"])
    if order["dumps"]:
        _dump_stacks_on(order["dumps"])
    gc.enable()
    direct.prepare(words, order["interpreter"])


def _wait_at(gate: int, launcher: int) -> None:
    """Wait until the zygote is gone; end where the launcher is."""
    is_open = os.read(gate, 1)
    os.close(gate)
    if not is_open:
        os._exit(1)
    die_with(launcher)()


def _renew_standard_input() -> None:
    """Make ``sys.stdin`` as Python does at start-up, for what descriptor 0 is now."""
    old = sys.stdin
    raw = io.FileIO(0, "rb", closefd=False)
    raw.name = "<stdin>"
    buffer = io.BufferedReader(raw)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(  # type: ignore[misc]
        buffer, old.encoding, old.errors, newline="\n", line_buffering=os.isatty(0)
    )
    sys.stdin.mode = "r"  # type: ignore[misc]


def _renew_identity() -> None:
    """Let modules know which process this is, and have random state of their own."""
    if (threading := sys.modules.get("threading")) is not None:
        # Python 3.11 leaves the zygote's there.
        threading.main_thread()._set_native_id()
    if (random := sys.modules.get("numpy.random")) is not None:
        random.seed()
    if (process := sys.modules.get("multiprocessing.process")) is not None:
        process.current_process().authkey = os.urandom(32)


def _dump_stacks_on(number: int) -> None:
    """Have Python's stacks written to descriptor 2 on a signal, without the interpreter's help."""
    import faulthandler

    faulthandler.register(number, all_threads=True, chain=False)


def _keep(imported: set[str]) -> None:
    """Spare the interpreter to take apart the modules of the zygote; called last at exit.

    Freeing all of it, Python would write to nearly every page that ranks share, and copy it first.
    What the program itself has imported or made is freed as always, and what it runs on the way
    may still import all of it.
    """
    for name in imported:
        module = sys.modules.get(name)
        if isinstance(module, ModuleType):
            # Python takes modules apart that it finds by name, and this is none. The module has a
            # reference that nobody gives back.
            stand_in = _StandIn()
            stand_in.__dict__ = vars(module)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
            sys.modules[name] = stand_in  # type: ignore[assignment]


class _StandIn:
    """Has all that a module has."""
