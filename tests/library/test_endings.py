"""How ``train`` ends early: callbacks, failures, cancellation."""

import asyncio
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import cobre_shm
from cobre_shm import IncompatibleSettings, LocalCommunicator, WorkerError, sddp
from cobre_shm.sddp import series_digest
from cobre_shm.sddp.errors import (
    MissingFile,
    OutputError,
    SchemaViolation,
    SolverError,
)
from cobre_shm.sddp.solver import StageSolver
from cobre_shm.spawn.cancellation import Cancellation
from tests.library.conftest import limit
from tests.sddp.editing import hydro_plant, small_case
from tests.sddp.test_stage_lp import hydros

pytestmark = pytest.mark.usefixtures("nothing_global_is_changed")


@pytest.mark.parametrize("workers", [1, 2])
def test_true_from_the_callback_ends_the_training_after_the_next_iteration(case_path, workers):
    result = cobre_shm.train(
        case_path,
        num_workers=workers,
        config_overrides=limit(100_000),
        # numpy's True counts, as of a bound that is compared with a number of numpy's.
        progress_callback=lambda event: np.int64(event.iteration) == 2,
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
    assert "passes.py" in str(caught.value.inner.__cause__)


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


@pytest.mark.parametrize("workers", [1, 2])
def test_asynchronous_training_ends_where_the_callback_has_no_more(case_path, workers):
    events = iter(())
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(
            cobre_shm.train_async(
                case_path, num_workers=workers, progress_callback=lambda _: next(events)
            )
        )


def test_asynchronous_training_raises_what_the_other_raises(case_path):
    with pytest.raises(MissingFile):
        asyncio.run(cobre_shm.train_async(case_path / "absent"))
    with pytest.raises(IncompatibleSettings):
        asyncio.run(cobre_shm.train_async(case_path, backend="local", num_workers=2))


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


def test_cancelled_training_ends_between_two_problems(case_path, monkeypatch):
    """An iteration that would take far longer than the test may."""
    many = {"training": {"forward_passes": 500_000}}
    events, solving = [], threading.Event()
    solve = StageSolver.solve
    monkeypatch.setattr(StageSolver, "solve", lambda *words: solving.set() or solve(*words))

    async def main():
        task = asyncio.create_task(
            cobre_shm.train_async(case_path, config_overrides=many, progress_callback=events.append)
        )
        await asyncio.to_thread(solving.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not events


def test_what_a_check_raises_ends_a_simulation(case_path, alone):
    class Enough(Exception):
        pass

    solved = []

    def check():
        solved.append(1)
        if len(solved) > 100:
            raise Enough

    case = sddp.load_case(case_path)
    with LocalCommunicator() as comm:
        with pytest.raises(Enough):
            sddp.simulate(case, alone.policy.all_cuts(), comm, 1000, check=check)
        # The communicator is as good as before.
        sddp.simulate(case, alone.policy.all_cuts(), comm, 1)


def test_asynchronous_training_that_is_dropped_ends(case_path, monkeypatch):
    """As by a loop that is shut down: the coroutine is closed, and can await nothing."""
    events, started, closing = [], threading.Event(), threading.Event()

    def tell(event):
        events.append(event)
        started.set()
        closing.wait(5)

    async def main():
        training = cobre_shm.train_async(
            case_path, config_overrides=limit(30), progress_callback=tell
        )
        training.send(None)
        await asyncio.to_thread(started.wait)
        training.close()

    request = Cancellation.request

    def request_and_go_on(self):
        request(self)
        closing.set()

    monkeypatch.setattr(Cancellation, "request", request_and_go_on)
    asyncio.run(main())
    assert len(events) < 30
