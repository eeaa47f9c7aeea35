"""Each installation profile: what every value of the selection leads to, field by field."""

import os
import tomllib

import pytest

from tests.selection.environments import ROOT

SHM = {"COBRE_SHM_NAME": f"/cobre-test-{os.getpid()}", "COBRE_SHM_RANK": "0", "COBRE_SHM_SIZE": "1"}
TCP = {"COBRE_TCP_COORDINATOR": "localhost", "COBRE_TCP_RANK": "0", "COBRE_TCP_SIZE": "1"}
LAUNCHED = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}

LOCAL_IS_MADE = {"class": "LocalCommunicator", "backend": "local"}
SHM_IS_MADE = {"class": "ShmCommunicator", "backend": "shm"}


def named(backend, **variables):
    return {"COBRE_COMM_BACKEND": backend, **variables}


def not_available(backend, available, to_install=None):
    hint = f" To use {backend}: {to_install}." if to_install else ""
    return {
        "error": "BackendNotAvailable",
        "kind": "IncompatibleSettings",
        "message": f"Communication backend '{backend}' is not available in this installation",
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


ALL_MISSING = missing(
    "shm",
    "COBRE_SHM_NAME, COBRE_SHM_RANK, and COBRE_SHM_SIZE",
    ["COBRE_SHM_NAME", "COBRE_SHM_RANK", "COBRE_SHM_SIZE"],
    "COBRE_SHM_NAME=/my-run COBRE_SHM_RANK=0 COBRE_SHM_SIZE=4",
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
    (named("tcp", **TCP), not_available("tcp", NO_FEATURE)),
    (named("mpi", **LAUNCHED), not_available("mpi", NO_FEATURE)),
    (named("shn"), invalid("shn", NO_FEATURE, "Did you mean 'shm'? ")),
    (named("quantum"), invalid("quantum", NO_FEATURE)),
]
SHM_FEATURE = ["shm", "local"]
WHEEL_PROFILE = [
    ({}, LOCAL_IS_MADE),
    (named(""), LOCAL_IS_MADE),
    (named("auto"), LOCAL_IS_MADE),
    (named("local"), LOCAL_IS_MADE),
    (named("local", **SHM), LOCAL_IS_MADE),
    (SHM, SHM_IS_MADE),
    (named("Auto", **SHM), SHM_IS_MADE),
    (named("shm", **SHM), SHM_IS_MADE),
    (SHM | TCP | LAUNCHED, SHM_IS_MADE),
    (named("shm"), ALL_MISSING),
    (named("shm", COBRE_SHM_NAME="x"), TWO_MISSING),
    (named("auto", COBRE_SHM_NAME="x"), TWO_MISSING),
    (named("shm", **{**SHM, "COBRE_SHM_RANK": "1"}), BAD_RANK),
    (named("tcp", **TCP), not_available("tcp", SHM_FEATURE)),
    (named("mpi", **LAUNCHED), not_available("mpi", SHM_FEATURE)),
    (named("shn"), invalid("shn", SHM_FEATURE, "Did you mean 'shm'? ")),
]


@pytest.mark.parametrize(
    ("profile", "table"),
    [("numpy_alone", NUMPY_ALONE), ("wheel_profile", WHEEL_PROFILE)],
)
def test_profile_every_selection_has_the_outcome_of_the_table(request, profile, table):
    environment = request.getfixturevalue(profile)
    found = environment.outcomes([variables for variables, _ in table])
    for (variables, expected), outcome in zip(table, found, strict=True):
        assert outcome == expected, variables


def test_profile_registers_the_builtin_backends_by_entry_points(wheel_profile):
    code = (
        "from importlib.metadata import entry_points;"
        "print(*sorted(e.name for e in entry_points(group='cobre.backends')))"
    )
    assert wheel_profile.run("-c", code).stdout.split() == ["local", "mpi", "shm", "tcp"]


def test_profile_without_features_has_info(numpy_alone):
    done = numpy_alone.run("-m", "cobre_shm.info")
    assert (done.returncode, done.stderr) == (0, "")
    assert 'no module numba, posix_ipc: pip install "cobre-shm[shm]"' in done.stdout
    assert "not looked at: the shm backend is not available" in done.stdout


def test_info_ends_with_code_four_when_the_choice_would_fail(numpy_alone):
    done = numpy_alone.run("-m", "cobre_shm.info", env=named("shm"))
    assert done.returncode == 4
    assert done.stderr.startswith("error: Communication backend 'shm' is not available")


def test_plain_install_is_the_wheel_profile():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {*extras["shm"], *extras["tcp"]} <= {*project["dependencies"]}
    assert not any("mpi4py" in requirement for requirement in project["dependencies"])
