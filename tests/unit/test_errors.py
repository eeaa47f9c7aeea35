"""The errors: the tree, the fields, and the structured form."""

import copy
import inspect
import json
import pickle
from importlib import metadata

import pytest

from cobre_shm import create_communicator, errors
from cobre_shm.errors import (
    AllocationFailed,
    BackendError,
    BackendNotAvailable,
    CobreError,
    CollectiveFailed,
    CollectiveMismatch,
    CollectiveTimeout,
    CommError,
    IncompatibleSettings,
    InitializationFailed,
    InvalidBackend,
    InvalidBufferSize,
    InvalidCommunicator,
    InvalidDatatype,
    InvalidRoot,
    MissingConfiguration,
    RankFailed,
    WorkerError,
)
from cobre_shm.selection import registry
from cobre_shm.selection.builtin import TCP
from cobre_shm.selection.factory import start_failure
from cobre_shm.selection.kinds import MpiConfig, ShmConfig, TcpConfig

# The three examples of the specification.
NOT_AVAILABLE = {
    "kind": "IncompatibleSettings",
    "message": "Communication backend 'mpi' is not available in this build",
    "context": {
        "setting": "COBRE_COMM_BACKEND",
        "requested_value": "mpi",
        "available_backends": ["tcp", "shm", "local"],
        "build_features": ["tcp", "shm"],
    },
    "suggestion": "Set COBRE_COMM_BACKEND to one of: tcp, shm, local. "
    "To use MPI, rebuild with --features mpi.",
}
FAILED_TO_START = {
    "kind": "MpiError",
    "message": "TCP backend failed to connect to coordinator at 10.0.0.1:9000",
    "context": {
        "operation": "connect",
        "backend": "tcp",
        "coordinator": "10.0.0.1:9000",
        "error_code": 111,
        "detail": "Connection refused (os error 111)",
    },
    "suggestion": "Verify that the TCP coordinator is running at 10.0.0.1:9000 and that the port "
    "is accessible from this host.",
}
MISSING = {
    "kind": "IncompatibleSettings",
    "message": "TCP backend requires COBRE_TCP_COORDINATOR, COBRE_TCP_RANK, and COBRE_TCP_SIZE "
    "to be set",
    "context": {
        "setting": "COBRE_COMM_BACKEND",
        "requested_value": "tcp",
        "missing_variables": ["COBRE_TCP_COORDINATOR", "COBRE_TCP_RANK", "COBRE_TCP_SIZE"],
    },
    "suggestion": "Set the required environment variables. Example: COBRE_TCP_COORDINATOR=host "
    "COBRE_TCP_PORT=29500 COBRE_TCP_RANK=0 COBRE_TCP_SIZE=4 cobre run /path/to/case",
}
ONE_OF_EACH = [
    BackendNotAvailable("mpi", ["tcp", "shm", "local"], install_hint="pip install x"),
    InvalidBackend("mpu", ["local"], nearest="mpi"),
    InitializationFailed("tcp", "no", source=OSError(111, "Connection refused")),
    MissingConfiguration("shm", ["COBRE_SHM_NAME"]),
    InvalidBufferSize("allreduce", 3, 4),
    InvalidDatatype("allreduce", "object dtype"),
    InvalidRoot(3, 2),
    InvalidCommunicator("closed"),
    AllocationFailed(4096, "no space", suggestion="docker run --shm-size=1g"),
    RankFailed("rank 1 died", rank=1, pid=77, signal=9),
    CollectiveTimeout("rank 1 is late", missing_ranks=[1], seconds=60.0),
    CollectiveMismatch(["barrier", "broadcast"]),
    IncompatibleSettings("these settings exclude each other", context={"setting": "backend"}),
    WorkerError("worker 1 failed", rank=1, pid=4711, exit_code=3),
]


