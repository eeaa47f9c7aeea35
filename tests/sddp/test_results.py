"""The files that a run leaves behind."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import stat
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cobre_shm.sddp import (
    OutputError,
    results,
    series_digest,
    shipped_case_path,
    simulate,
    simulation_results,
    train,
)
from cobre_shm.sddp.errors import MissingFile
from cobre_shm.sddp.policy_files import read_policy
from cobre_shm.sddp.results import remove_old, write_atomically
from cobre_shm.sddp.simulation_results import write_simulation
from tests.sddp.editing import constant_load, copy_case, edit

CONVERGENCE = {
    "iteration": pa.int32(),
    "lower_bound": pa.float64(),
    "upper_bound_mean": pa.float64(),
    "upper_bound_std": pa.float64(),
    "gap_percent": pa.float64(),
    "cuts_added": pa.int32(),
    "cuts_removed": pa.int32(),
    "cuts_active": pa.int64(),
    "time_forward_ms": pa.int64(),
    "time_backward_ms": pa.int64(),
    "time_total_ms": pa.int64(),
    "forward_passes": pa.int32(),
    "lp_solves": pa.int64(),
}


@pytest.fixture
def trained(random_path, comm, tmp_path):
    root = tmp_path / "out" / "deep"
    edit(random_path, "config.json", lambda content: content.update(exports={"stochastic": True}))
    return train(random_path, comm, iterations=4, output_dir=root), root


def test_convergence_has_the_reference_schema_and_the_results(trained):
    result, root = trained
    table = pq.read_table(root / "training" / "convergence.parquet")
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == CONVERGENCE
    assert table["lower_bound"].to_pylist() == result.lower_bound.tolist()
    with (root / "training" / "convergence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(CONVERGENCE)
    assert [float(row["lower_bound"]) for row in rows] == result.lower_bound.tolist()


def test_cuts_are_stored_with_every_bit_and_explained(trained):
    result, root = trained
    table = pq.read_table(root / "policy" / "cuts.parquet").to_pydict()
    state = json.loads((root / "policy" / "state.json").read_text())
    assert len(state["components"]) == 9
    assert state["components"][3] == {
        "column": "coef_3",
        "kind": "inflow_lag",
        "hydro_id": 0,
        "lag": 1,
        "unit": "m3/s",
    }
    assert table["intercept"] == np.concatenate([c.intercept for c in result.cuts]).tolist()
    assert table["coef_3"] == np.concatenate([c.coefficients[:, 3] for c in result.cuts]).tolist()
    assert table["stage_id"] == [0] * 8 + [1] * 8


def test_metadata_tells_what_keeps_the_bounds_apart(small, comm, tmp_path):
    def notes(name):
        train(small, comm, iterations=1, output_dir=tmp_path / name)
        return json.loads((tmp_path / name / "training" / "metadata.json").read_text())["notes"]

    constant_load(small, 60.0)
    assert notes("plain") == []
    constant_load(small, 60.0, 5.0)
    risk = {"cvar": {"alpha": 0.5, "lambda": 0.3}}
    edit(small, "stages.json", lambda content: content["stages"][0].update(risk_measure=risk))
    assert [("CVaR" in note, "random load" in note) for note in notes("both")] == [
        (True, False),
        (False, True),
    ]


def test_bounds_of_truncated_inflow_are_explained(random_path, comm, tmp_path):
    edit(
        random_path,
        "config.json",
        lambda content: content["modeling"]["inflow_non_negativity"].update(method="truncation"),
    )
    train(random_path, comm, iterations=1, output_dir=tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "training" / "metadata.json").read_text())
    assert any("truncated inflow" in note for note in facts["notes"])


def test_metadata_tells_what_ran(trained):
    result, root = trained
    metadata = json.loads((root / "training" / "metadata.json").read_text())
    assert metadata["backend"] == "local"
    assert metadata["ranks"] == 1
    assert metadata["lower_bound"] == result.lower_bound[-1]
    assert metadata["dimensions"]["state"] == 9
    assert metadata["versions"]["highspy"]


def test_timing_has_a_row_per_rank_and_iteration(trained):
    _, root = trained
    table = pq.read_table(root / "training" / "timing.parquet").to_pydict()
    assert table["iteration"] == [1, 2, 3, 4]
    assert table["rank"] == [0] * 4
    assert all(value >= 0 for value in table["forward_ms"])
    assert all(value > 0 for value in table["gather_states_bytes"])


def test_written_tree_can_be_read_back_as_scenario_input(trained, random_path, comm, tmp_path):
    result, root = trained
    again = copy_case(random_path, tmp_path / "again")
    tree = (root / "stochastic" / "noise_openings.parquet").read_bytes()
    (again / "scenarios" / "noise_openings.parquet").write_bytes(tree)
    assert series_digest(train(again, comm, iterations=4)) == series_digest(result)


def test_no_partial_file_remains(trained):
    _, root = trained
    names = [path.name for path in root.rglob("*") if path.is_file()]
    assert names
    assert not [name for name in names if name.startswith(".")]


def test_partial_files_of_a_killed_writer_are_removed(trained, comm):
    result, root = trained
    kept = [root / "policy" / name for name in (".cuts.parquet.orig", ".notes.1", "7")]
    remains = [root / "policy" / f".{name}.99999" for name in ("cuts.parquet", "state.json")]
    remains.append(root / "training" / ".convergence.csv.12")
    for path in (*kept, *remains):
        path.write_text("half")
    (root / "policy" / ".cuts.parquet.3").mkdir()
    train(result.case, comm, iterations=1, output_dir=root)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in remains)


def test_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "table"
    target.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_simulation_tables_agree_with_the_result(trained, comm):
    result, root = trained
    simulation = simulate(result.case, result.cuts, comm, 5)
    write_simulation(simulation, root)
    costs = pq.read_table(root / "simulation" / "costs.parquet").to_pydict()
    discounted = np.array(costs["immediate_cost"]) * np.array(costs["discount_factor"])
    np.testing.assert_allclose(discounted.reshape(5, 3).sum(axis=1), simulation.total_cost)
    hydros = pq.read_table(root / "simulation" / "hydros.parquet").to_pydict()
    assert hydros["scenario_id"] == sorted(hydros["scenario_id"])
    assert len(hydros["hydro_id"]) == 5 * 3 * 3
    final = simulation.stages[2].storage_final[4, 1]
    (row,) = [
        i
        for i, key in enumerate(
            zip(hydros["scenario_id"], hydros["stage_id"], hydros["hydro_id"], strict=True)
        )
        if key == (4, 2, 1)
    ]
    assert hydros["storage_final_hm3"][row] == final
    assert len(pq.read_table(root / "simulation" / "buses.parquet")) == 5 * 3 * 2
    summary = json.loads((root / "simulation" / "summary.json").read_text())
    assert summary["scenarios"] == 5
    assert summary["mean"] == pytest.approx(simulation.total_cost.mean())


def test_simulation_holds_its_result_once(trained, comm):
    result, _ = trained
    outcomes = simulate(result.case, result.cuts, comm, 5).stages
    arrays = [getattr(outcome, field.name) for outcome in outcomes for field in fields(outcome)]
    whole = arrays[0].base
    assert whole is not None
    assert all(array.base is whole for array in arrays)
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))


def test_simulation_leaves_nothing_of_an_earlier_one(trained, comm, monkeypatch):
    result, root = trained
    simulation, folder = simulate(result.case, result.cuts, comm, 2), root / "simulation"
    write_simulation(simulation, root)
    for name in ("exchanges.parquet", "notes.txt"):
        (folder / name).write_text("of a case with lines")
    write_simulation(simulation, root)
    names = {path.name for path in folder.iterdir()}
    assert {"notes.txt", "summary.json", "hydros.parquet"} < names
    assert "exchanges.parquet" not in names

    def fail(*_args):
        raise OutputError("the disk is full")

    monkeypatch.setattr(simulation_results, "write_table", fail)
    with pytest.raises(OutputError):
        write_simulation(simulation, root)
    assert not (folder / "summary.json").exists()


def test_training_ends_the_simulation_of_the_one_before(trained, comm):
    result, root = trained
    write_simulation(simulate(result.case, result.cuts, comm, 2), root)
    train(result.case, comm, iterations=1, output_dir=root)
    assert not (root / "simulation" / "summary.json").exists()
    assert (root / "simulation" / "costs.parquet").exists()


@pytest.mark.parametrize("stays", range(7))
def test_results_of_two_trainings_are_never_taken_for_one(trained, comm, monkeypatch, stays):
    """Of every file that the second training writes, the disk becomes full at the next one."""
    result, root = trained
    written, write = [], results.write_atomically

    def until_full(path, fill, outdated=None):
        def fill_until_full(partial):
            fill(partial)
            if len(written) == stays:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write(path, fill_until_full, outdated)
        written.append(path.relative_to(root).as_posix())

    monkeypatch.setattr(results, "write_atomically", until_full)
    try:
        train(shipped_case_path(), comm, iterations=1, output_dir=root)
    except OutputError:
        assert not (root / "training" / "metadata.json").exists()
    else:
        assert written[:2] == ["policy/cuts.parquet", "policy/state.json"]
        assert written[-1] == "training/metadata.json"
        assert len(written) == 6
    if stays == 1:
        with pytest.raises(MissingFile, match=r"state\.json"):
            read_policy(root / "policy")
    else:
        is_old = len(read_policy(root / "policy").components) == result.case.state_size
        assert is_old == (stays == 0)


def test_old_file_that_cannot_be_removed_is_an_output_error(tmp_path):
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(OutputError):
        remove_old(tmp_path / "summary.json")


def test_place_that_cannot_be_written_is_an_output_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for path in (file / "table", tmp_path / ("long" * 100)):
        with pytest.raises(OutputError):
            write_atomically(path, lambda partial: partial.write_text("all"))


@pytest.mark.parametrize(
    ("is_refused", "number", "is_error"),
    [
        (stat.S_ISDIR, errno.EINVAL, False),
        (stat.S_ISDIR, errno.EOPNOTSUPP, False),
        (stat.S_ISDIR, errno.EIO, True),
        (stat.S_ISREG, errno.EINVAL, True),
    ],
)
def test_file_system_need_not_flush_folders(tmp_path, monkeypatch, is_refused, number, is_error):
    flush = os.fsync

    def refuse(descriptor):
        if is_refused(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError) if is_error else nullcontext():
        write_atomically(tmp_path / "table", lambda partial: partial.write_text("all"))
    assert (tmp_path / "table").exists() or is_error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_write_leaves_nothing(tmp_path, error):
    def fail(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "table", fail)
    assert list(tmp_path.iterdir()) == []
