"""The files that a run leaves behind.

    policy/cuts.parquet, state.json                 the cuts and what their coefficients mean
    training/convergence.parquet, convergence.csv   one row per iteration
    training/timing.parquet                         one row per iteration and rank
    training/metadata.json                          versions, sizes, why it stopped
    simulation/*.parquet, summary.json              what the policy did, if it was simulated
    simulation/costs.csv                            its costs, for people
    stochastic/noise_openings.parquet               the opening tree, if the case asks for it

A file appears under its name only when it is complete. So does a set of files: the JSON file that
tells what the others are, without which they are not read, is removed before the first of them
appears and comes last. Whatever breaks that off, files of two runs are never taken for one.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case import Case
from cobre_shm.sddp.cuts import StageCuts
from cobre_shm.sddp.errors import MissingFile, OutputError, ParseError, require
from cobre_shm.sddp.sharing import on_rank_zero
from cobre_shm.sddp.training_result import TIMING_COLUMNS, TrainingDetails

Columns = Mapping[str, npt.ArrayLike]

# Below the output directory; each is written last of what it tells about.
TRAINING_METADATA = Path("training", "metadata.json")
SIMULATION_SUMMARY = Path("simulation", "summary.json")

_PROBE = ".cobre-write-test"
# What write_atomically writes before it moves it, with the number of the process at the end.
_PARTIAL_FILE = re.compile(r"\..+\.(parquet|csv|json|checkpoint)\.[0-9]+")


def prepare_output(
    directory: str | Path, comm: Communicator, folders: Sequence[str] = ("training", "policy")
) -> None:
    """Create the output directory on rank 0 and check that it can be written. Collective.

    What writers that were killed have left in its folders is removed.

    Args:
        directory: The output directory.
        comm: The communicator.
        folders: What is created in it.

    Raises:
        OutputError: It cannot be used; on every rank.
        MissingDependency: pyarrow is not installed; on every rank.
    """
    root = Path(directory)

    def prepare() -> None:
        parquet()
        try:
            for name in folders:
                (root / name).mkdir(parents=True, exist_ok=True)
                _remove_partial_files(root / name)
            probe = root / folders[0] / _PROBE
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise _output_error(root, error) from error

    on_rank_zero(prepare, comm)


def _remove_partial_files(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if _PARTIAL_FILE.fullmatch(path.name):
            # What is in the way of this shows when something is written.
            with suppress(OSError):
                path.unlink()


def _output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write to {str(path)!r}: {error.strerror or error}",
        context={"path": str(path), "errno": error.errno},
        suggestion="Give a directory that can be created and written",
    )


def parquet() -> Any:
    """Return the package pyarrow with its parquet module.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise require("pyarrow") from error
    return pyarrow


def write_atomically(
    path: Path, write: Callable[[Path], None], outdated: Path | None = None
) -> None:
    """Let ``write`` fill a file beside ``path`` and move it there when it is complete.

    Args:
        path: Where.
        write: Fills the file that it is given.
        outdated: A file that does not hold for the new one, and is removed before the move.

    Raises:
        OutputError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        if outdated is not None:
            outdated.unlink(missing_ok=True)
        partial.replace(path)
        _flush_folder(path.parent)
    except BaseException as error:
        # What kept it from being written may keep it from being removed.
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise _output_error(path, error) from error
        raise


def remove_old(path: Path) -> None:
    """Remove a file of an earlier run, if there is one.

    Raises:
        OutputError: It is there and cannot be removed.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
    except OSError as error:
        raise _output_error(path, error) from error


