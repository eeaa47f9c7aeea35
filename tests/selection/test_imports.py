"""Nothing that was not chosen is imported: seen in a fresh interpreter for each choice."""

import json
import os

import pytest

CODE = """
import sys
import cobre_shm
with cobre_shm.create_communicator({kind}):
    print(*sys.modules)
"""
SHM = {
    "COBRE_SHM_NAME": f"/cobre-test-imports-{os.getpid()}",
    "COBRE_SHM_RANK": "0",
    "COBRE_SHM_SIZE": "1",
}
SPOOL = {"COBRE_SPOOL_RANK": "0", "COBRE_SPOOL_SIZE": "1"}
# What belongs to one backend alone.
LOCAL = {"cobre_shm.local"}
SHARED_MEMORY = {
    *("cobre_shm.shm", "cobre_shm.segment", "cobre_shm.native", "cobre_shm.kernels", "posix_ipc")
}
SPOOLED = {"spool_backend.communicator"}
NEVER = {"mpi4py", "cobre_net", "cobre_shm.spawn", "cobre_shm.sddp"}
# Needed where all that is installed is looked at, or hardly ever, and slow to import.
SLOW = {"importlib.metadata", "hashlib"}
# What makes the images of kernels; with a warm cache nobody needs it.
COMPILER = {"numba", "llvmlite", "cobre_shm.compiler"}


def modules(environment, kind="", env=None):
    return set(printed(environment, CODE.format(kind=kind), env).split())


def printed(environment, code, env=None):
    done = environment.run("-c", code, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("env", [{}, {"COBRE_COMM_BACKEND": "local"}])
def test_choice_of_local_imports_no_other_backend(third_party, env):
    loaded = modules(third_party, env=env)
    assert loaded >= LOCAL
    assert not loaded & (SHARED_MEMORY | SPOOLED | NEVER | COMPILER)
    if env:
        assert not loaded & SLOW


def test_choice_of_shm_imports_no_other_backend(third_party):
    env = {**SHM, "COBRE_COMM_BACKEND": "shm"}
    # The first may have to compile.
    for unneeded in (set(), COMPILER | SLOW):
        loaded = modules(third_party, env=env)
        assert loaded >= SHARED_MEMORY
        assert not loaded & (LOCAL | SPOOLED | NEVER | unneeded)


def test_choice_of_third_party_imports_no_builtin_backend(third_party, tmp_path):
    env = {**SPOOL, "COBRE_SPOOL_DIR": str(tmp_path / "group")}
    loaded = modules(third_party, env=env)
    assert loaded >= SPOOLED
    assert not loaded & (SHARED_MEMORY | NEVER)


def test_unavailable_backend_is_refused_without_importing_it(numpy_alone):
    code = (
        "import json, sys, cobre_shm\n"
        "try: cobre_shm.create_communicator('shm')\n"
        "except cobre_shm.BackendNotAvailable: print(json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(printed(numpy_alone, code)))
    assert not loaded & (SHARED_MEMORY | LOCAL | {"numpy"})


def test_mpi_is_imported_only_where_it_is_chosen(mpi4py_without_library):
    code = (
        "import json, sys, cobre_shm\n"
        "try: cobre_shm.create_communicator()\n"
        "except cobre_shm.InitializationFailed: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )

    def loaded(**variables):
        return set(json.loads(printed(mpi4py_without_library, code, variables)))

    assert "mpi4py" in loaded(PMI_RANK="0", PMI_SIZE="1")
    assert "mpi4py" not in loaded(PMI_RANK="0", PMI_SIZE="1", COBRE_COMM_BACKEND="local")
    assert "mpi4py" not in loaded()


@pytest.mark.parametrize("arguments", [("-c", "import cobre_shm"), ("-m", "cobre_shm.spawn")])
def test_package_and_launcher_import_no_numba(third_party, arguments):
    if "-m" in arguments:
        # Where --help ends.
        code = (
            "import runpy, sys; sys.argv[1:] = ['--help']\n"
            "try: runpy.run_module('cobre_shm.spawn', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as ended: assert not ended.code\n"
            "print(*sys.modules)"
        )
    else:
        code = f"import sys; {arguments[1]}; print(*sys.modules)"
    loaded = set(printed(third_party, code).splitlines()[-1].split())
    assert "cobre_shm" in loaded
    unneeded = SHARED_MEMORY | LOCAL | SPOOLED | COMPILER
    unneeded |= {"numpy", "mpi4py", "cobre_net", "socket"}
    assert not loaded & unneeded


def test_available_backends_imports_none_of_them(third_party):
    code = "import sys, cobre_shm; cobre_shm.available_backends(); print(*sys.modules)"
    loaded = set(printed(third_party, code).split())
    assert "cobre_shm" in loaded
    assert not loaded & (SHARED_MEMORY | LOCAL | SPOOLED | NEVER | {"numpy"})


@pytest.mark.parametrize("module", ["cobre_shm.info", "cobre_shm.selection.info"])
def test_description_of_backends_imports_none_of_them(third_party, module):
    loaded = set(printed(third_party, f"import sys, {module}; print(*sys.modules)").split())
    assert module in loaded
    assert not loaded & (
        (SHARED_MEMORY | LOCAL | SPOOLED | NEVER | {"numpy"}) - {"cobre_shm.spawn"}
    )
