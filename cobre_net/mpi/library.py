"""The MPI library under mpi4py: loaded once, and explained where it is absent or the wrong one.

``MPI`` is ``mpi4py.MPI``. Importing this module initialises MPI, unless the program has told
mpi4py not to; then it is done here, at the same level of threads that mpi4py asks for.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cobre_shm.errors import InitializationFailed

__all__ = ["MPI", "check_started", "duplicate", "returning_errors"]

# What each launcher says of the number of processes that it started. Slurm sets SLURM_NTASKS for
# a batch script too, which is one process; the step's number only for what srun starts.
_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpiexec",
    "PMI_SIZE": "the mpiexec of MPICH or Intel MPI",
    "SLURM_STEP_NUM_TASKS": "Slurm's srun",
}


def _load() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        found = loaded_libraries()
        raise InitializationFailed(
            "mpi",
            "mpi4py found no MPI library that it can use: "
            + (str(error).splitlines() or [type(error).__name__])[0]
            + (f" (loaded: {', '.join(found)})" if found else ""),
            operation="load",
            source=error,
            context={"python": sys.executable, "libraries": found},
            suggestion="Load the MPI of your cluster first (module load mpich, or openmpi), or "
            "install one beside mpi4py: python -m pip install mpich",
        ) from error
    return MPI


def loaded_libraries() -> list[str]:
    """Return the files of MPI libraries that this process has mapped."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*/libmpi(?:_abi|ch)?\.so\S*", maps)))


MPI = _load()


def check_started(env: Mapping[str, str]) -> None:
    """Make sure that MPI runs, serves this thread, and knows the launcher that started us.

    Raises:
        InitializationFailed: MPI was finalised; its level of threads does not do; or the launcher
            belongs to another MPI than the library, so that all processes are rank 0 of 1.
    """
    if MPI.Is_finalized():
        raise InitializationFailed(
            "mpi",
            "MPI was finalised in this process and cannot be started again",
            context=_facts(),
            suggestion="Make communicators before MPI.Finalize() is called.",
        )
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(_finalize)
    _check_threads()
    _check_launcher(env)


def duplicate(comm: Any) -> Any:
    """Return a communicator of the same ranks that is ours alone. Collective.

    Its errors come back, whatever the program wants of those on its own.

    Args:
        comm: Of mpi4py; None: of all ranks.

    Raises:
        InitializationFailed: It is no communicator, or a null one, or one between two groups.
    """
    source = MPI.COMM_WORLD if comm is None else comm
    is_null = isinstance(source, MPI.Comm) and source == MPI.COMM_NULL
    if is_null or not isinstance(source, MPI.Intracomm):
        found = "MPI.COMM_NULL" if is_null else type(source).__qualname__
        raise InitializationFailed(
            "mpi",
            f"MpiConfig.comm is not an intracommunicator of mpi4py: it is {found}",
            operation="configure",
            context={"setting": "MpiConfig.comm", "value": found},
            suggestion="Example: comm=MPI.COMM_WORLD.Split(colour, key). Where Split gives "
            "MPI.COMM_NULL, this process has no communicator to make.",
        )
    return returning_errors(source.Dup())


def returning_errors(comm: Any) -> Any:
    """Return ``comm``, which is ours: its errors come back, whatever ``mpi4py.rc.errors`` says."""
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    return comm


def _finalize() -> None:
    if not MPI.Is_finalized():
        MPI.Finalize()


def _check_threads() -> None:
    level = MPI.Query_thread()
    is_main = MPI.Is_thread_main()
    if level >= MPI.THREAD_SERIALIZED or (is_main and level == MPI.THREAD_FUNNELED):
        return
    if is_main and threading.active_count() == 1:
        return
    names = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled"}
    raise InitializationFailed(
        "mpi",
        f"MPI was initialised for the thread level {names[level]}, but this process "
        + ("has several threads" if is_main else "uses it from another thread than the main one"),
        context={**_facts(), "thread_level": names[level]},
        suggestion="Before anything imports mpi4py.MPI: "
        'import mpi4py; mpi4py.rc.thread_level = "multiple"',
    )


def _check_launcher(env: Mapping[str, str]) -> None:
    size = MPI.COMM_WORLD.Get_size()
    if size != 1:
        return
    for variable, launcher in _SIZES.items():
        text = env.get(variable, "")
        if text.isdecimal() and int(text) > 1:
            raise InitializationFailed(
                "mpi",
                f"{launcher} started {text} processes, but the MPI library that mpi4py loaded "
                f"does not know it: every process is rank 0 of 1 ({_library_name()}, "
                f"{', '.join(loaded_libraries()) or 'file not found'})",
                context={**_facts(), "launcher": launcher, variable: text},
                suggestion=_remedy(variable, int(text)),
            )


def _remedy(variable: str, size: int) -> str:
    if variable.startswith("SLURM"):
        # MPICH and its kin speak PMI-2; Open MPI from version 5 on PMIx only.
        interface = "pmix" if MPI.get_vendor()[0] == "Open MPI" else "pmi2"
        return (
            "See which interfaces there are (srun --mpi=list) and name that of this MPI, "
            f"likely: srun --mpi={interface}"
        )
    for library in loaded_libraries():
        launcher = Path(library).parent.parent / "bin" / "mpiexec"
        if os.access(launcher, os.X_OK):
            return f"Use the launcher of that library: {launcher} -n {size} {sys.executable} ..."
    return "Use the mpiexec of that library, or the mpi4py of the environment of that mpiexec."


def _library_name() -> str:
    return " ".join(str(MPI.Get_library_version()).split("\n")[0].split(",")[0].split())


def _facts() -> dict[str, Any]:
    return {"library": _library_name(), "libraries": loaded_libraries()}
