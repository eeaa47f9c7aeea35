"""Each installation profile: what every value of the selection leads to, field by field."""

import json
import os
import tomllib

import pytest

from tests.selection.environments import ROOT

SHM = {"COBRE_SHM_NAME": f"/cobre-test-{os.getpid()}", "COBRE_SHM_RANK": "0", "COBRE_SHM_SIZE": "1"}
TCP = {"COBRE_TCP_COORDINATOR": "localhost", "COBRE_TCP_RANK": "0", "COBRE_TCP_SIZE": "1"}
LAUNCHED = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}

LOCAL_IS_MADE = {"class": "LocalCommunicator", "backend": "local"}
SHM_IS_MADE = {"class": "ShmCommunicator", "backend": "shm"}
TCP_IS_MADE = {"class": "TcpCommunicator", "backend": "tcp"}


def named(backend, **variables):
    return {"COBRE_COMM_BACKEND": backend, **variables}


def not_available(backend, available, to_install=None):
    hint = f" To use {backend.upper()}: {to_install}" if to_install else ""
    return {
        "error": "BackendNotAvailable",
        "kind": "IncompatibleSettings",
        "message": f"Communication backend '{backend}' is not available in this build",
        "context": {
            "setting": "COBRE_COMM_BACKEND",
            "requested_value": backend,
            "available_backends": available,
            "build_features": [name for name in available if name != "local"],
        },
        "suggestion": f"Set COBRE_COMM_BACKEND to one of: {', '.join(available)}.{hint}",
    }


def invalid(backend, available, meant=""):
    return {
        "error": "InvalidBackend",
        "kind": "IncompatibleSettings",
        "message": f"Communication backend '{backend}' is not known",
        "context": {
            "setting": "COBRE_COMM_BACKEND",
            "requested_value": backend,
            "available_backends": available,
            "build_features": [name for name in available if name != "local"],
        },
        "suggestion": f"{meant}Set COBRE_COMM_BACKEND to one of: auto, {', '.join(available)}.",
    }


def missing(backend, listed, names, example):
    return {
        "error": "MissingConfiguration",
        "kind": "IncompatibleSettings",
        "message": f"{backend.upper()} backend requires {listed} to be set",
        "context": {
            "setting": "COBRE_COMM_BACKEND",
            "requested_value": backend,
            "missing_variables": names,
        },
        "suggestion": f"Set the required environment variables. Example: export {example}",
    }


def malformed(backend, name, value, expected, example):
    text = f"{name}={value!r} is not valid: expected {expected}"
    return {
        "error": "InitializationFailed",
        "kind": "MpiError",
        "message": text,
        "context": {
            "operation": "configure",
            "backend": backend,
            "setting": name,
            "value": value,
            "expected": expected,
            "error_code": 0,
            "detail": text,
        },
        "suggestion": f"Example: export {name}={example}",
    }


class NoLibrary:
    """Equal to every error that says that mpi4py found no MPI library, and what installs one."""

    def __eq__(self, outcome):
        return (
            outcome.get("error") == "InitializationFailed"
            and outcome["message"]
            == "mpi4py found no MPI library that it can use: cannot load MPI library"
            and "libmpi.so" in outcome["context"]["detail"]
            and outcome["context"]["libraries"] == []
            and outcome["suggestion"].endswith("python -m pip install mpich")
        )

    __hash__ = None


ALL_MISSING = missing(
    "shm",
    "COBRE_SHM_NAME, COBRE_SHM_RANK, and COBRE_SHM_SIZE",
    ["COBRE_SHM_NAME", "COBRE_SHM_RANK", "COBRE_SHM_SIZE"],
    "COBRE_SHM_NAME=/my-run COBRE_SHM_RANK=0 COBRE_SHM_SIZE=4",
)
TCP_ALL_MISSING = missing(
    "tcp",
    "COBRE_TCP_COORDINATOR, COBRE_TCP_RANK, and COBRE_TCP_SIZE",
    ["COBRE_TCP_COORDINATOR", "COBRE_TCP_RANK", "COBRE_TCP_SIZE"],
    "COBRE_TCP_COORDINATOR=host COBRE_TCP_RANK=0 COBRE_TCP_SIZE=4",
)
TWO_MISSING = missing(
    "shm",
    "COBRE_SHM_RANK and COBRE_SHM_SIZE",
    ["COBRE_SHM_RANK", "COBRE_SHM_SIZE"],
    "COBRE_SHM_RANK=0 COBRE_SHM_SIZE=4",
)
BAD_RANK = malformed("shm", "COBRE_SHM_RANK", "1", "an integer in 0..0", "0")