def _flush(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    try:
        _flush(path)
    except OSError as error:
        # Some file systems, of a network for the most part, do this for files only.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def write_table(path: Path, columns: Columns, outdated: Path | None = None) -> None:
    """Write named columns of equal length as Parquet; ``outdated`` as in write_atomically."""
    arrow = parquet()
    table = arrow.table({name: arrow.array(np.asarray(v)) for name, v in columns.items()})
    # Not snappy, pyarrow's default: the reference program reads zstd and uncompressed files.

    def write(file: Path) -> None:
        arrow.parquet.write_table(table, str(file), compression="zstd")

    write_atomically(path, write, outdated)


def read_table(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a table that :func:`write_table` wrote.

    Raises:
        MissingFile: There is no such file.
        ParseError: It is not readable as Parquet.
        MissingDependency: pyarrow is not installed.
    """
    arrow = parquet()
    context = {"file": str(path)}
    try:
        with path.open("rb") as file:
            # Without threads, as in documents.py: Arrow's may be starting while the process ends.
            table = arrow.parquet.ParquetFile(file, pre_buffer=False).read(use_threads=False)
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: there is no such file", context=context) from error
    except MemoryError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ParseError(f"{path}: not readable: {reason}", context=context) from error
    return {name: table[name].to_numpy() for name in table.column_names}


def write_csv(path: Path, columns: Columns) -> None:
    """Write named columns of numbers as CSV, with every digit."""
    rows = zip(*(np.asarray(values) for values in columns.values()), strict=True)
    lines = [",".join(columns), *(",".join(_text(value) for value in row) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_training(result: TrainingDetails, root: Path) -> None:
    """Write everything that a training produced.

    Raises:
        OutputError: A file cannot be written.
    """
    # What is simulated there was another policy.
    remove_old(root / SIMULATION_SUMMARY)
    remove_old(root / TRAINING_METADATA)
    # First, for the disk that becomes full: this is what took the time.
    ids = [stage.id for stage in result.case.horizon.stages]
    write_policy(root / "policy", ids, result.cuts, result.case.state_names())
    convergence = _convergence(result)
    write_table(root / "training" / "convergence.parquet", convergence)
    write_csv(root / "training" / "convergence.csv", convergence)
    write_table(root / "training" / "timing.parquet", _timing(result))
    if result.case.config.export_tree:
        write_table(root / "stochastic" / "noise_openings.parquet", _openings(result))
    write_json(root / TRAINING_METADATA, _metadata(result))


def _text(value: Any) -> str:
    return repr(float(value)) if isinstance(value, np.floating) else str(int(value))


def _convergence(result: TrainingDetails) -> dict[str, npt.NDArray[Any]]:
    history = result.history

    def column(values: list[Any], dtype: Any) -> npt.NDArray[Any]:
        return np.array(values, dtype=dtype)

    def milliseconds(values: list[float]) -> npt.NDArray[Any]:
        return column([round(1e3 * value) for value in values], np.int64)

    return {
        "iteration": column([item.iteration for item in history], np.int32),
        "lower_bound": result.lower_bound,
        "upper_bound_mean": result.upper_bound_mean,
        "upper_bound_std": result.upper_bound_std,
        "gap_percent": result.gap_percent,
        "cuts_added": column([item.cuts_added for item in history], np.int32),
        "cuts_removed": np.zeros(len(history), dtype=np.int32),
        "cuts_active": column([item.cuts_active for item in history], np.int64),
        "time_forward_ms": milliseconds([item.forward_seconds for item in history]),
        "time_backward_ms": milliseconds([item.backward_seconds for item in history]),
        "time_total_ms": milliseconds([item.total_seconds for item in history]),
        "forward_passes": column([item.forward_passes for item in history], np.int32),
        "lp_solves": column([item.lp_solves for item in history], np.int64),
    }


def _timing(result: TrainingDetails) -> Columns:
    ranks, iterations, _ = result.timing.shape
    by_iteration = result.timing.transpose(1, 0, 2).reshape(iterations * ranks, -1)
    whole = {name for name in TIMING_COLUMNS if not name.endswith("_ms")}
    columns: dict[str, npt.ArrayLike] = {
        "iteration": np.repeat(np.arange(1, iterations + 1, dtype=np.int32), ranks),
        "rank": np.tile(np.arange(ranks, dtype=np.int32), iterations),
    }
    for i, name in enumerate(TIMING_COLUMNS):
        values = by_iteration[:, i]
        columns[name] = values.astype(np.int64) if name in whole else values
    return columns


def _metadata(result: TrainingDetails) -> dict[str, Any]:
    case = result.case

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("cobre-shm", "highspy", "numpy", "pyarrow")
    return {
        "case": case.name,
        "case_digest": case.digest,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "machine": platform.platform(),
        "backend": result.backend,
        "ranks": result.ranks,
        "tree_seed": case.config.tree_seed,
        "dimensions": {
            "stages": case.stages,
            "state": case.state_size,
            "buses": len(case.buses),
            "lines": len(case.lines),
            "hydros": len(case.hydros),
            "thermals": len(case.thermals),
            "non_controllable_sources": len(case.sources),
            "forward_passes": case.config.forward_passes,
        },
        "names": {
            "buses": {str(bus.id): bus.name for bus in case.buses},
            "hydros": {str(hydro.id): hydro.name for hydro in case.hydros},
        },
        "block_hours": {str(stage.id): list(stage.hours) for stage in case.horizon.stages},
        "iterations": result.iterations,
        "stop_reason": result.stop_reason,
        "converged": result.converged,
        "lower_bound": float(result.lower_bound[-1]),
        "upper_bound_mean": float(result.upper_bound_mean[-1]),
        "upper_bound_std": float(result.upper_bound_std[-1]),
        "gap_percent": float(result.gap_percent[-1]),
        "seconds": result.seconds,
        "lp_solves": result.lp_solves,
        "lp_retries": result.lp_retries,
        "warnings": list(case.warnings),
        "notes": _notes(case),
    }


def _notes(case: Case) -> list[str]:
    """Return what keeps lower and upper bound from enclosing the optimum of the case."""
    notes = []
    if any(stage.risk is not None for stage in case.horizon.stages):
        notes.append(
            "Under CVaR the lower bound is one of the risk-adjusted cost, but the upper bound is "
            "the mean cost: it may be the lower of the two, and the gap is no measure."
        )
    if case.config.truncate_inflow and case.statistics.lags:
        notes.append(
            "With truncated inflow that depends on earlier inflow the future cost is not convex: "
            "the lower bound may exceed the optimum."
        )
    if any(
        case.statistics.load.get((bus, 0), (0.0, 0.0))[1] for bus in case.statistics.random_buses
    ):
        notes.append(
            "The lower bound takes the mean of the random load in the first stage, where no "
            "trajectory need have gone, so it may stay below the optimum."
        )
    return notes


def write_policy(
    folder: Path,
    stage_ids: Sequence[int],
    cuts: Sequence[StageCuts],
    components: Sequence[tuple[str, int, int, str]],
) -> None:
    """Write ``cuts.parquet`` and ``state.json``, the cuts and what their coefficients mean.

    Args:
        folder: Where.
        stage_ids: Of every stage, in order.
        cuts: Of every stage.
        components: Of the state, as :meth:`Case.state_names` gives them.

    Raises:
        OutputError: A file cannot be written.
        MissingDependency: pyarrow is not installed.
    """
    ids = np.array(stage_ids, dtype=np.int32)
    columns: dict[str, npt.ArrayLike] = {
        "stage_id": np.repeat(ids, [len(item) for item in cuts]),
        "iteration": np.concatenate([item.iteration for item in cuts]).astype(np.int32),
        "scenario": np.concatenate([item.scenario for item in cuts]).astype(np.int32),
        "intercept": np.concatenate([item.intercept for item in cuts]),
    }
    coefficients = np.concatenate([item.coefficients for item in cuts])
    columns |= {f"coef_{j}": coefficients[:, j] for j in range(coefficients.shape[1])}
    # The policy of before is as good as it was until the new cuts are on the disk.
    write_table(folder / "cuts.parquet", columns, outdated=folder / "state.json")
    state = {
        "cost_unit": "$",
        "meaning": "future cost >= intercept + sum(coef_j * state_j), at the end of stage_id",
        "stage_ids": ids.tolist(),
        "components": [
            {"column": f"coef_{j}", "kind": kind, "hydro_id": hydro, "lag": lag, "unit": unit}
            for j, (kind, hydro, lag, unit) in enumerate(components)
        ],
    }
    write_json(folder / "state.json", state)


def _openings(result: TrainingDetails) -> Columns:
    stages = result.case.horizon.stages
    sizes = [noise.size for noise in result.tree]
    index = [np.indices(noise.shape).reshape(2, -1) for noise in result.tree]
    return {
        "stage_id": np.repeat(np.array([stage.id for stage in stages], dtype=np.int32), sizes),
        "opening_index": np.concatenate([item[0] for item in index]).astype(np.uint32),
        "entity_index": np.concatenate([item[1] for item in index]).astype(np.uint32),
        "value": np.concatenate([noise.reshape(-1) for noise in result.tree]),
    }
