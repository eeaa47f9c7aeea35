"""A training that rests and goes on is the same; a checkpoint that is not its own is refused."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cobre_shm.errors import IncompatibleSettings
from cobre_shm.sddp import (
    CheckpointError,
    OutputError,
    checkpoint,
    load_case,
    series_digest,
    shipped_case_path,
    train,
)
from cobre_shm.sddp.__main__ import main
from tests.sddp.editing import edit, random_case
from tests.sddp.results import checkpoint_of, digest_alone, train_until
from tests.sddp.threads import run_ranks
from tests.support.processes import started

ITERATIONS = 6


@pytest.mark.parametrize("pause", [1, 3, ITERATIONS - 1])
def test_training_goes_on_with_the_same_bits(random_path, tmp_path, pause):
    path = random_path
    first = train_until(path, tmp_path / "out", pause)
    assert first.iterations == pause
    second = train_until(path, tmp_path / "out", ITERATIONS, resume=True)
    assert series_digest(second) == digest_alone(path, ITERATIONS)
    assert [item.iteration for item in second.history] == list(range(1, ITERATIONS + 1))
    assert second.history[:pause] == first.history
    assert second.seconds > first.history[-1].elapsed_seconds


@pytest.mark.parametrize("name", ["1dtoy", "4ree"])
def test_reference_case_goes_on_with_the_same_bits(reference_cases, tmp_path, name):
    for pause in (1, 3, ITERATIONS):
        train_until(reference_cases / name, tmp_path / "out", pause, resume=True)
    case = load_case(reference_cases / name)
    result = train_until(case, tmp_path / "out", ITERATIONS, resume=True)
    assert series_digest(result) == digest_alone(reference_cases / name, ITERATIONS)


def test_any_ranks_may_go_on(random_path, tmp_path):
    """CVaR, random load, two trajectories: the largest groups have ranks without any."""
    out = tmp_path / "out"
    for iterations, size in enumerate((1, 3, 8, 2, 4, 1), start=1):
        results = run_ranks(
            size,
            lambda comm, n=iterations: train_until(random_path, out, n, comm, resume=True),
        )
        assert {result.iterations for result in results} == {iterations}
    assert {series_digest(result) for result in results} == {digest_alone(random_path, ITERATIONS)}


def test_files_of_a_resumed_training_are_the_same(random_path, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_until(random_path, whole, 4)
    for pause in (1, 4):
        train_until(random_path, parts, pause, resume=True)
    for name in ("policy/cuts.parquet", "policy/state.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    bounds = [pq.read_table(out / "training/convergence.parquet") for out in (whole, parts)]
    for name in ("lower_bound", "upper_bound_mean", "upper_bound_std", "lp_solves"):
        assert bounds[0][name] == bounds[1][name]


def test_training_that_has_ended_does_nothing_more(random_path, tmp_path):
    first = train_until(random_path, tmp_path / "out", 3)
    seen = []
    second = train_until(random_path, tmp_path / "out", 3, resume=True, progress=seen.append)
    assert seen == []
    assert second.stop_reason == "iteration_limit"
    assert second.lp_solves == first.lp_solves
    assert series_digest(second) == series_digest(first)


def test_checkpoints_come_every_so_many_iterations(random_path, tmp_path, comm):
    out, at = tmp_path / "out", []

    def progress(item):
        # Called before the checkpoint of its own iteration.
        if checkpoint_of(out).is_file():
            case = load_case(random_path)
            data = checkpoint.read_checkpoint(checkpoint_of(out), case)
            history = checkpoint.decode(data, case.digest, case.stages, out).history
            at.append((item.iteration, len(history)))

    def change(content):
        content["policy"] = {
            "checkpointing": {"enabled": True, "initial_iteration": 2, "interval_iterations": 3}
        }

    edit(random_path, "config.json", change)
    train(random_path, comm, iterations=9, output_dir=out, progress=progress)
    assert at == [(3, 2), (4, 2), (5, 2), (6, 5), (7, 5), (8, 5), (9, 8)]


def test_without_wish_there_is_no_checkpoint(random_path, tmp_path, comm):
    train(random_path, comm, iterations=2, output_dir=tmp_path / "out")
    assert not checkpoint_of(tmp_path / "out").exists()


def test_interrupted_training_leaves_a_checkpoint(random_path, tmp_path, comm):
    answers = iter([False, True])
    out = tmp_path / "out"
    train(random_path, comm, output_dir=out, should_stop=lambda: next(answers))
    result = train(random_path, comm, iterations=ITERATIONS, output_dir=out, resume=True)
    assert series_digest(result) == digest_alone(random_path, ITERATIONS)


def test_configuration_may_ask_to_resume(random_path, tmp_path, comm):
    out, expected = tmp_path / "out", digest_alone(random_path, ITERATIONS)
    train_until(random_path, out, 2)
    edit(random_path, "config.json", lambda content: content.update(policy={"mode": "resume"}))
    result = train(random_path, comm, iterations=ITERATIONS, output_dir=out)
    assert series_digest(result) == expected
    with pytest.raises(IncompatibleSettings, match=r"policy\.mode needs an output directory"):
        train(random_path, comm, iterations=ITERATIONS)


@pytest.mark.parametrize("resume", [None, True])
def test_checkpoints_are_read_where_they_are_written(random_path, tmp_path, comm, resume):
    def change(content):
        checkpoints = {"enabled": True, "interval_iterations": 1}
        content["policy"] = {"mode": "resume", "path": "./other", "checkpointing": checkpoints}

    edit(random_path, "config.json", change)
    seen = []
    for iterations in (2, 4):
        train(
            random_path,
            comm,
            iterations=iterations,
            output_dir=tmp_path / "out",
            resume=resume,
            progress=lambda item: seen.append(item.iteration),
        )
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"resume": True}, {"checkpoint_every": 2}])
def test_checkpoints_need_an_output_directory(random_path, comm, options):
    with pytest.raises(IncompatibleSettings, match=f"{next(iter(options))} needs"):
        train(random_path, comm, **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: b"PK" + data[2:],
        lambda data: os.urandom(len(data)),
    ],
)
def test_damaged_checkpoint_is_refused_on_every_rank(random_path, tmp_path, damage):
    out = tmp_path / "out"
    train_until(random_path, out, 1)
    checkpoint_of(out).write_bytes(damage(checkpoint_of(out).read_bytes()))
    errors = run_ranks(3, lambda comm: train_until(random_path, out, 2, comm, resume=True))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all(str(checkpoint_of(out)) in error.message for error in errors)
    assert errors[0].kind == "CheckpointFailed"


def test_checkpoint_of_another_case_is_refused(random_path, tmp_path, comm):
    out = tmp_path / "out"
    train_until(random_path, out, 1)
    with pytest.raises(CheckpointError, match="another case"):
        train_until(shipped_case_path(), out, 2, resume=True)
    edit(random_path, "penalties.json", lambda content: content["bus"].update(excess_cost=2.0))
    with pytest.raises(CheckpointError, match="another case, or the case was changed"):
        train_until(random_path, out, 2, resume=True)


def test_checkpoint_of_another_solver_is_refused(random_path, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train_until(random_path, out, 1)
    monkeypatch.setattr(checkpoint.metadata, "version", lambda package: "0.9.9")
    with pytest.raises(CheckpointError, match=r"but highspy 0\.9\.9 is installed"):
        train_until(random_path, out, 2, resume=True)


def test_rules_of_stopping_may_change_while_a_training_rests(random_path, tmp_path):
    out = tmp_path / "out"
    train_until(random_path, out, 2)

    def change(content):
        rule = {"type": "bound_stalling", "iterations": 2, "tolerance": 10.0}
        content["training"]["stopping_rules"].append(rule)

    edit(random_path, "config.json", change)
    result = train_until(random_path, out, 5, resume=True)
    assert (result.iterations, result.stop_reason) == (2, "bound_stalling")


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_full_disk_leaves_the_checkpoint_before(random_path, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    train_until(random_path, out, 2)
    before = checkpoint_of(out).read_bytes()
    original = getattr(Path, step)

    def fail(path, *arguments):
        if checkpoint.FILE_NAME in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *arguments)

    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(OutputError, match="No space left"):
        train_until(random_path, out, 4, resume=True)
    monkeypatch.undo()
    assert checkpoint_of(out).read_bytes() == before
    assert [path.name for path in checkpoint_of(out).parent.glob(".*")] == []
    assert train_until(random_path, out, 4, resume=True).iterations == 4


def test_remains_of_a_killed_writer_are_removed(random_path, tmp_path):
    out = tmp_path / "out"
    train_until(random_path, out, 1)
    remains = checkpoint_of(out).with_name(f".{checkpoint.FILE_NAME}.12345")
    remains.write_bytes(b"half")
    train_until(random_path, out, 2, resume=True)
    assert not remains.exists()


def launched(ranks, *program):
    """Start a program on ranks."""
    launcher = ["-m", "cobre_shm.spawn", "-n", str(ranks)] if ranks > 1 else []
    return started(
        [sys.executable, "-u", *launcher, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(process, is_wanted):
    for line in process.stdout:
        if is_wanted(line):
            return line
    raise AssertionError(f"ended with {process.wait(10)} before: {process.stderr.read()}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_termination_ends_with_a_checkpoint(random_path, tmp_path, ranks):
    out = tmp_path / "out"
    arguments = ("--output-dir", out, "--iterations", 100_000)
    with launched(ranks, "-m", "cobre_shm.sddp", random_path, *arguments) as process:
        first_line(process, lambda line: line.split()[:1] == ["1"])
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    done = train_until(random_path, out, 1, resume=True).iterations
    assert done >= 1
    result = train_until(random_path, out, done + 2, resume=True)
    assert series_digest(result) == digest_alone(random_path, done + 2)


def history_length(path, out):
    case = load_case(path)
    data = checkpoint.read_checkpoint(checkpoint_of(out), case)
    return len(checkpoint.decode(data, case.digest, case.stages, out).history) if data else 0


_ENDLESS = """
import sys
from cobre_shm import create_communicator
from cobre_shm.sddp import train
case, out, every = sys.argv[1:]
with create_communicator() as comm:
    train(
        case, comm, iterations=100_000, output_dir=out, checkpoint_every=int(every), resume=True,
        progress=lambda item: print(item.iteration, flush=True),
    )
