"""``train`` and ``simulate``: from the arguments to the result, wherever the ranks are."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cobre_shm import sddp
from cobre_shm.api.place import Place, find_place
from cobre_shm.api.plain import decode, encode
from cobre_shm.api.policy import Policy
from cobre_shm.api.result import ProgressEvent, TrainingResult, worker_infos
from cobre_shm.api.worker import SimulationTask, TrainingTask
from cobre_shm.communicator import Communicator
from cobre_shm.errors import IncompatibleSettings
from cobre_shm.local import LocalCommunicator
from cobre_shm.sddp.case import Case, load_case, share_case, with_overrides
from cobre_shm.sddp.cuts import StageCuts
from cobre_shm.sddp.errors import CheckpointError
from cobre_shm.sddp.results import prepare_output
from cobre_shm.sddp.sharing import on_rank_zero
from cobre_shm.sddp.simulation import SimulationResult, scenario_count
from cobre_shm.sddp.simulation_results import write_simulation
from cobre_shm.sddp.solver import Check
from cobre_shm.sddp.training_files import training_files
from cobre_shm.sddp.training_result import Iteration
from cobre_shm.spawn.cancellation import Cancellation
from cobre_shm.spawn.workers import WorkerGroup

__all__ = ["ProgressCallback", "simulate", "train"]

ProgressCallback = Callable[[ProgressEvent], object]
Overrides = Mapping[str, Any]
# Folders of a simulation in its output directory.
_SIMULATION = ("simulation",)

PolicySource = TrainingResult | Policy | Sequence[StageCuts] | str | Path


def train(
    case: Case | str | Path,
    *,
    backend: str = "auto",
    num_workers: int = 1,
    coordinator: str | None = None,
    rank: int | None = None,
    size: int | None = None,
    comm: Communicator | None = None,
    config_overrides: Overrides | None = None,
    progress_callback: ProgressCallback | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train the policy of a case, in this process or on workers that it starts.

    The bounds and cuts do not depend, in any bit, on the backend and the number of workers.

    Args:
        case: A case directory, or a case that :func:`cobre_shm.sddp.load_case` has loaded.
        backend: ``"auto"``: ``local`` for one worker; for several ``shm``, or ``tcp`` where
            ``COBRE_TCP_COORDINATOR`` is set, and not by our launcher. Or ``"local"``, ``"shm"``,
            ``"tcp"``, ``"mpi"``, or a registered name.
        num_workers: 1: this process does the work. More: that many processes are started on this
            machine, each a fresh interpreter which does not import this program's main module,
            with one thread in each pool unless ``OMP_NUM_THREADS`` and relatives are set; this
            process computes nothing. No ``if __name__ == "__main__"`` is needed.
        coordinator: For ``"tcp"``: address of rank 0, ``host`` or ``host:port``. Everything else
            of a group over tcp or shm is as its variables say: secret, time limits, tuning.
        rank: Rank of this process in a group that is started elsewhere.
        size: Number of ranks of that group.
        comm: A communicator to use instead of all of these; it stays open.
        config_overrides: Values that replace those of the case's ``config.json``, nested as there:
            ``{"training": {"forward_passes": 8}}``. A loaded case stays as it is.
        progress_callback: Called with a :class:`ProgressEvent` after every iteration, for every
            worker, in this thread. If it returns True, the training ends after the next iteration
            with the reason ``interrupted``; if it raises, the training is ended and the exception
            comes out of this call.
        output_dir: Where the results are written; by default nowhere.
        resume: Whether to go on from the checkpoint in ``output_dir``.

    Raises:
        CaseError: The case cannot be used.
        IncompatibleSettings: The arguments do not go together, or the user has set the start
            method ``fork`` for :mod:`multiprocessing`, and ``num_workers`` is above 1.
        BackendError: The backend is not known or not available, or could not start.
        WorkerError: A worker failed; ``inner`` is its exception, also one of those below that
            several processes find out only at work. All are gone.
        SolverError: A stage problem has no solution (one process).
        OutputError: ``output_dir`` cannot be used.
        CheckpointError: The checkpoint to resume from is of another case or damaged.
        CommError: The group was lost (this process is a rank of it), or there is no memory for
            what workers share (AllocationFailed).
        MissingDependency: Extra packages that the case or ``output_dir`` needs are not installed.
        CobreError: ``num_workers`` is out of range (``cobre_shm.spawn.errors.InvalidArguments``),
            or the system refuses another process (``ProgramNotRunnable`` there).

    Ctrl-C ends the workers within a second and leaves nothing.

    >>> import cobre_shm
    >>> from cobre_shm.sddp import shipped_case_path
    >>> limit = {"training": {"stopping_rules": [{"type": "iteration_limit", "limit": 2}]}}
    >>> result = cobre_shm.train(shipped_case_path(), config_overrides=limit)
    >>> result.iterations, result.stop_reason, result.workers
    (2, 'iteration_limit', None)
    >>> bool(result.history["lower_bound"][0] <= result.lower_bound)
    True
    """
    place = find_place(backend, num_workers, coordinator, rank, size, comm)
    options = trainer_options(resume, output_dir)
    return train_at(place, case, config_overrides, progress_callback, output_dir, options)


