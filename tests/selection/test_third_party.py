"""A backend that another distribution brings, and one that brings only trouble."""

import json
import subprocess
from pathlib import Path

import pytest

CONFORMANCE = Path(__file__).with_name("conform.py")
LAUNCHED = {"PMI_RANK": "0"}
SHM = {"COBRE_SHM_NAME": "x", "COBRE_SHM_RANK": "0", "COBRE_SHM_SIZE": "1"}


@pytest.fixture
def spool(tmp_path):
    """Variables of a group of one rank."""
    return {
        "COBRE_SPOOL_DIR": str(tmp_path / "group"),
        "COBRE_SPOOL_RANK": "0",
        "COBRE_SPOOL_SIZE": "1",
    }


def test_third_party_backend_is_listed_by_its_priority(third_party):
    done = third_party.run("-c", "import cobre_shm; print(cobre_shm.available_backends())")
    assert done.stdout.strip() == "['spool', 'tcp', 'shm', 'local']"


def test_third_party_backend_is_chosen_by_name_and_by_detection(third_party, spool):
    made = {"class": "SpoolCommunicator", "backend": "spool"}
    found = third_party.outcomes(
        [
            {**spool, "COBRE_COMM_BACKEND": "spool"},
            spool,
            {**spool, **SHM},
            {**spool, **LAUNCHED},
            {**spool, "COBRE_COMM_BACKEND": "local"},
        ]
    )
    assert found == [made, made, made, made, {"class": "LocalCommunicator", "backend": "local"}]


def test_third_party_backend_without_its_variables_lists_them(third_party):
    (found,) = third_party.outcomes([{"COBRE_COMM_BACKEND": "spool"}])
    assert found["error"] == "MissingConfiguration"
    assert found["context"]["missing_variables"] == [
        "COBRE_SPOOL_DIR",
        "COBRE_SPOOL_RANK",
        "COBRE_SPOOL_SIZE",
    ]


def test_third_party_backend_stands_in_error_lists(third_party):
    (found,) = third_party.outcomes([{"COBRE_COMM_BACKEND": "spol"}])
    assert found["context"]["available_backends"] == ["spool", "tcp", "shm", "local"]
    assert found["suggestion"].startswith("Did you mean 'spool'? ")


def test_third_party_variables_are_known(third_party, spool):
    code = "import cobre_shm; cobre_shm.create_communicator('local')"
    assert third_party.run("-c", code, env=spool).stderr == ""
    misspelt = third_party.run("-c", code, env={"COBRE_SPOOL_RNAK": "0"})
    assert "COBRE_SPOOL_RNAK (did you mean COBRE_SPOOL_RANK?)" in misspelt.stderr


def test_third_party_configuration_is_taken_as_it_is(third_party, tmp_path):
    code = (
        "import sys, pathlib, cobre_shm, spool_backend\n"
        "config = spool_backend.SpoolConfig(pathlib.Path(sys.argv[1]), 0, 1)\n"
        "with cobre_shm.create_communicator(config) as comm: print(type(comm).__name__)"
    )
    done = third_party.run("-c", code, str(tmp_path / "group"), env={"COBRE_COMM_BACKEND": "x"})
    assert done.stdout.strip() == "SpoolCommunicator", done.stderr


def test_third_party_registration_is_not_imported_by_another_choice(third_party):
    code = (
        "import sys, cobre_shm; cobre_shm.create_communicator('local');"
        "print('spool_backend' in sys.modules)"
    )
    assert third_party.run("-c", code).stdout.strip() == "False"


def test_broken_registrations_are_reported_and_harm_nobody(third_party):
    done = third_party.run("-m", "cobre_shm.info", "--output-format", "json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["choice"]["backend"] == "local"
    assert [backend["name"] for backend in report["backends"]] == [
        "mpi",
        "spool",
        "tcp",
        "shm",
        "local",
    ]
    failures = {failure["name"]: failure for failure in report["failed_registrations"]}
    assert sorted(failures) == ["absent", "local", "raising", "wrong"]
    assert {failure["distribution"] for failure in failures.values()} == {"cobre-broken-backend"}


def test_broken_registration_that_is_chosen_says_what_is_wrong(third_party):
    (found,) = third_party.outcomes([{"COBRE_COMM_BACKEND": "absent"}])
    assert found["error"] == "BackendNotAvailable"
    assert "no_such_module_anywhere:SPEC" in found["suggestion"]


@pytest.mark.parametrize("size", [1, 3])
def test_third_party_backend_runs_the_conformance_suite(third_party, tmp_path, size):
    ranks = [
        subprocess.Popen(
            [third_party.python, "-I", CONFORMANCE],
            env={
                "COBRE_COMM_BACKEND": "spool",
                "COBRE_SPOOL_DIR": str(tmp_path),
                "COBRE_SPOOL_RANK": str(rank),
                "COBRE_SPOOL_SIZE": str(size),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=720)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stdout.close()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)
    assert all("check_allreduce" in output for output in outputs)
