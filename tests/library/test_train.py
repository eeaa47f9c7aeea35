"""What ``train`` and ``simulate`` return, for a case in every form."""

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import cobre_shm
from cobre_shm import LocalCommunicator, sddp
from cobre_shm.api import training
from cobre_shm.errors import CobreError, WorkerError
from cobre_shm.sddp import load_case, series_digest
from cobre_shm.sddp.case import with_overrides
from cobre_shm.sddp.errors import (
    CaseError,
    CheckpointError,
    MissingFile,
    OutOfRange,
    OutputError,
    SolverError,
    TypeMismatch,
)
from tests.library.conftest import limit
from tests.sddp.test_failures import without_water
from tests.sddp.threads import run_ranks

pytestmark = pytest.mark.usefixtures("nothing_global_is_changed")


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


def test_policy_is_at_least_zero(alone):
    """As the future cost is in a stage's problem."""
    cuts, size = alone.policy.cuts(0), len(alone.policy.components)
    low = replace(
        cuts,
        intercept=np.array([-5.0]),
        coefficients=np.zeros((1, size)),
        iteration=cuts.iteration[:1],
        scenario=cuts.scenario[:1],
    )
    policy = cobre_shm.Policy([0], [low], alone.policy.components)
    assert policy.evaluate(0, np.zeros(size)) == 0.0


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
    for mine, theirs in zip(one.stages, other.stages, strict=True):
        for field in fields(mine):
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            assert (a.shape, a.tobytes()) == (b.shape, b.tobytes())
    assert (tmp_path / "out" / "simulation" / "costs.parquet").is_file()


def test_only_rank_zero_needs_to_see_a_policy(case_path, alone, tmp_path):
    alone.policy.save(tmp_path / "saved")
    one = cobre_shm.simulate(case_path, alone, scenarios=5)

    def simulate(comm, seeing):
        folder = tmp_path / ("saved" if comm.rank == seeing else "absent")
        return cobre_shm.simulate(case_path, folder, scenarios=5, comm=comm)

    for result in run_ranks(3, lambda comm: simulate(comm, 0)):
        assert result.total_cost.tobytes() == one.total_cost.tobytes()
    for error in run_ranks(3, lambda comm: simulate(comm, 1)):
        assert isinstance(error, MissingFile)
    shipped = sddp.shipped_case_path()
    for error in run_ranks(
        2, lambda comm: cobre_shm.simulate(shipped, tmp_path / "saved", scenarios=1, comm=comm)
    ):
        assert isinstance(error, CheckpointError)


def test_result_shows_itself(case_path, alone):
    text = repr(alone)
    assert f"{alone.lower_bound:,.2f} $" in text
    assert "3 iterations" in text
    page = alone._repr_html_()
    assert "<table>" in page
    assert "<svg" in page
    assert page.count("<polyline") == 2


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


@pytest.mark.parametrize("workers", [1, 2])
def test_overrides_of_a_loaded_case_leave_it_as_it_is(case_path, alone, workers):
    loaded = load_case(case_path)
    limit_before = loaded.config.iteration_limit
    result = cobre_shm.train(loaded, num_workers=workers, config_overrides=limit(3))
    assert series_digest(result.details) == series_digest(alone.details)
    assert result.case.config.iteration_limit == 3
    assert loaded.config.iteration_limit == limit_before != 3
    # What was given before holds on, beside what is given now.
    seed = {"training": {"tree_seed": 7}}
    again = cobre_shm.train(result.case, num_workers=workers, config_overrides=seed)
    both = {"training": {**limit(3)["training"], **seed["training"]}}
    other = cobre_shm.train(case_path, config_overrides=both)
    assert series_digest(again.details) == series_digest(other.details)
    assert again.case.digest == other.case.digest != loaded.digest


def test_wrong_overrides_of_a_loaded_case_are_refused(case_path):
    loaded = load_case(case_path)
    with pytest.raises(OutOfRange) as caught:
        cobre_shm.train(loaded, config_overrides={"training": {"forward_passes": 0}})
    assert caught.value.context["file"] == "config.json"
    for case in (loaded, case_path):
        with pytest.raises(TypeMismatch, match="JSON values only"):
            cobre_shm.train(case, config_overrides={"training": {"forward_passes": {1, 2}}})
        for overrides in ([1], "training"):
            with pytest.raises(TypeMismatch, match="must be a mapping, not"):
                cobre_shm.train(case, config_overrides=overrides)


def test_overrides_have_names_as_in_the_file(case_path):
    changes = [{"training": {"note": {name: 1, "b": 2}}} for name in (1, "1")]
    digests = {load_case(case_path, change).digest for change in changes}
    digests |= {with_overrides(load_case(case_path), change).digest for change in changes}
    assert len(digests) == 1


def test_simulation_of_a_loaded_case_takes_overrides(case_path, alone):
    loaded = load_case(case_path)
    few = {"simulation": {"enabled": True, "num_scenarios": 3}}
    result = cobre_shm.simulate(loaded, alone, config_overrides=few)
    assert len(result.total_cost) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_place_of_a_simulation_is_checked_before_the_work(
    case_path, alone, tmp_path, monkeypatch, workers
):
    def fail(*_args, **_options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(training.sddp, "simulate", fail)
    monkeypatch.setattr(training, "_on_workers", fail)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        cobre_shm.simulate(case_path, alone, num_workers=workers, output_dir=tmp_path / "file")


@pytest.mark.parametrize("workers", [1, 2])
def test_insoluble_problem_of_a_simulation_is_kept(case_path, alone, tmp_path, workers):
    cuts = [replace(cuts, coefficients=cuts.coefficients[:, :3]) for cuts in alone.details.cuts]
    without_water(case_path)
    out = tmp_path / "out"
    with pytest.raises((SolverError, WorkerError)) as caught:
        cobre_shm.simulate(case_path, cuts, scenarios=2, num_workers=workers, output_dir=out)
    error = caught.value if workers == 1 else caught.value.inner
    (kept,) = (out / "failed").iterdir()
    assert error.context["lp_file"] == str(kept)


def test_policy_of_another_case_is_not_simulated(case_path, alone):
    with pytest.raises(CheckpointError, match="does not fit"):
        cobre_shm.simulate(sddp.shipped_case_path(), alone, scenarios=1)
    with pytest.raises(ValueError, match="stages"):
        cobre_shm.simulate(case_path, alone.policy.all_cuts()[:1], scenarios=1)
    narrow = [replace(cuts, coefficients=cuts.coefficients[:, :1]) for cuts in alone.details.cuts]
    with pytest.raises(ValueError, match="coefficients"):
        cobre_shm.simulate(case_path, narrow, scenarios=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_number_of_scenarios_is_checked_before_any_worker_starts(case_path, alone, workers):
    with pytest.raises(ValueError, match=r"asks for no simulation .*: give scenarios="):
        cobre_shm.simulate(case_path, alone, num_workers=workers)
    for count in (0, 2**31):
        with pytest.raises(ValueError, match=f"from 1 to .*, not {count}"):
            cobre_shm.simulate(case_path, alone, scenarios=count, num_workers=workers)