def shape(value):
    """The structure of a JSON value: keys in order and types, without the values."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return ["list", *{type(item).__name__ for item in value}]
    return type(value).__name__


@pytest.fixture
def without_mpi(monkeypatch):
    """The backends tcp and shm look installed, and mpi does not."""
    monkeypatch.setattr(registry, "has_module", lambda module: module != "mpi4py")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    for variable in MISSING["context"]["missing_variables"]:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("without_mpi")
@pytest.mark.parametrize("ask", ["environment", "name", "configuration"])
def test_backend_not_available_is_that_of_the_specification(monkeypatch, ask):
    monkeypatch.setenv("COBRE_COMM_BACKEND", "mpi" if ask == "environment" else "local")
    request = {"environment": None, "name": "mpi", "configuration": MpiConfig()}[ask]
    with pytest.raises(BackendNotAvailable) as caught:
        create_communicator(request)
    found = json.loads(json.dumps(caught.value.to_dict()))
    assert shape(found) == shape(NOT_AVAILABLE)
    # Word for word, up to how a feature is had: there is no rebuilding here.
    words, _, remedy = found.pop("suggestion").partition(" To use MPI")
    expected = copy.deepcopy(NOT_AVAILABLE)
    assert words == expected.pop("suggestion").partition(" To use MPI")[0]
    assert remedy == ': pip install "cobre-shm[mpi]"'
    assert found == expected


def test_invalid_backend_has_the_structure_of_not_available(without_mpi):
    without_mpi.setenv("COBRE_COMM_BACKEND", "quantum")
    with pytest.raises(InvalidBackend) as caught:
        create_communicator()
    assert shape(caught.value.to_dict()) == shape(NOT_AVAILABLE)


def test_missing_configuration_is_that_of_the_specification(without_mpi):
    without_mpi.setenv("COBRE_COMM_BACKEND", "tcp")
    with pytest.raises(MissingConfiguration) as caught:
        create_communicator()
    found = json.loads(json.dumps(caught.value.to_dict()))
    assert shape(found) == shape(MISSING)
    expected = copy.deepcopy(MISSING)
    words, _, assignments = expected.pop("suggestion").partition("Example: ")
    assert found["suggestion"].startswith(words)
    # The port has a default, and the program is one that uses the variables.
    needed = {word for word in assignments.split() if "=" in word} - {"COBRE_TCP_PORT=29500"}
    pasted = found.pop("suggestion").partition("Example: export ")[2]
    assert set(pasted.split()) == needed
    assert found == expected


def test_failed_start_has_the_specified_structure():
    refused = ConnectionRefusedError(111, "Connection refused")
    found = json.loads(json.dumps(start_failure(TCP, refused).to_dict()))
    # The coordinator is what a backend adds who knows where it was going.
    expected = copy.deepcopy(FAILED_TO_START)
    del expected["context"]["coordinator"]
    assert shape(found) == shape(expected)
    assert found["kind"] == expected["kind"]
    assert found["context"]["error_code"] == expected["context"]["error_code"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShmConfig.from_env({"COBRE_SHM_NAME": "a"}),
        lambda: ShmConfig.from_env(
            {"COBRE_SHM_NAME": "a", "COBRE_SHM_RANK": "two", "COBRE_SHM_SIZE": "2"}
        ),
        lambda: ShmConfig("a", 2, 2),
        lambda: ShmConfig("a", 0, 2, slot_bytes=5),
        lambda: TcpConfig("host:1", 0, 2, port=2),
        lambda: create_communicator("quantum"),
    ],
)
def test_backend_error_always_suggests_something(make):
    with pytest.raises(BackendError) as caught:
        make()
    error = caught.value.to_dict()
    assert [type(value) for value in error.values()] == [str, str, dict, str]
    assert error["suggestion"]
    example = MISSING if "missing_variables" in error["context"] else FAILED_TO_START
    if isinstance(caught.value, InvalidBackend):
        example = NOT_AVAILABLE
    assert error["kind"] == example["kind"]
    common = [key for key in example["context"] if key != "coordinator"]
    assert {key: type(error["context"][key]) for key in common} == {
        key: type(example["context"][key]) for key in common
    }


def test_initialization_failed_has_the_specified_structure():
    error = InitializationFailed(
        "tcp",
        FAILED_TO_START["message"],
        operation="connect",
        source=ConnectionRefusedError(111, "Connection refused"),
        context={"coordinator": "10.0.0.1:9000"},
        suggestion=FAILED_TO_START["suggestion"],
    )
    found = error.to_dict()
    assert shape(found) == shape(FAILED_TO_START)
    assert found["context"].pop("detail") == "[Errno 111] Connection refused"
    expected = copy.deepcopy(FAILED_TO_START)
    del expected["context"]["detail"]
    assert found == expected


@pytest.mark.parametrize(
    ("names", "listed"), [(["A"], "requires A to"), (["A", "B"], "requires A and B to")]
)
def test_missing_configuration_lists_one_and_two_as_prose(names, listed):
    assert listed in MissingConfiguration("shm", names).message


def test_backend_errors_carry_the_specified_fields():
    for error in ONE_OF_EACH[:2]:
        assert isinstance(error.requested, str)
        assert isinstance(error.available, list)
    assert ONE_OF_EACH[2].backend == "tcp"
    assert isinstance(ONE_OF_EACH[2].source, OSError)
    assert (ONE_OF_EACH[3].backend, ONE_OF_EACH[3].missing_vars) == ("shm", ["COBRE_SHM_NAME"])


def test_initialization_failed_without_errno_has_error_code_zero():
    error = InitializationFailed("mpi", "no", source=RuntimeError("no libmpi"))
    assert error.context["error_code"] == 0
    assert error.context["detail"] == "no libmpi"


def test_every_error_class_is_in_the_sample():
    defined = {
        cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, CobreError)
    }
    families = {CobreError, BackendError, CommError, CollectiveFailed}
    assert {type(error) for error in ONE_OF_EACH} == defined - families


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_error_structured_form_is_json_with_four_keys(error):
    found = json.loads(json.dumps(error.to_dict()))
    assert list(found) == ["kind", "message", "context", "suggestion"]
    assert found["message"] == error.message


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_error_survives_pickling(error):
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert restored.to_dict() == error.to_dict()


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_error_text_is_message_and_suggestion(error):
    assert str(error).startswith(error.message)
    assert (error.suggestion or "") in str(error)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (ONE_OF_EACH[0], (BackendError,)),
        (ONE_OF_EACH[4], (CommError, ValueError)),
        (ONE_OF_EACH[5], (CommError, TypeError)),
        (ONE_OF_EACH[6], (CommError, ValueError)),
        (ONE_OF_EACH[8], (CommError, MemoryError)),
        (ONE_OF_EACH[9], (CollectiveFailed, CommError)),
    ],
)
def test_error_can_be_caught_by_family_and_by_builtin(error, bases):
    for base in bases:
        assert isinstance(error, base)