NO_FEATURE = ["local"]
NUMPY_ALONE = [
    ({}, LOCAL_IS_MADE),
    (named(""), LOCAL_IS_MADE),
    (named("auto"), LOCAL_IS_MADE),
    (named("local"), LOCAL_IS_MADE),
    (named(" LOCAL "), LOCAL_IS_MADE),
    (named("auto", **SHM, **TCP), LOCAL_IS_MADE),
    (SHM | TCP | LAUNCHED, LOCAL_IS_MADE),
    (
        named("shm", **SHM),
        not_available("shm", NO_FEATURE, 'pip install "cobre-shm[shm]"'),
    ),
    (
        named("tcp", **TCP),
        not_available("tcp", NO_FEATURE, 'pip install "cobre-shm[tcp]"'),
    ),
    (named("mpi", **LAUNCHED), not_available("mpi", NO_FEATURE, 'pip install "cobre-shm[mpi]"')),
    (named("shn"), invalid("shn", NO_FEATURE, "Did you mean 'shm'? ")),
    (named("quantum"), invalid("quantum", NO_FEATURE)),
]
PLAIN = ["tcp", "shm", "local"]
WHEEL_PROFILE = [
    ({}, LOCAL_IS_MADE),
    (named(""), LOCAL_IS_MADE),
    (named("auto"), LOCAL_IS_MADE),
    (named("local"), LOCAL_IS_MADE),
    (named("local", **SHM), LOCAL_IS_MADE),
    (SHM, SHM_IS_MADE),
    (named("Auto", **SHM), SHM_IS_MADE),
    (named("shm", **SHM), SHM_IS_MADE),
    (SHM | TCP | LAUNCHED, TCP_IS_MADE),
    (TCP | LAUNCHED, TCP_IS_MADE),
    (LAUNCHED, LOCAL_IS_MADE),
    (named("shm"), ALL_MISSING),
    (named("shm", COBRE_SHM_NAME="x"), TWO_MISSING),
    (named("auto", COBRE_SHM_NAME="x"), TWO_MISSING),
    (named("shm", **{**SHM, "COBRE_SHM_RANK": "1"}), BAD_RANK),
    (named("tcp", **TCP), TCP_IS_MADE),
    (named("mpi", **LAUNCHED), not_available("mpi", PLAIN, 'pip install "cobre-shm[mpi]"')),
    (named("shn"), invalid("shn", PLAIN, "Did you mean 'shm'? ")),
]
WITH_MPI = ["mpi", "tcp", "shm", "local"]
MPI4PY_WITHOUT_LIBRARY = [
    ({}, LOCAL_IS_MADE),
    (named(""), LOCAL_IS_MADE),
    (named("auto"), LOCAL_IS_MADE),
    (named("auto", **LAUNCHED), NoLibrary()),
    (named("local", **LAUNCHED), LOCAL_IS_MADE),
    (LAUNCHED, NoLibrary()),
    (TCP | LAUNCHED, NoLibrary()),
    (SHM, SHM_IS_MADE),
    (SHM | LAUNCHED, NoLibrary()),
    (SHM | TCP | LAUNCHED, NoLibrary()),
    (named("shm", **SHM, **LAUNCHED), SHM_IS_MADE),
    (named("shm"), ALL_MISSING),
    (named("mpi"), NoLibrary()),
    (named("mpi", **LAUNCHED), NoLibrary()),
    (named("tcp"), TCP_ALL_MISSING),
    (named("tcp", **TCP), TCP_IS_MADE),
    (named("npi"), invalid("npi", WITH_MPI, "Did you mean 'mpi'? ")),
]
EVERYTHING = MPI4PY_WITHOUT_LIBRARY
PROFILES = {
    "numpy_alone": NUMPY_ALONE,
    "wheel_profile": WHEEL_PROFILE,
    "mpi4py_without_library": MPI4PY_WITHOUT_LIBRARY,
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("table", PROFILES.values(), ids=PROFILES)
def test_every_table_asks_for_every_value(table):
    asked = {variables.get("COBRE_COMM_BACKEND") for variables, _ in table}
    assert asked >= {None, "", "auto", "mpi", "tcp", "shm", "local"}


@pytest.mark.parametrize(("profile", "table"), PROFILES.items(), ids=PROFILES)
def test_profile_every_selection_has_the_outcome_of_the_table(request, profile, table):
    environment = request.getfixturevalue(profile)
    if any(isinstance(expected, NoLibrary) for _, expected in table):
        # Is skipped where the machine has one.
        request.getfixturevalue("mpi4py_without_library")
    found = environment.outcomes([variables for variables, _ in table])
    for (variables, expected), outcome in zip(table, found, strict=True):
        assert outcome == expected, variables


def test_profile_of_mpi4py_has_it_and_no_library(mpi4py_without_library):
    found = mpi4py_without_library.run("-c", "import mpi4py; print(mpi4py.__version__)")
    assert found.stdout.startswith("4."), found.stderr
    started = mpi4py_without_library.run("-c", "from mpi4py import MPI")
    assert "cannot load MPI library" in started.stderr
    # Without the library, the package is found all the same and harms no other backend.
    report = json.loads(
        mpi4py_without_library.run("-m", "cobre_shm.info", "--output-format", "json").stdout
    )
    mpi = next(backend for backend in report["backends"] if backend["name"] == "mpi")
    assert mpi["requirements"] == {"numba": True, "posix_ipc": True, "mpi4py": True}
    assert report["mpi_library"] is None


def test_profile_of_everything_has_every_extra(everything):
    everything.has_what_is_required()
    code = (
        "import importlib.util, sys;"
        "print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
    )
    modules = ("numba", "posix_ipc", "mpi4py", "highspy", "pyarrow", "rich", "mcp")
    done = everything.run("-c", code, *modules)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_all_is_every_extra_for_users():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (everything,) = extras.pop("all")
    named_in_all = set(everything.partition("[")[2].rstrip("]").split(","))
    assert (
        named_in_all
        == {"shm", "tcp", "mpi", "sddp", "report", "mcp", "notebook"}
        == extras.keys() - {"test", "check"}
    )


def test_profile_registers_the_builtin_backends_by_entry_points(wheel_profile):
    code = (
        "from importlib.metadata import entry_points;"
        "print(*sorted(e.name for e in entry_points(group='cobre.backends')))"
    )
    assert wheel_profile.run("-c", code).stdout.split() == ["local", "mpi", "shm", "tcp"]


def test_profile_without_features_has_info(numpy_alone):
    done = numpy_alone.run("-m", "cobre_shm.info")
    assert (done.returncode, done.stderr) == (0, "")
    assert 'shm      not available: pip install "cobre-shm[shm]"\n' in done.stdout
    assert "feature shm, requires numba not found, posix_ipc not found\n" in done.stdout
    assert "not looked at: the shm backend is not available" in done.stdout


def test_info_ends_with_code_four_when_the_choice_would_fail(numpy_alone):
    done = numpy_alone.run("-m", "cobre_shm.info", env=named("shm"))
    assert done.returncode == 4
    assert done.stderr.startswith("error: Communication backend 'shm' is not available")


@pytest.mark.parametrize(
    "command",
    [
        ("cobre_shm.spawn", "-n", "2", "--output-format", "json", "-c", "print('never')"),
        ("cobre_shm.sddp", "--output-format", "json", "no/such/case"),
        ("cobre_shm.info", "--output-format", "json"),
    ],
    ids=lambda command: command[0],
)
def test_command_lines_end_with_code_four_and_the_structured_error(numpy_alone, command):
    done = numpy_alone.run("-m", *command, env=named("shm"))
    assert done.returncode == 4, done.stderr
    expected = not_available("shm", NO_FEATURE, 'pip install "cobre-shm[shm]"')
    assert {"error": "BackendNotAvailable", **json.loads(done.stderr)} == expected
    # Nothing was begun; info prints its report, and the trainer its answer.
    if command[0] == "cobre_shm.spawn":
        assert done.stdout == ""
    if command[0] == "cobre_shm.sddp":
        answer = json.loads(done.stdout)
        assert (answer["success"], answer["exit_code"]) == (False, 4)
        assert answer["errors"][0]["kind"] == "IncompatibleSettings"


def test_plain_install_is_the_wheel_profile():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {*extras["shm"], *extras["tcp"]} <= {*project["dependencies"]}
    assert not any("mpi4py" in requirement for requirement in project["dependencies"])