def simulate(
    case: Case | str | Path,
    policy: PolicySource,
    *,
    scenarios: int | None = None,
    backend: str = "auto",
    num_workers: int = 1,
    coordinator: str | None = None,
    rank: int | None = None,
    size: int | None = None,
    comm: Communicator | None = None,
    config_overrides: Overrides | None = None,
    output_dir: str | Path | None = None,
) -> SimulationResult:
    """Run a policy on random scenarios, in this process or on workers that it starts.

    Args:
        case: As for :func:`train`.
        policy: A training's result, its ``policy``, the cuts of all stages, or the folder
            ``policy`` of a training's output, which only rank 0 needs to see.
        scenarios: Number of trajectories; by default what the case asks for.
        backend: As for :func:`train`, like all that follow.
        num_workers: Number of processes to start, or 1 for this one.
        coordinator: Address of rank 0, for tcp.
        rank: Of this process in a group that is started elsewhere.
        size: Number of ranks of that group.
        comm: A communicator to use instead.
        config_overrides: Values that replace those of ``config.json``.
        output_dir: Where the results are written, in the folder ``simulation``, and a problem
            without solution, in ``failed``.

    Raises:
        ValueError: ``scenarios`` is below 1 or above 2**31 - 1, or not given for a case that asks
            for no simulation, or the cuts have another shape than the case.
        CheckpointError: The policy is of other stages, plants or lags.
        CaseError, IncompatibleSettings, BackendError, WorkerError, SolverError, OutputError,
            CommError, MissingDependency, CobreError: As for :func:`train`.
    """
    place = find_place(backend, num_workers, coordinator, rank, size, comm)
    return simulate_at(place, case, policy, scenarios, config_overrides, output_dir)


def train_at(
    place: Place,
    case: Case | str | Path,
    overrides: Overrides | None,
    callback: ProgressCallback | None,
    output_dir: str | Path | None,
    options: dict[str, Any],
    cancellation: Cancellation | None = None,
    check: Check | None = None,
) -> TrainingResult:
    """Train where ``place`` says; see :func:`train`.

    Args:
        place: Where the ranks are.
        case: As for :func:`train`, and so on.
        overrides: Of the configuration.
        callback: For progress.
        output_dir: Where the results are written.
        options: What the trainer is told beside that.
        cancellation: Ends the workers.
        check: Called before every problem that this process solves; what it raises comes out.

    Raises:
        Cancelled: The cancellation was requested.
    """
    if not place.workers:
        return _train_here(
            place, case, overrides, callback, output_dir, {**options, "check": check}
        )
    loaded = load(case, overrides)
    folder = None if output_dir is None else Path(output_dir).absolute()
    # Mistakes here are found before any worker is started.
    training_files(loaded.config, folder, None, options.get("resume"), None)
    if folder is not None:
        prepare_output(folder, LocalCommunicator())
    task = TrainingTask(loaded, folder, callback is not None, options)
    (data, *_), pids = _on_workers(place, task, callback, cancellation)
    details = replace(decode(data), case=loaded)
    return TrainingResult(details, worker_infos(details, pids))


