"""``train`` and ``simulate`` from a program: where they run, what they return, how they fail."""

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import cobre_shm
from cobre_shm import IncompatibleSettings, LocalCommunicator, WorkerError
from cobre_shm.errors import BackendNotAvailable, CobreError, InvalidBackend
from cobre_shm.sddp import load_case, series_digest
from cobre_shm.sddp.errors import (
    CaseError,
    MissingFile,
    OutOfRange,
    OutputError,
    SchemaViolation,
    SolverError,
)
from cobre_shm.spawn.errors import InvalidArguments
from tests.library.conftest import limit
from tests.sddp.editing import hydro_plant, small_case
from tests.sddp.test_stage_lp import hydros

ROOT = Path(__file__).resolve().parents[2]


def variables():
    # pytest itself notes the stage of a test there.
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(autouse=True)
def nothing_global_is_changed():
    before = variables(), multiprocessing.get_start_method(allow_none=True), Path.cwd()
    yield
    after = variables(), multiprocessing.get_start_method(allow_none=True), Path.cwd()
    assert after == before


@pytest.fixture
def alone(case_path):
    """The result in this process."""
    return cobre_shm.train(case_path, config_overrides=limit(3))


def test_one_worker_is_this_process(alone):
    assert (alone.backend, alone.ranks, alone.workers) == ("local", 1, None)
    assert (alone.iterations, alone.stop_reason, alone.converged) == (3, "iteration_limit", False)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_find_the_same_bits(case_path, alone, workers):
    events = []
    result = cobre_shm.train(
        case_path, num_workers=workers, config_overrides=limit(3), progress_callback=events.append
    )
    assert series_digest(result.details) == series_digest(alone.details)
    assert result.policy.cuts(0).intercept.tobytes() == alone.policy.cuts(0).intercept.tobytes()
    assert (result.backend, result.ranks) == ("shm", workers)
    assert [worker.rank for worker in result.workers] == list(range(workers))
    assert len({worker.pid for worker in result.workers} | {os.getpid()}) == workers + 1
    assert sum(worker.lp_solves for worker in result.workers) == result.lp_solves
    for worker in result.workers:
        assert worker.backend == "shm"
        assert 0 <= worker.wait_share <= 1
        assert worker.seconds > 0
        assert not Path(f"/proc/{worker.pid}").exists()
        mine = [event for event in events if event.worker_id == worker.rank]
        assert [event.iteration for event in mine] == [1, 2, 3]
        assert [event.lower_bound for event in mine] == list(result.history["lower_bound"])
    assert {event.iteration_limit for event in events} == {3}


def test_loaded_case_and_path_are_the_same(case_path, alone):
    loaded = load_case(case_path, limit(3))
    result = cobre_shm.train(loaded, num_workers=2)
    assert series_digest(result.details) == series_digest(alone.details)
    assert result.case is loaded


def test_communicator_can_be_given(case_path, alone):
    with LocalCommunicator() as comm:
        result = cobre_shm.train(case_path, comm=comm, config_overrides=limit(3))
        comm.barrier()
    assert series_digest(result.details) == series_digest(alone.details)


def test_group_of_one_over_shared_memory(case_path, alone):
    result = cobre_shm.train(case_path, backend="shm", config_overrides=limit(3))
    assert result.backend == "shm"
    assert series_digest(result.details) == series_digest(alone.details)


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


def test_history_in_other_forms(alone):
    history = alone.history
    assert history.dtype.names[:2] == ("iteration", "lower_bound")
    assert history["iteration"].tolist() == [1, 2, 3]
    assert history["iteration"].dtype == np.int64
    assert history[-1]["lower_bound"] == alone.lower_bound
    table = history.to_arrow()
    assert table.column_names == list(history.dtype.names)
    pandas = pytest.importorskip("pandas")
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["gap_percent"].to_numpy().tolist() == history["gap_percent"].tolist()
    assert frame.to_dict("list") == table.to_pydict()


def test_history_without_pandas_names_the_package(alone, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CobreError, match="pip install pandas"):
        alone.history.to_pandas()


def test_policy_is_the_highest_cut(alone):
    policy, cuts = alone.policy, alone.policy.cuts(0)
    state = alone.case.initial_state
    values = [float(i + c @ state) for i, c in zip(cuts.intercept, cuts.coefficients, strict=True)]
    assert policy.evaluate(0, state) == pytest.approx(max(values), rel=1e-12)
    assert policy.evaluate(policy.stages[-1], state) == 0.0
    with pytest.raises(OutOfRange, match="no stage 99"):
        policy.cuts(99)
    with pytest.raises(OutOfRange, match="components"):
        policy.evaluate(0, [1.0] * 50)


def test_policy_is_saved_and_loaded(case_path, alone, tmp_path):
    alone.policy.save(tmp_path / "saved")
    cobre_shm.train(case_path, config_overrides=limit(3), output_dir=tmp_path / "out")
    for folder in (tmp_path / "saved", tmp_path / "out" / "policy"):
        policy = cobre_shm.Policy.load(folder)
        assert policy.stages == alone.policy.stages
        assert policy.components == tuple(alone.policy.components)
        for stage in policy.stages:
            mine, theirs = policy.cuts(stage), alone.policy.cuts(stage)
            for name in ("intercept", "coefficients", "iteration", "scenario"):
                assert getattr(mine, name).tobytes() == getattr(theirs, name).tobytes()


