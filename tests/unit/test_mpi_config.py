"""The mpi backend's configuration; MPI itself is not needed for it."""

import pytest

from cobre_shm.errors import InitializationFailed
from cobre_shm.selection.kinds import MpiConfig


def test_environment_fills_the_configuration():
    assert MpiConfig.from_env({}) == MpiConfig()
    env = {"COBRE_MPI_HIERARCHICAL": "0", "COBRE_MPI_CHECK": "1"}
    assert MpiConfig.from_env(env) == MpiConfig(hierarchical=False, check=True)
    assert MpiConfig.from_env({"COBRE_MPI_HIERARCHICAL": " Auto "}).hierarchical == "auto"


def test_groups_of_the_nodes_are_shaped_as_those_of_shm(monkeypatch, tmp_path):
    # Where "auto" looks: the user may have tuned.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    env = {
        "COBRE_SHM_HUGEPAGES": "Always",
        "COBRE_SHM_NUMA_INTERLEAVE": "1",
        "COBRE_SHM_TUNING": "auto",
        "COBRE_SHM_RANK": "not ours",
    }
    expected = MpiConfig(hugepages="always", numa_interleave=True, tuning="auto")
    assert MpiConfig.from_env(env) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("COBRE_MPI_HIERARCHICAL", "yes", "auto, 1 or 0"),
        ("COBRE_MPI_CHECK", "auto", "1 or 0"),
        ("COBRE_MPI_CHECK", "2", "1 or 0"),
        ("COBRE_SHM_HUGEPAGES", "some", "one of auto, never, always"),
    ],
)
def test_malformed_variable_is_quoted(name, value, expected):
    with pytest.raises(InitializationFailed, match=f"{name}='{value}'.*expected {expected}"):
        MpiConfig.from_env({name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"hierarchical": "yes"},
        {"hierarchical": 1},
        {"check": "auto"},
        {"node": -1},
        {"hugepages": "some"},
        {"tuning": 7},
    ],
)
def test_wrong_field_is_refused(fields):
    (name,) = fields
    with pytest.raises(InitializationFailed, match=f"MpiConfig.{name}="):
        MpiConfig(**fields)
