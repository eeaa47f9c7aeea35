"""The command line: exit codes, one clear message, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from cobre_shm.errors import CommError
from cobre_shm.sddp import simulation, train
from cobre_shm.sddp.__main__ import _simulate, main
from tests.sddp.editing import edit
from tests.sddp.threads import run_ranks
from tests.support.processes import started

ONE_ITERATION = [{"type": "iteration_limit", "limit": 1}]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cobre_shm.sddp", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
    )


def with_simulation(case, scenarios):
    def change(content):
        content["simulation"] = {"enabled": True, "num_scenarios": scenarios}

    edit(case, "config.json", change)


def test_shipped_case_is_trained_when_none_is_named(capsys):
    assert main(["--iterations", "2"]) == 0
    out, err = capsys.readouterr()
    assert "case four_reservoirs, 1 rank, backend local" in out
    assert "stopped after 2 iterations: iteration_limit" in out
    assert "give --output-dir" in out
    assert err == ""


def test_table_has_a_row_per_iteration_and_no_control_codes(random_path, capsys):
    assert main([str(random_path), "--iterations", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["iter", "1", "2", "3"]
    assert not any("\x1b" in line for line in lines)


def test_json_is_an_event_an_iteration_and_then_the_summary(random_path, capsys):
    assert main([str(random_path), "--iterations", "3", "--output-format", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["iteration"] for line in lines[:-1]] == [1, 2, 3]
    answer = lines[-1]
    assert (answer["command"], answer["success"], answer["exit_code"]) == ("train", True, 0)
    assert answer["summary"]["iterations"] == 3
    assert answer["summary"]["backend"] == "local"
    assert answer["summary"]["lower_bound"] == lines[-2]["lower_bound"]


def test_quiet_prints_nothing_and_writes_everything(random_path, tmp_path, capsys):
    with_simulation(random_path, 4)
    out = tmp_path / "out"
    assert main([str(random_path), "--quiet", "--output-dir", str(out)]) == 0
    assert capsys.readouterr() == ("", "")
    assert (out / "training" / "convergence.csv").is_file()
    assert (out / "simulation" / "summary.json").is_file()


@pytest.mark.parametrize(
    "arguments", [["--iterations", "0"], ["--iterations", "x"], ["--unknown"], ["a", "b"]]
)
def test_wrong_arguments_end_with_usage_and_code_one(arguments, capsys):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: python -m cobre_shm.sddp")


def test_wrong_configuration_ends_with_code_two(shipped_copy):
    edit(shipped_copy, "config.json", lambda content: content["training"].pop("forward_passes"))
    done = run(shipped_copy)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("cobre_shm.sddp: error: config.json: training.forward_passes")


def test_wrong_data_end_with_code_three_and_json_on_request(shipped_copy):
    (shipped_copy / "stages.json").unlink()
    done = run(shipped_copy, "--output-format", "json")
    assert done.returncode == 3
    error = json.loads(done.stderr)
    assert error["kind"] == "MissingFile"
    assert error["context"]["file"] == "stages.json"
    assert set(error) == {"kind", "message", "context", "suggestion"}


def test_wrong_backend_is_found_before_the_case_is_read(tmp_path):
    done = run(tmp_path / "absent", COBRE_COMM_BACKEND="nonsense")
    assert done.returncode == 4
    assert "nonsense" in done.stderr
    assert "absent" not in done.stderr
    assert "Traceback" not in done.stderr


def test_unusable_output_directory_is_reported_before_training(random_path, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main([str(random_path), "--output-dir", str(blocked)]) == 1
    out, err = capsys.readouterr()
    assert str(blocked) in err
    assert "iter" not in out


def test_missing_package_names_the_extra(random_path):
    program = (
        "import sys\n"
        "sys.modules['highspy'] = sys.modules['highspy._core'] = None\n"
        "from cobre_shm.sddp.__main__ import main\n"
        f"sys.exit(main([{str(random_path)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 1
    assert 'pip install "cobre-shm[sddp]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"forward_passes": 2**31 - 1, "stopping_rules": ONE_ITERATION}},
        {"simulation": {"enabled": True, "num_scenarios": 2**31 - 1}},
    ],
    ids=["trajectories", "scenarios"],
)
def test_more_than_fits_into_memory_is_an_error(small, change):
    edit(small, "config.json", lambda content: content.update(change))
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from cobre_shm.sddp.__main__ import main\n"
        f"sys.exit(main([{str(small)!r}, '--quiet']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 4
    assert done.stderr.startswith("cobre_shm.sddp: error: Allocation of ")
    assert "Traceback" not in done.stderr


def test_interrupt_ends_after_the_iteration_and_keeps_the_result(random_path, tmp_path):
    edit(
        random_path,
        "config.json",
        lambda content: content["training"].update(
            stopping_rules=[{"type": "iteration_limit", "limit": 100_000}]
        ),
    )
    with started(
        [
            sys.executable,
            "-u",
            "-m",
            "cobre_shm.sddp",
            random_path,
            "--output-dir",
            tmp_path / "out",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:1] == ["1"]:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert ": interrupted" in out
    assert err == ""
    assert (tmp_path / "out" / "policy" / "cuts.parquet").is_file()


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_signal_during_the_simulation_keeps_the_training(random_path, tmp_path, ranks, number):
    with_simulation(random_path, 100_000)
    out = tmp_path / "out"
    launcher = ["-m", "cobre_shm.spawn", "-n", ranks] if ranks > 1 else []
    program = ["-m", "cobre_shm.sddp", random_path, "--iterations", 2, "--output-dir", out]
    with started(
        [sys.executable, "-u", *launcher, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        # The row of the last iteration comes when it is settled why the training ends.
        assert any(line.split()[:1] == ["2"] for line in process.stdout)
        process.send_signal(number)
        printed, err = process.communicate(timeout=180)
    assert process.returncode == 128 + number
    assert err == ""
    assert "stopped after 2 iterations: iteration_limit" in printed
    assert "simulation    interrupted" in printed
    assert (out / "policy" / "cuts.parquet").is_file()
    assert not (out / "simulation" / "summary.json").exists()


@pytest.mark.parametrize("receiver", [0, 2])
def test_signal_to_one_rank_ends_the_simulation_on_all(random_path, receiver):
    with_simulation(random_path, 6)

    def work(comm):
        result = train(random_path, comm, iterations=1)
        return _simulate(result, comm, None, [signal.SIGTERM] if comm.rank == receiver else [])

    assert run_ranks(3, work) == [(None, signal.SIGTERM)] * 3


def test_group_that_is_ended_by_the_signal_is_no_error(random_path, comm, monkeypatch):
    """After a signal the launcher waits for the ranks for the grace time only."""

    def fail(*arguments, **options):
        raise CommError("the launcher ended the group")

    result = train(random_path, comm, iterations=1)
    monkeypatch.setattr(simulation, "simulate", fail)
    assert _simulate(result, comm, None, [signal.SIGINT]) == (None, signal.SIGINT)
    with pytest.raises(CommError):
        _simulate(result, comm, None, [])


@pytest.mark.parametrize(
    ("make", "command", "code", "kind"),
    [
        (lambda case: [str(case / "absent")], "train", 3, "MissingFile"),
        (lambda case: [str(case), "--output-dir", str(case / "stages.json")], "train", 1, None),
        (lambda case: ["report", str(case)], "report", 1, None),
        (lambda case: ["validate", str(case / "absent")], "validate", 3, "MissingFile"),
    ],
)
def test_error_as_json_is_an_answer_that_failed(random_path, capsys, make, command, code, kind):
    assert main([*make(random_path), "--output-format", "json"]) == code
    out, err = capsys.readouterr()
    answer = json.loads(out if command == "validate" else out.splitlines()[-1])
    assert (answer["command"], answer["success"], answer["exit_code"]) == (command, False, code)
    (record,) = answer["errors"]
    assert set(record) == {"kind", "message", "context", "suggestion"}
    assert record["kind"] == (kind or "OutputError")
    if command != "validate":
        assert json.loads(err) == record


def test_case_that_resumes_needs_an_output_directory(random_path, capsys):
    edit(random_path, "config.json", lambda content: content.update(policy={"mode": "resume"}))
    assert main([str(random_path), "--output-format", "json"]) == 1
    out, err = capsys.readouterr()
    (error,) = json.loads(out.splitlines()[-1])["errors"]
    assert error["kind"] == "IncompatibleSettings"
    assert error["context"] == {"setting": "policy.mode"}
    assert json.loads(err) == error


def test_error_of_the_backend_as_json(random_path):
    done = run(random_path, "--output-format", "json", COBRE_COMM_BACKEND="nonsense")
    assert done.returncode == 4
    answer = json.loads(done.stdout)
    assert (answer["success"], answer["exit_code"]) == (False, 4)
    assert answer["errors"] == [json.loads(done.stderr)]
    assert answer["errors"][0]["kind"] == "IncompatibleSettings"


@pytest.mark.parametrize("command", ["validate", "report"])
def test_wrong_arguments_of_a_command_end_with_code_one(command, capsys):
    assert main([command, "--unknown"]) == 1
    assert capsys.readouterr().err.startswith(f"usage: python -m cobre_shm.sddp {command}")


def test_option_begins_with_the_cuts_of_an_earlier_training(random_path, tmp_path, capsys):
    def summary_of(*arguments):
        assert main([str(random_path), "--output-format", "json", *map(str, arguments)]) == 0
        *events, answer = map(json.loads, capsys.readouterr().out.splitlines())
        return events, answer["summary"]

    _, first = summary_of("--iterations", 4, "--output-dir", tmp_path / "out")
    _, fresh = summary_of("--iterations", 1)
    policy = tmp_path / "out" / "policy"
    events, second = summary_of("--iterations", 1, "--warm-start", policy)
    assert [event["iteration"] for event in events] == [1]
    assert second["lower_bound"] >= first["lower_bound"] * (1 - 1e-12) > fresh["lower_bound"]


def test_option_with_no_policy_is_refused_with_code_five(random_path, tmp_path, capsys):
    assert main([str(random_path), "--warm-start", str(tmp_path / "absent")]) == 5
    assert str(tmp_path / "absent") in capsys.readouterr().err


def test_opening_line_says_whether_the_case_goes_on(random_path, tmp_path, capsys):
    def change(content):
        checkpoints = {"enabled": True, "interval_iterations": 1}
        content["policy"] = {"mode": "resume", "path": "./policy", "checkpointing": checkpoints}

    edit(random_path, "config.json", change)
    for iterations, words in (("1", "begins: there is no"), ("2", "goes on from")):
        out = str(tmp_path / "out")
        assert main([str(random_path), "--output-dir", out, "--iterations", iterations]) == 0
        printed = capsys.readouterr()
        assert f", {words} {tmp_path}/out/policy/" in printed.out.splitlines()[0]
        assert printed.err == ""


@pytest.mark.parametrize("mode", ["fresh", "resume"])
def test_directory_that_is_not_read_is_a_warning(random_path, tmp_path, capsys, mode):
    def change(content):
        content["policy"] = {"mode": mode, "path": "./other"}

    edit(random_path, "config.json", change)
    arguments = ["--iterations", "1", "--output-dir", str(tmp_path / "out")]
    assert main([str(random_path), *arguments, "--output-format", "json"]) == 0
    out, err = capsys.readouterr()
    assert "warning: config.json: policy.path './other' is ignored" in err
    assert len(json.loads(out.splitlines()[-1])["warnings"]) == 1
