"""Where ``train`` runs: this process, workers of each kind, groups; what does not go together."""

import os
import subprocess
import sys
import threading

import pytest

import cobre_shm
from cobre_shm import BackendKind, IncompatibleSettings, LocalCommunicator
from cobre_shm.api import place
from cobre_shm.api.place import find_place
from cobre_shm.errors import BackendNotAvailable, InitializationFailed, InvalidBackend
from cobre_shm.sddp import series_digest
from cobre_shm.spawn.errors import InvalidArguments
from tests.library.conftest import ROOT, limit, program
from tests.support.backends import free_port

pytestmark = pytest.mark.usefixtures("nothing_global_is_changed")


def test_environment_plays_no_part(case_path, monkeypatch):
    for name, value in {
        "COBRE_COMM_BACKEND": "nonsense",
        "COBRE_SHM_NAME": "not/a/name",
        "COBRE_SHM_RANK": "two",
        "PMI_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert cobre_shm.train(case_path, config_overrides=limit(1)).backend == "local"
    result = cobre_shm.train(case_path, num_workers=2, config_overrides=limit(1))
    assert result.backend == "shm"


def test_kind_of_backend_is_as_good_as_its_name(case_path):
    assert find_place(BackendKind.SHM, 2, None, None, None, None).backend == "shm"


@pytest.mark.parametrize("given", ["", "what all ranks know"])
def test_workers_over_tcp_have_a_secret(monkeypatch, given):
    monkeypatch.setenv("COBRE_TCP_SECRET", given)
    place = find_place("tcp", 2, f"127.0.0.1:{free_port()}", None, None, None)
    with place.meeting() as meeting:
        number = meeting.variables(1)["COBRE_TCP_SECRET_FILE"].removeprefix("fd:")
        secret = os.pread(int(number), 1000, 0).decode()
    assert secret == given or (not given and len(secret) == 64)


def test_group_of_one_over_shared_memory(case_path, alone):
    result = cobre_shm.train(case_path, backend="shm", config_overrides=limit(3))
    assert result.backend == "shm"
    assert series_digest(result.details) == series_digest(alone.details)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backend": "local", "num_workers": 2}, "shm"),
        ({"backend": "mpi", "num_workers": 2}, "mpi"),
        ({"backend": "tcp"}, "coordinator="),
        ({"backend": "shm", "coordinator": "h", "rank": 0, "size": 2}, "tcp"),
        ({"backend": "tcp", "coordinator": "h"}, "rank, size"),
        ({"num_workers": 2, "rank": 0}, "rank="),
        ({"backend": "shm", "num_workers": 2, "coordinator": "h"}, "coordinator="),
        ({"resume": True}, "output_dir="),
        ({"num_workers": 2, "config_overrides": {"policy": {"mode": "resume"}}}, "policy.mode"),
        ({"comm": LocalCommunicator(), "num_workers": 2}, "comm="),
        ({"comm": LocalCommunicator(), "backend": "shm"}, "comm="),
        ({"backend": None}, "expected a name"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(case_path, arguments, text):
    with pytest.raises((IncompatibleSettings, BackendNotAvailable)) as caught:
        cobre_shm.train(case_path, **arguments)
    assert caught.value.kind == "IncompatibleSettings"
    assert text in str(caught.value)


def test_unknown_backend_and_number_are_refused(case_path):
    with pytest.raises(InvalidBackend, match="shmm"):
        cobre_shm.train(case_path, backend="shmm", num_workers=2)
    with pytest.raises(InvalidBackend, match="shmm"):
        cobre_shm.train(case_path, backend="shmm")
    with pytest.raises(InvalidArguments, match="num_workers=0"):
        cobre_shm.train(case_path, num_workers=0)


@pytest.mark.parametrize(
    ("address", "port", "coordinator"),
    [("node-1", "", "node-1:29500"), ("node-1", "9000", "node-1:9000"), ("::1", "1", "[::1]:1")],
)
def test_workers_meet_at_the_coordinator_of_the_environment(
    monkeypatch, address, port, coordinator
):
    monkeypatch.setenv("COBRE_TCP_COORDINATOR", address)
    monkeypatch.setenv("COBRE_TCP_PORT", port)
    place = find_place("auto", 2, None, None, None, None)
    assert (place.backend, place.coordinator) == ("tcp", coordinator)


@pytest.mark.parametrize("port", ["29500x", "70000", "-1", "\u0661"])
def test_port_of_the_environment_that_is_none_is_quoted(monkeypatch, port):
    monkeypatch.setenv("COBRE_TCP_COORDINATOR", "node-1")
    monkeypatch.setenv("COBRE_TCP_PORT", port)
    with pytest.raises(InitializationFailed) as caught:
        find_place("auto", 2, None, None, None, None)
    assert caught.value.context["setting"] == "COBRE_TCP_PORT"
    assert caught.value.context["value"] == port


def test_rank_of_a_group_takes_the_secret_and_the_limits_of_the_environment(monkeypatch):
    """Else a group that is not on loopback could not be joined from here."""
    for name, value in {
        "COBRE_TCP_COORDINATOR": "elsewhere",
        "COBRE_TCP_PORT": "1",
        "COBRE_TCP_RANK": "3",
        "COBRE_TCP_SIZE": "4",
        "COBRE_TCP_SECRET": "known to the group",
        "COBRE_TCP_TIMEOUT_SECS": "7",
    }.items():
        monkeypatch.setenv(name, value)
    config = find_place("tcp", 1, "node-1", 1, 2, None).config
    assert (config.coordinator, config.port, config.rank, config.size) == ("node-1", 29500, 1, 2)
    assert (config.secret, config.timeout_secs) == ("known to the group", 7.0)
    assert find_place("tcp", 1, "[::1]:9000", 0, 2, None).config.port == 9000
    with pytest.raises(InitializationFailed, match=r"TcpConfig\.rank"):
        find_place("tcp", 1, "node-1", 2, 2, None)


def test_user_who_chose_fork_is_told(case_path):
    code = (
        "import multiprocessing, sys, cobre_shm\n"
        "multiprocessing.set_start_method('fork')\n"
        "try: cobre_shm.train(sys.argv[1], num_workers=2)\n"
        "except cobre_shm.IncompatibleSettings as error: print(error)\n"
        "print(cobre_shm.train(sys.argv[1]).backend, multiprocessing.get_start_method())"
    )
    done = program(code, case_path)
    assert done.returncode == 0, done.stderr
    assert "set_start_method('spawn', force=True)" in done.stdout
    assert done.stdout.endswith("local fork\n")


@pytest.mark.parametrize(
    "accident",
    [
        "multiprocessing.get_context('spawn').Process(target=os.getpid).start()",
        "multiprocessing.Process(target=os.getpid).start()",
        # As progress bars do.
        "multiprocessing.RLock()",
        "multiprocessing.Queue().close()",
        "concurrent.futures.ProcessPoolExecutor(1).submit(os.getpid).result()",
    ],
)
def test_user_of_multiprocessing_has_not_chosen_fork(accident):
    """Each of these sets the global method behind the user's back where fork is the default."""
    code = (
        "import concurrent.futures, multiprocessing, os\n"
        "from cobre_shm.api.place import find_place\n"
        "if __name__ == '__main__':\n"
        f"    {accident}\n"
        "    print(find_place('auto', 2, None, None, None, None).backend)"
    )
    assert "shm\n" in (done := program(code)).stdout, done.stderr


def test_trainings_at_once_over_different_backends(case_path, alone):
    calls = {
        "local": {},
        "shm": {"num_workers": 2},
        "tcp": {"num_workers": 2, "backend": "tcp"},
    }
    found = {}

    def call(name):
        found[name] = cobre_shm.train(case_path, config_overrides=limit(3), **calls[name])

    threads = [threading.Thread(target=call, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: result.backend for name, result in found.items()} == {n: n for n in calls}
    assert {series_digest(r.details) for r in found.values()} == {series_digest(alone.details)}


def test_training_alone_imports_no_other_backend(case_path):
    code = (
        "import sys, cobre_shm\n"
        "cobre_shm.train(sys.argv[1], config_overrides={'training': {'forward_passes': 1}})\n"
        "print(*sys.modules)"
    )
    done = program(code, case_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    others = {"cobre_shm.shm", "cobre_shm.segment", "cobre_shm.kernels", "cobre_net"}
    assert not loaded & (others | {"numba", "posix_ipc", "mpi4py", "pandas", "mcp"})


@pytest.mark.parametrize("arguments", [{"backend": "tcp"}, {"coordinator": "127.0.0.1:0"}])
def test_workers_over_tcp_find_the_same_bits(case_path, alone, arguments):
    if arguments.get("coordinator"):
        arguments = {"coordinator": f"127.0.0.1:{free_port()}"}
    result = cobre_shm.train(case_path, num_workers=2, config_overrides=limit(3), **arguments)
    assert (result.backend, result.ranks) == ("tcp", 2)
    assert series_digest(result.details) == series_digest(alone.details)
    assert all(worker.backend == "tcp" for worker in result.workers)


def test_ranks_of_a_tcp_group_that_is_started_elsewhere(case_path, alone):
    address = f"127.0.0.1:{free_port()}"
    found = {}

    def be(rank):
        found[rank] = cobre_shm.train(
            case_path,
            backend="tcp",
            coordinator=address,
            rank=rank,
            size=2,
            config_overrides=limit(3),
        )

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[rank].ranks for rank in range(2)] == [2, 2]
    for result in found.values():
        assert series_digest(result.details) == series_digest(alone.details)


def test_coordinator_of_the_environment_means_tcp_for_several_workers(case_path, monkeypatch):
    monkeypatch.setenv("COBRE_TCP_COORDINATOR", "127.0.0.1")
    monkeypatch.setenv("COBRE_TCP_PORT", str(free_port()))
    result = cobre_shm.train(case_path, num_workers=2, config_overrides=limit(1))
    assert result.backend == "tcp"
    assert cobre_shm.train(case_path, config_overrides=limit(1)).backend == "local"


@pytest.mark.parametrize("way", ["script", "-c", "stdin", "interactive"])
def test_program_without_a_guard_trains_on_workers(case_path, tmp_path, way):
    code = (
        "import cobre_shm\n"
        "rule = {'type': 'iteration_limit', 'limit': 2}\n"
        "few = {'training': {'stopping_rules': [rule]}}\n"
        f"result = cobre_shm.train({str(case_path)!r}, num_workers=2, config_overrides=few)\n"
        "print('trained', result.iterations, result.backend)\n"
    )
    (tmp_path / "program.py").write_text(code)
    words = {
        "script": [str(tmp_path / "program.py")],
        "-c": ["-c", code],
        "stdin": ["-"],
        "interactive": ["-i", "-q"],
    }[way]
    done = subprocess.run(
        [sys.executable, *words],
        input=code,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("trained 2 shm") == 1


def test_address_of_a_rank_of_the_launcher_is_not_for_its_workers(monkeypatch):
    monkeypatch.setenv("COBRE_TCP_COORDINATOR", "127.0.0.1:29555")
    assert place._coordinator_of_environment() == "127.0.0.1:29555"
    monkeypatch.setenv("COBRE_TCP_REPORT", "fd:9")
    assert place._coordinator_of_environment() is None