"""


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        (1, 3),
        pytest.param(1, 40, marks=pytest.mark.slow),
        pytest.param(2, 20, marks=pytest.mark.slow),
    ],
)
def test_killed_training_loses_no_more_than_since_its_checkpoint(tmp_path, ranks, kills):
    """Kill at random moments, the writing of checkpoints among them."""
    path, out, every, moment = random_case(tmp_path / "case"), tmp_path / "out", 2, random.Random(7)
    program = tmp_path / "endless.py"
    program.write_text(_ENDLESS)
    saved = 0
    for _ in range(kills):
        with launched(ranks, program, path, out, every) as process:
            seen = [int(first_line(process, str.strip))]
            assert seen[0] == saved + 1
            time.sleep(moment.uniform(0.0, 0.1))
            process.kill()
            rest, _ = process.communicate(timeout=90)
        seen += [int(line) for line in rest.splitlines()]
        now = history_length(path, out)
        # An iteration is shown before its checkpoint is written.
        assert now >= max(saved, seen[-1] - every)
        saved = now
    assert saved > 0
    result = train_until(path, out, saved + 3, resume=True)
    assert series_digest(result) == digest_alone(path, saved + 3)


def test_command_line_needs_a_place_for_checkpoints(capsys):
    for arguments in (["--resume"], ["--checkpoint-every", "2"]):
        assert main(arguments) == 1
        assert "--output-dir" in capsys.readouterr().err


def test_checkpoint_stores_arrays_by_their_names_only(random_path, tmp_path, monkeypatch):
    """Before numpy 2.1 ``savez`` has no options: every keyword is the name of an array."""
    kept, savez = [], np.savez
    monkeypatch.setattr(
        np, "savez", lambda file, **arrays: kept.append(arrays) or savez(file, **arrays)
    )
    train_until(random_path, tmp_path / "out", 1)
    assert {type(values) for arrays in kept for values in arrays.values()} == {np.ndarray}


def test_remains_that_cannot_be_removed_do_not_keep_a_checkpoint_from_being_written(tmp_path):
    path = tmp_path / checkpoint.FILE_NAME
    remains = path.with_name(f".{path.name}.12345")
    remains.mkdir()
    checkpoint.write_checkpoint(path, b"new")
    assert path.read_bytes() == b"new"
