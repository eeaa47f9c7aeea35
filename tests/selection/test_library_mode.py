"""A program that chooses by itself: the environment plays no part, and groups live side by side."""

import os
import secrets

import numpy as np
import pytest

from cobre_shm import BackendKind, LocalConfig, ShmConfig, create_communicator
from cobre_shm.local import LocalCommunicator
from cobre_shm.selection.registry import read_registry


def group_of_one(**fields):
    return ShmConfig(f"/cobre-test-{secrets.token_hex(8)}", rank=0, size=1, **fields)


def variables():
    # pytest itself notes the stage of a test there.
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(autouse=True)
def needs_shm():
    missing = read_registry().find("shm").missing()
    if missing:
        pytest.skip(f"backend shm needs {', '.join(missing)}")


@pytest.fixture
def contradicting_environment(monkeypatch):
    """Variables that would end in an error, or in another backend, if they were read."""
    monkeypatch.setenv("COBRE_COMM_BACKEND", "nonsense")
    monkeypatch.setenv("COBRE_SHM_NAME", "not/a/name")
    monkeypatch.setenv("COBRE_SHM_RANK", "two")
    monkeypatch.setenv("COBRE_SHM_TIMEOUT_SECS", "0")
    monkeypatch.setenv("PMI_RANK", "0")
    return variables()


@pytest.mark.usefixtures("contradicting_environment")
@pytest.mark.parametrize("wrap", [lambda config: config, BackendKind.SHM])
def test_create_shm_configuration_alone_decides(wrap):
    from cobre_shm.shm import ShmCommunicator

    with create_communicator(wrap(group_of_one(timeout_secs=5))) as comm:
        assert type(comm) is ShmCommunicator
        assert (comm.rank, comm.size, comm.backend) == (0, 1, "shm")


def test_create_leaves_the_environment_as_it_was(contradicting_environment):
    for kind in (LocalConfig(), BackendKind.LOCAL, group_of_one()):
        create_communicator(kind).close()
    assert variables() == contradicting_environment


def test_communicators_of_several_kinds_live_side_by_side():
    with (
        create_communicator(group_of_one()) as first,
        create_communicator(LocalConfig()) as local,
        create_communicator(group_of_one(slot_bytes=4096)) as second,
    ):
        assert type(local) is LocalCommunicator
        for comm in (first, local, second, first):
            assert comm.allreduce(np.arange(2000.0)).tolist() == list(range(2000))
        first.close()
        assert second.allreduce(np.ones(3)).tolist() == [1.0, 1.0, 1.0]
