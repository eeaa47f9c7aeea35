import json
from pathlib import Path

import pytest

from cobre_shm.cpus import cgroup_quota, count_cpus

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def rank_environments(spawn, size, **env):
    done = spawn.run("-n", size, "-c", SHOW, env=env)
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    return sorted(seen, key=lambda variables: int(variables["RANK"]))


def test_every_rank_knows_its_place(spawn):
    seen = rank_environments(spawn, 3)
    assert len({variables["COBRE_SHM_NAME"] for variables in seen}) == 1
    for rank, variables in enumerate(seen):
        assert variables["COBRE_COMM_BACKEND"] == "shm"
        for name in ("COBRE_SHM_RANK", "RANK", "LOCAL_RANK"):
            assert variables[name] == str(rank)
        for name in ("COBRE_SHM_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            assert variables[name] == "3"


def test_two_runs_have_two_names(spawn):
    first, second = rank_environments(spawn, 1), rank_environments(spawn, 1)
    assert first[0]["COBRE_SHM_NAME"] != second[0]["COBRE_SHM_NAME"]


def test_variables_of_another_launcher_do_not_reach_ranks(spawn):
    foreign = (
        "PMI_RANK",
        "PMI_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "MPI_LOCALRANKID",
        "SLURM_PROCID",
        "COBRE_TCP_COORDINATOR",
        "COBRE_TCP_RANK",
    )
    (variables,) = rank_environments(spawn, 1, **dict.fromkeys(foreign, "1"))
    assert [name for name in foreign if name in variables] == []


def test_variables_of_an_outer_run_are_replaced(spawn):
    outer = {"COBRE_COMM_BACKEND": "mpi", "COBRE_SHM_NAME": "/outer", "COBRE_SHM_RANK": "5"}
    (variables,) = rank_environments(spawn, 1, **outer, RANK="5", WORLD_SIZE="6")
    assert variables["COBRE_COMM_BACKEND"] == "shm"
    assert variables["COBRE_SHM_NAME"] != "/outer"
    assert (variables["COBRE_SHM_RANK"], variables["RANK"]) == ("0", "0")
    assert variables["WORLD_SIZE"] == "1"


def test_defaults_give_way_to_the_user(spawn, monkeypatch):
    names = (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "PYTHONFAULTHANDLER",
        "PYTHONUNBUFFERED",
    )
    for name in names:
        monkeypatch.delenv(name, raising=False)
    (variables,) = rank_environments(spawn, 1)
    assert {variables[name] for name in names} == {"1"}
    (variables,) = rank_environments(spawn, 1, **dict.fromkeys(names, "7"))
    assert {variables[name] for name in names} == {"7"}


def test_other_variables_pass_unchanged(spawn):
    extra = {"COBRE_SHM_TIMEOUT_SECS": "5", "OTHER": "ü = \n", "SLURM_JOB_ID": "9"}
    (variables,) = rank_environments(spawn, 1, **extra)
    assert {name: variables[name] for name in extra} == extra


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        # The tightest of all ancestors counts.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        # In a container the path may be the host's; its own group is then the root.
        ("0::/not/here\n", {"cpu.max": "200000 100000"}, 2.0),
        ("4:memory:/\n3:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1"}, None),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "300000"}, None),
        ("0::/\n", {"cpu.max": "garbage"}, None),
    ],
)
def test_quota_of_the_control_group_is_read(tmp_path, membership, files, quota):
    write(tmp_path / "membership", membership)
    for name, text in files.items():
        write(tmp_path / "mount" / name, text)
    assert cgroup_quota(tmp_path / "membership", tmp_path / "mount") == quota


@pytest.mark.parametrize(("quota", "count"), [(0.2, 1), (1.5, 2), (2.0, 2), (9.0, 4), (None, 4)])
def test_number_of_cpus_is_the_smaller_limit(monkeypatch, quota, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("cobre_shm.cpus.cgroup_quota", lambda *_: quota)
    assert count_cpus() == count


def test_number_of_cpus_without_control_groups_is_the_affinity(tmp_path):
    assert cgroup_quota(tmp_path / "absent", tmp_path) is None