def simulate_at(
    place: Place,
    case: Case | str | Path,
    policy: PolicySource,
    scenarios: int | None,
    overrides: Overrides | None,
    output_dir: str | Path | None,
    check: Check | None = None,
) -> SimulationResult:
    """Simulate where ``place`` says; see :func:`simulate`.

    Args:
        place: Where the ranks are.
        case: As for :func:`simulate`, and so on.
        policy: The policy.
        scenarios: Number of trajectories.
        overrides: Of the configuration.
        output_dir: Where the results are written.
        check: Called before every problem that this process solves; what it raises comes out.
    """
    folder = None if output_dir is None else Path(output_dir).absolute()
    if place.workers:
        loaded = load(case, overrides)
        # Mistakes here are found before any worker is started.
        if folder is not None:
            prepare_output(folder, LocalCommunicator(), _SIMULATION)
        scenarios = scenario_count(loaded, scenarios)
        task = SimulationTask(loaded, _cuts_of(policy, loaded), scenarios, folder)
        (data, *_), _pids = _on_workers(place, task, None, None)
        result: SimulationResult = replace(decode(data), case=loaded)
        if folder is not None:
            write_simulation(result, folder)
        return result
    with place.communicator() as own:
        loaded = load(case, overrides, own)
        if folder is not None:
            prepare_output(folder, own, _SIMULATION)
        cuts = _shared_cuts(policy, loaded, own)
        result = sddp.simulate(loaded, cuts, own, scenarios, output_dir=folder, check=check)
        if folder is not None:
            on_rank_zero(lambda: write_simulation(result, folder), own)
    return result


def load(
    case: Case | str | Path, overrides: Overrides | None, comm: Communicator | None = None
) -> Case:
    """Return the case, read by rank 0 where there are several.

    Raises:
        CaseError: It cannot be used.
    """
    if isinstance(case, Case):
        return with_overrides(case, overrides) if overrides else case
    return load_case(case, overrides) if comm is None else share_case(case, comm, overrides)


def trainer_options(resume: bool, output_dir: str | Path | None) -> dict[str, Any]:
    """Return what the trainer is told beside the case.

    Raises:
        IncompatibleSettings: There is no directory with a checkpoint to go on from.
    """
    if not resume:
        return {}
    if output_dir is None:
        raise IncompatibleSettings(
            "resume=True needs output_dir=, where the checkpoint is",
            context={"setting": "resume"},
            suggestion="Give the output directory of the run that is to go on",
        )
    return {"resume": True}


class _Outcome(NamedTuple):
    results: list[bytes]
    pids: list[int]


def _on_workers(
    place: Place,
    task: TrainingTask | SimulationTask,
    callback: ProgressCallback | None,
    cancellation: Cancellation | None,
) -> _Outcome:
    def on_event(_rank: int, payload: bytes) -> bool:
        if callback is None:
            return False
        return _asks_to_stop(callback(ProgressEvent(**json.loads(payload))))

    with place.meeting() as meeting:
        group = WorkerGroup(
            "cobre_shm.api.worker:carry_out",
            pickle.dumps(task),
            place.workers,
            meeting,
            on_event=on_event,
            cancellation=cancellation,
        )
        return _Outcome(group.run(), group.pids)


def _asks_to_stop(answer: object) -> bool:
    """Whether a callback has returned True, Python's or numpy's."""
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


def _train_here(
    place: Place,
    case: Case | str | Path,
    overrides: Overrides | None,
    callback: ProgressCallback | None,
    output_dir: str | Path | None,
    options: dict[str, Any],
) -> TrainingResult:
    is_stopping = False
    with place.communicator() as comm:
        loaded = load(case, overrides, comm)
        limit = loaded.config.iteration_limit

        def tell(item: Iteration) -> None:
            nonlocal is_stopping
            if callback is not None:
                event = ProgressEvent.of(item, comm.rank, limit)
                is_stopping = _asks_to_stop(callback(event)) or is_stopping

        details = sddp.train(
            loaded,
            comm,
            output_dir=output_dir,
            progress=tell,
            should_stop=lambda: is_stopping,
            **options,
        )
    return TrainingResult(details)


def _shared_cuts(policy: PolicySource, case: Case, comm: Communicator) -> Sequence[StageCuts]:
    """Return the cuts of a policy; a folder is read on rank 0 for all. Collective."""
    if not isinstance(policy, str | Path):
        return _cuts_of(policy, case)
    data = on_rank_zero(lambda: encode(tuple(_cuts_of(policy, case))), comm)
    cuts: tuple[StageCuts, ...] = decode(data)
    return cuts


def _cuts_of(policy: PolicySource, case: Case) -> Sequence[StageCuts]:
    if isinstance(policy, TrainingResult):
        policy = policy.policy
    elif isinstance(policy, str | Path):
        policy = Policy.load(policy)
    if not isinstance(policy, Policy):
        return policy
    stages = tuple(stage.id for stage in case.horizon.stages)
    if (policy.stages, list(policy.components)) != (stages, case.state_names()):
        raise CheckpointError(
            f"the policy does not fit the case {case.name}: their stages, plants or lags differ",
            context={"stages": list(policy.stages), "expected": list(stages)},
            suggestion="Give the policy of a training of the same plants and stages",
        )
    return policy.all_cuts()