def test_policy_that_is_none_is_refused(tmp_path):
    with pytest.raises(MissingFile):
        cobre_shm.Policy.load(tmp_path)
    (tmp_path / "state.json").write_text('{"components": [], "stage_ids": [0]}')
    (tmp_path / "cuts.parquet").write_text("x")
    with pytest.raises(CaseError):
        cobre_shm.Policy.load(tmp_path)


def test_simulation_is_the_same_on_workers(case_path, alone, tmp_path):
    alone.policy.save(tmp_path / "saved")
    one = cobre_shm.simulate(case_path, alone, scenarios=5)
    other = cobre_shm.simulate(
        case_path,
        tmp_path / "saved",
        scenarios=5,
        num_workers=2,
        output_dir=tmp_path / "out",
    )
    assert one.total_cost.tobytes() == other.total_cost.tobytes()
    assert (tmp_path / "out" / "simulation" / "costs.parquet").is_file()


def test_result_shows_itself(case_path, alone):
    text = repr(alone)
    assert f"{alone.lower_bound:,.2f} $" in text
    assert "3 iterations" in text
    page = alone._repr_html_()
    assert "<table>" in page
    assert "<svg" in page
    assert page.count("<polyline") == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_true_from_the_callback_ends_the_training_after_the_next_iteration(case_path, workers):
    result = cobre_shm.train(
        case_path,
        num_workers=workers,
        config_overrides=limit(100_000),
        progress_callback=lambda event: event.iteration == 2,
    )
    assert result.stop_reason == "interrupted"
    assert result.iterations >= 3
    if workers == 1:
        assert result.iterations == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_exception_in_the_callback_ends_the_training(case_path, workers):
    class Enough(Exception):
        pass

    def callback(event):
        raise Enough(event.iteration)

    with pytest.raises(Enough, match="1"):
        cobre_shm.train(
            case_path,
            num_workers=workers,
            config_overrides=limit(100_000),
            progress_callback=callback,
        )


def child_with(variable):
    """The child of this thread with this in its environment."""
    thread = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    (pid,) = [
        int(child)
        for child in thread.read_text().split()
        if f"{variable}\0".encode() in Path(f"/proc/{child}/environ").read_bytes()
    ]
    return pid


def test_death_of_a_worker_ends_the_training(case_path):
    def kill(event):
        if event.worker_id == 1 and event.iteration == 1:
            os.kill(child_with("COBRE_SHM_RANK=1"), 9)

    with pytest.raises(WorkerError) as caught:
        cobre_shm.train(
            case_path, num_workers=3, config_overrides=limit(100_000), progress_callback=kill
        )
    error = caught.value
    assert (error.rank, error.signal, error.exit_code, error.inner) == (1, 9, -9, None)


def test_exception_of_a_worker_is_its_own(tmp_path):
    small = small_case(tmp_path / "small")
    # More water must leave than there is, and nothing may fill it up.
    hydros(small, hydro_plant(0), inflow=[-5.0])
    with pytest.raises(WorkerError) as caught:
        cobre_shm.train(small, num_workers=2)
    assert isinstance(caught.value.inner, SolverError)
    assert caught.value.inner.context["iteration"] == 1
    assert "training.py" in str(caught.value.inner.__cause__)


@pytest.mark.parametrize("workers", [1, 2])
def test_training_goes_on_from_a_checkpoint(case_path, tmp_path, alone, workers):
    checkpoints = {"checkpointing": {"enabled": True, "interval_iterations": 1}}
    first = cobre_shm.train(
        case_path,
        num_workers=3 - workers,
        config_overrides={**limit(2), "policy": checkpoints},
        output_dir=tmp_path / "out",
    )
    assert first.iterations == 2
    events = []
    result = cobre_shm.train(
        case_path,
        num_workers=workers,
        config_overrides={**limit(3), "policy": checkpoints},
        output_dir=tmp_path / "out",
        resume=True,
        progress_callback=events.append,
    )
    assert {event.iteration for event in events} == {3}
    assert series_digest(result.details) == series_digest(alone.details)


def test_mistakes_of_the_case_are_found_before_anything_is_started(case_path, monkeypatch):
    monkeypatch.setattr("cobre_shm.api.place.ShmMeeting", None)
    with pytest.raises(MissingFile):
        cobre_shm.train(case_path / "absent", num_workers=2)
    with pytest.raises(SchemaViolation):
        cobre_shm.train(
            case_path, num_workers=2, config_overrides={"training": {"stopping_rules": []}}
        )
    file = case_path / "config.json"
    with pytest.raises(OutputError):
        cobre_shm.train(case_path, num_workers=2, output_dir=file)


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
        ({"comm": LocalCommunicator(), "num_workers": 2}, "comm="),
        ({"comm": LocalCommunicator(), "backend": "shm"}, "comm="),
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


