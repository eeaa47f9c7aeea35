import json
import os
import subprocess
import sys

import pytest

from cobre_shm.errors import AllocationFailed, BackendNotAvailable
from cobre_shm.segment.watch import WatchedSegment
from cobre_shm.spawn import launcher
from cobre_shm.spawn.__main__ import main
from tests.spawn.conftest import WATCHDOG_SECS


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "-n"),
        (["program.py"], "-n"),
        (["-n"], "-n"),
        (["-n", "0"], "'0'"),
        (["-n", "-3"], "'-3'"),
        (["-n", "two"], "'two'"),
        (["-n", "1.5"], "'1.5'"),
        (["-n", "1000000"], "'1000000'"),
        (["-n2.0"], "'2.0'"),
        (["--np", ""], "''"),
        (["--np=none"], "'none'"),
        (["-n", "2", "--np=--"], "--np=--"),
        (["-n", "2", "--unknown", "program.py"], "--unknown"),
        (["-n", "2", "--lab"], "--lab"),
        (["-n", "2", "--grace", "soon"], "'soon'"),
        (["-n", "2", "--grace", "-1"], "'-1'"),
        (["-n", "2", "--grace", "inf"], "'inf'"),
        (["-n", "2", "--output-format", "xml"], "'xml'"),
        (["-n", "2", "-m"], "-m"),
        (["-n", "2", "-c"], "-c"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_1(capsys, arguments, word):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert word in err


def test_error_comes_out_of_the_process_as_it_should(spawn):
    done = spawn.run("-n", "two", "-c", "print('never')")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"cobre_shm.spawn: Argument -n: ")


@pytest.mark.parametrize(
    ("program", "code"),
    [
        (["absent.py"], 127),
        (["absent/program.py"], 127),
        (["program.py/below"], 127),
        (["name\nwith a line end"], 127),
        (["x" * 5000], 127),
        (["hostname"], 127),
        (["--", "-x.py"], 127),
        (["-m", "absent_module"], 127),
        (["-m", "absent.module"], 127),
        (["-m", "cobre_shm.absent"], 127),
        (["-m", "json"], 127),
        (["-m", "json.tool.below"], 127),
        (["-m", ""], 127),
        (["-m", ".json"], 127),
        (["empty_directory"], 126),
        (["fifo"], 126),
        (["/dev/null"], 126),
        ([sys.executable], 126),
    ],
)
def test_program_that_cannot_run_is_one_line_before_anything_starts(
    tmp_path, monkeypatch, capsys, program, code
):
    (tmp_path / "program.py").write_text("")
    (tmp_path / "empty_directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    assert main(["-n", "2", *program]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["-n", "0"], "InvalidArguments", 1),
        (["-n", "2", "--unknown"], "InvalidArguments", 1),
        (["-n", "2", "absent.py"], "ProgramNotFound", 127),
        (["-n", "2", "/dev/null"], "ProgramNotRunnable", 126),
    ],
)
@pytest.mark.parametrize("flag", [["--output-format", "json"], ["--output-format=json"]])
def test_errors_can_be_json(capsys, flag, arguments, kind, code):
    assert main([*flag, *arguments]) == code
    error = json.loads(capsys.readouterr().err)
    assert set(error) == {"kind", "message", "context", "suggestion"}
    assert error["kind"] == kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(30, "Read-only file system"), "MpiError"),
        (AllocationFailed(100, "No space left on device"), "MpiError"),
        (BackendNotAvailable("shm", ["local"]), "IncompatibleSettings"),
    ],
)
def test_shared_memory_that_cannot_be_made_is_one_message_and_code_4(
    monkeypatch, capsys, error, kind
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(WatchedSegment, "create", refuse)
    arguments = ["-n", "2", "--output-format", "json", "-c", "print('never')"]
    assert main(arguments) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["kind"] == kind


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_information_goes_to_standard_output(spawn, flag):
    done = spawn.run(flag)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    "flags",
    [
        ["-n", "3"],
        ["-n3"],
        ["-np", "3"],
        ["--np", "3"],
        ["--np=3"],
        ["--nproc-per-node", "3"],
        ["--nproc_per_node=3"],
        ["--nproc_per_node", "3", "--max_restarts=2", "--output_dir", "a_b"],
        ["-n", "2", "-n", "3"],
    ],
)
def test_every_spelling_of_the_number_of_ranks_works(monkeypatch, flags):
    jobs = []
    monkeypatch.setattr(launcher, "launch", lambda job: jobs.append(job) or 0)
    assert main([*flags, "-c", "pass"]) == 0
    (job,) = jobs
    assert (job.size, job.program.words) == (3, ["-c", "pass"])


def test_auto_starts_one_rank_for_each_usable_cpu(spawn):
    def use_one_cpu():
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])

    done = spawn.run(
        *("-n", "auto", "-c", "import os; print(os.environ['WORLD_SIZE'])"),
        preexec_fn=use_one_cpu,
    )
    assert done.stdout == b"1\n"


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["-c", "{show}", "a", "-n", "9"], ["-c", "a", "-n", "9"]),
        (["-c{show}", "--label"], ["-c", "--label"]),
        (["show.py", "-l", "--", "x"], ["show.py", "-l", "--", "x"]),
        (["--", "show.py", "-l"], ["show.py", "-l"]),
        (["--", "-c", "{show}", "-l"], ["-c", "-l"]),
        (["--label", "--grace", "1", "show.py", ""], ["show.py", ""]),
    ],
)
def test_own_options_end_at_the_program(spawn, words, seen):
    show = "import json, sys; print(json.dumps(sys.argv))"
    (spawn.folder / "show.py").write_text(show)
    done = spawn.run(
        "-n", 1, *(show if w == "{show}" else w.replace("{show}", show) for w in words)
    )
    assert done.stderr == b""
    assert json.loads(done.stdout.removeprefix(b"[0] ")) == seen


def test_without_a_program_the_shipped_case_is_trained(spawn):
    pytest.importorskip("highspy", reason='needs the extra "sddp"')
    pytest.importorskip("pyarrow", reason='needs the extra "sddp"')
    process = spawn.start("-n", 1)
    # The first line says it; the training would take seconds.
    assert process.stdout.readline() == b"case four_reservoirs, 1 rank, backend shm\n"
    process.terminate()
    process.communicate(timeout=WATCHDOG_SECS)


def test_launcher_imports_neither_numpy_nor_numba(spawn):
    code = (
        "import sys\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "assert main(['-n', '1', '-c', 'pass']) == 0\n"
        "print([m for m in ('numba', 'numpy', 'highspy') if m in sys.modules])"
    )
    done = spawn.run(command=[sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert done.stdout == b"[]\n", done.stderr