def test_overrides_of_a_loaded_case_are_refused(case_path):
    with pytest.raises(IncompatibleSettings, match=r"load_case\(path, config_overrides\)"):
        cobre_shm.train(load_case(case_path), config_overrides=limit(1))


def test_user_who_chose_fork_is_told(case_path):
    code = (
        "import multiprocessing, sys, cobre_shm\n"
        "multiprocessing.set_start_method('fork')\n"
        "try: cobre_shm.train(sys.argv[1], num_workers=2)\n"
        "except cobre_shm.IncompatibleSettings as error: print(error)\n"
        "print(cobre_shm.train(sys.argv[1]).backend, multiprocessing.get_start_method())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(case_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "set_start_method('spawn', force=True)" in done.stdout
    assert done.stdout.endswith("local fork\n")


def test_two_trainings_at_once_over_different_backends(case_path, alone):
    found = {}

    def call(workers):
        found[workers] = cobre_shm.train(case_path, num_workers=workers, config_overrides=limit(3))

    threads = [threading.Thread(target=call, args=(workers,)) for workers in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[workers].backend for workers in (1, 2)] == ["local", "shm"]
    for result in found.values():
        assert series_digest(result.details) == series_digest(alone.details)


def test_asynchronous_training_leaves_the_loop_free(case_path, alone):
    async def main():
        turns = 0
        task = asyncio.create_task(
            cobre_shm.train_async(case_path, num_workers=2, config_overrides=limit(3))
        )
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        return await task, turns

    result, turns = asyncio.run(main())
    assert series_digest(result.details) == series_digest(alone.details)
    assert turns > 3


@pytest.mark.parametrize("workers", [1, 2])
def test_cancelled_training_leaves_nothing(case_path, workers):
    """That nothing is left is seen by the fixture of every test."""

    async def main():
        started = threading.Event()
        task = asyncio.create_task(
            cobre_shm.train_async(
                case_path,
                num_workers=workers,
                config_overrides=limit(100_000),
                progress_callback=lambda event: started.set(),
            )
        )
        while not started.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_asynchronous_training_raises_what_the_other_raises(case_path):
    with pytest.raises(MissingFile):
        asyncio.run(cobre_shm.train_async(case_path / "absent"))
    with pytest.raises(IncompatibleSettings):
        asyncio.run(cobre_shm.train_async(case_path, backend="local", num_workers=2))


def test_training_alone_imports_no_other_backend(case_path):
    code = (
        "import sys, cobre_shm\n"
        "cobre_shm.train(sys.argv[1], config_overrides={'training': {'forward_passes': 1}})\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(case_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    others = {"cobre_shm.shm", "cobre_shm.segment", "cobre_shm.kernels", "cobre_net"}
    assert not loaded & (others | {"numba", "posix_ipc", "mpi4py", "pandas", "mcp"})


@pytest.mark.parametrize("arguments", [{"backend": "tcp"}, {"coordinator": "127.0.0.1:0"}])
def test_workers_over_tcp_find_the_same_bits(case_path, alone, arguments):
    if arguments.get("coordinator"):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            arguments = {"coordinator": f"127.0.0.1:{probe.getsockname()[1]}"}
    result = cobre_shm.train(case_path, num_workers=2, config_overrides=limit(3), **arguments)
    assert (result.backend, result.ranks) == ("tcp", 2)
    assert series_digest(result.details) == series_digest(alone.details)
    assert all(worker.backend == "tcp" for worker in result.workers)


def test_ranks_of_a_tcp_group_that_is_started_elsewhere(case_path, alone):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
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
    with socket.create_server(("127.0.0.1", 0)) as probe:
        monkeypatch.setenv("COBRE_TCP_COORDINATOR", "127.0.0.1")
        monkeypatch.setenv("COBRE_TCP_PORT", str(probe.getsockname()[1]))
    result = cobre_shm.train(case_path, num_workers=2, config_overrides=limit(1))
    assert result.backend == "tcp"
    assert cobre_shm.train(case_path, config_overrides=limit(1)).backend == "local"


def test_death_of_a_tcp_worker_ends_the_training(case_path):
    def kill(event):
        if event.worker_id == 1 and event.iteration == 1:
            os.kill(child_with("COBRE_TCP_RANK=1"), 9)

    with pytest.raises(WorkerError) as caught:
        cobre_shm.train(
            case_path,
            backend="tcp",
            num_workers=3,
            config_overrides=limit(100_000),
            progress_callback=kill,
        )
    assert (caught.value.rank, caught.value.signal) == (1, 9)


def test_user_of_another_context_has_not_chosen_fork(case_path):
    """Starting a process by a context of one's own sets the global method behind one's back."""
    code = (
        "import multiprocessing, os, sys, cobre_shm\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=os.getpid)\n"
        "    process.start(); process.join()\n"
        "    print(cobre_shm.train(sys.argv[1], num_workers=2).backend)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(case_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "shm\n", done.stderr
