"""``spawn.run``: one function on every rank, its results, and every way in which it can fail."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cobre_shm import WorkerError, spawn
from cobre_shm.errors import CollectiveTimeout, RankFailed
from cobre_shm.spawn import workers
from cobre_shm.spawn.errors import InvalidArguments, ProgramNotRunnable
from cobre_shm.spawn.remote import RemoteError, RemoteTraceback
from tests.library import programs
from tests.support.processes import started

pytest.importorskip("posix_ipc", reason="backend shm")
ROOT = Path(__file__).resolve().parents[2]


def python(*words, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words],
        env={**env, **options.pop("env", {})},
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
        **options,
    )


@pytest.mark.parametrize("nprocs", [1, 3])
def test_results_come_by_rank(nprocs):
    found = spawn.run(programs.add_up, nprocs, args=(2.0,), kwargs={"offset": 1.0})
    total = (np.arange(3.0) * nprocs + sum(range(nprocs))) * 2 + 1
    for rank, (of_rank, size, backend, values) in enumerate(found):
        assert (of_rank, size, backend) == (rank, nprocs, "shm")
        assert values.tolist() == total.tolist()


def test_worker_finds_what_a_rank_of_the_launcher_finds(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "7")
    monkeypatch.setenv("COBRE_TCP_RANK", "3")
    for rank, (env, (argv, leads_group, main)) in enumerate(spawn.run(programs.surroundings, 2)):
        assert env["RANK"] == env["LOCAL_RANK"] == env["COBRE_SHM_RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["COBRE_SHM_SIZE"] == "2"
        assert "COBRE_TCP_RANK" not in env
        assert argv == sys.argv
        assert leads_group
        assert main is None


def test_large_arguments_and_results_pass():
    data = np.random.default_rng(1).bytes(20_000_000)
    assert spawn.run(programs.echo, 2, args=(data, "x")) == [(data, "x")] * 2


def test_regions_are_shared():
    assert spawn.run(programs.shape_of_region, 3) == [sum(i % 3 for i in range(1000))] * 3


def test_exception_comes_back_with_its_traceback():
    with pytest.raises(WorkerError) as caught:
        spawn.run(programs.end, 3, args=(1, "raise"))
    error = caught.value
    assert (error.rank, error.exit_code, error.signal) == (1, 1, None)
    assert type(error.inner) is ValueError
    assert error.inner.args == ("the reason",)
    assert error.__cause__ is error.inner
    assert isinstance(error.inner.__cause__, RemoteTraceback)
    assert "programs.py" in str(error.inner.__cause__)
    assert "the reason" in error.message
    assert error.to_dict()["context"]["inner"] == {"kind": "ValueError", "message": "the reason"}


@pytest.mark.parametrize(
    ("rank", "how", "code", "number"),
    [(0, "exit", 3, None), (2, "leave", 0, None), (0, "kill", -9, 9), (2, "crash", -11, 11)],
)
def test_death_of_a_worker_is_told_by_its_end(capfd, rank, how, code, number):
    with pytest.raises(WorkerError) as caught:
        spawn.run(programs.end, 3, args=(rank, how))
    error = caught.value
    assert (error.rank, error.exit_code, error.signal) == (rank, code, number)
    assert error.pid > 0
    if how == "exit":
        assert isinstance(error.inner, SystemExit)
    else:
        assert error.inner is None
    capfd.readouterr()  # the interpreter's own report of a crash


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_others_are_ended_even_if_they_ignore_sigterm(how):
    with pytest.raises(WorkerError) as caught:
        spawn.run(programs.end_without_communicator, 3, args=(how, 1))
    assert caught.value.rank == 1


@pytest.mark.parametrize(
    ("how", "kind", "args"),
    [
        ("refuse", programs.Refusal, ("no", 3)),
        ("file", FileNotFoundError, (2, "No such file or directory")),
        (
            "say nothing",
            RemoteError,
            ("tests.library.programs.Speechless: its text cannot be made: KeyError",),
        ),
        ("unheard", RemoteError, ("tests.library.programs.Unheard: this and that",)),
    ],
)
def test_exceptions_of_all_kinds_come_back(how, kind, args):
    with pytest.raises(WorkerError) as caught:
        spawn.run(programs.end, 1, args=(0, how))
    assert type(caught.value.inner) is kind
    assert caught.value.inner.args == args


def test_victims_are_not_blamed():
    """All ranks fail, the others because of the one."""
    for _ in range(3):
        with pytest.raises(WorkerError) as caught:
            spawn.run(programs.end, 4, args=(3, "raise"))
        assert caught.value.rank == 3
        assert not isinstance(caught.value.inner, RankFailed)


def test_culprit_that_is_slower_to_end_than_its_victims_is_blamed(monkeypatch):
    monkeypatch.setattr(workers, "CULPRIT_SECS", 60.0)
    with pytest.raises(WorkerError) as caught:
        spawn.run(programs.raise_and_end_late, 3)
    error = caught.value
    assert (error.rank, error.exit_code, type(error.inner)) == (0, 1, ValueError)


def test_culprit_that_goes_on_is_told_to_end_before_it_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "CULPRIT_SECS", 0.2)
    monkeypatch.setattr(workers, "_GRACE", 30.0)
    with pytest.raises(WorkerError):
        spawn.run(programs.leave_and_save_at_the_end, 2, args=(str(tmp_path),))
    assert (tmp_path / "saved").exists()


def test_what_a_worker_raises_because_it_is_told_to_end_is_not_the_failure(monkeypatch):
    monkeypatch.setattr(workers, "_GRACE", 30.0)
    with pytest.raises(WorkerError) as caught:
        spawn.run(programs.stay_away_and_object_to_the_end, 2)
    assert (caught.value.rank, type(caught.value.inner)) == (0, CollectiveTimeout)


def test_result_that_cannot_be_sent_is_the_workers_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(WorkerError) as caught:
        spawn.run(threading.Lock, 1)
    assert isinstance(caught.value.inner, TypeError)


@pytest.mark.parametrize("nprocs", [0, -1, 1025, 2.0, "2", True, None])
def test_bad_number_of_workers_is_refused(nprocs):
    with pytest.raises(InvalidArguments, match=r"nprocs=.*1\.\.1024"):
        spawn.run(programs.echo, nprocs)


def test_bad_function_is_refused():
    with pytest.raises(InvalidArguments, match="something to call"):
        spawn.run("echo", 2)
    with pytest.raises(ProgramNotRunnable, match="cannot be sent"):
        spawn.run(programs.echo, 2, args=(threading.Lock(),))


def test_groups_run_side_by_side_in_threads():
    found = {}

    def call(number):
        found[number] = spawn.run(programs.add_up, 2, args=(number,))

    threads = [threading.Thread(target=call, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (1, 2):
        assert [values.tolist() for *_, values in found[number]] == [
            ((np.arange(3.0) * 2 + 1) * number).tolist()
        ] * 2


PROGRAM = """
import sys
from cobre_shm import create_communicator, spawn
print("main runs", flush=True)
class Pair:
    def __init__(self, rank): self.rank = rank
def function(word):
    with create_communicator() as comm:
        comm.barrier()
        return word, Pair(comm.rank)
found = spawn.run(function, nprocs=2, args=("ok",))
print([(word, isinstance(pair, Pair), pair.rank) for word, pair in found])
"""
ANSWER = "[('ok', True, 0), ('ok', True, 1)]"


def test_main_program_without_a_guard_is_not_run_again(tmp_path):
    pytest.importorskip("cloudpickle", reason='needs the extra "notebook"')
    (tmp_path / "program.py").write_text(PROGRAM)
    for words in ([str(tmp_path / "program.py")], ["-c", PROGRAM]):
        done = python(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"main runs\n{ANSWER}\n"


def test_interactive_interpreter_can_start_workers():
    pytest.importorskip("cloudpickle", reason='needs the extra "notebook"')
    lines = PROGRAM.replace("\nclass", "\n\nclass").replace("\ndef f", "\n\ndef f")
    lines = lines.replace("\nfound", "\n\nfound").replace("\nprint([", "\n\nprint([")
    done = python("-i", "-q", input=lines)
    assert ANSWER in done.stdout, done.stderr


def test_function_of_the_main_program_without_cloudpickle_is_refused():
    program = "import sys; sys.modules['cloudpickle'] = None\n" + PROGRAM
    done = python("-c", program)
    assert done.returncode == 1
    assert 'pip install "cobre-shm[notebook]"' in done.stderr


@contextlib.contextmanager
def workers_that_stay(folder):
    """Give a program with workers that stay, and its workers' pids once they are up."""
    code = (
        "import sys, pathlib\nfrom cobre_shm import spawn\nfrom tests.library import programs\n"
        "spawn.run(programs.pids_in, 2, args=(pathlib.Path(sys.argv[1]),))"
    )
    with started(
        [sys.executable, "-c", code, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        yield process, [int((folder / f"{rank}").read_text()) for rank in range(2)]


def all_gone(pids):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_the_program(tmp_path, number):
    with workers_that_stay(tmp_path) as (process, pids):
        process.send_signal(number)
        process.wait(timeout=60)
        assert all_gone(pids)


def test_interrupt_ends_the_workers(tmp_path):
    with workers_that_stay(tmp_path) as (process, pids):
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    assert text.rstrip().endswith("KeyboardInterrupt")
    assert all_gone(pids)


def test_interrupt_that_ends_no_wait_ends_the_workers_all_the_same(tmp_path):
    """One that another thread takes is heard as one just before the wait would be: behind it."""
    code = (
        "import pathlib, signal, sys, threading, time\n"
        "from cobre_shm import spawn\nfrom tests.library import programs\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def interrupt():\n"
        "    while not (folder / 'ready').exists(): time.sleep(0.02)\n"
        "    signal.pthread_kill(threading.get_ident(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt, daemon=True).start()\n"
        "spawn.run(programs.pids_in, 2, args=(folder,))"
    )
    # No worker says anything before that.
    done = python("-c", code, tmp_path, env={"COBRE_SHM_TIMEOUT_SECS": f"{programs.STILL}"})
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert all_gone([int((tmp_path / f"{rank}").read_text()) for rank in range(2)])


def test_stopped_worker_does_not_keep_the_others_errors_from_coming(tmp_path):
    """A stopped process takes no SIGTERM, but SIGKILL."""
    with workers_that_stay(tmp_path) as (process, pids):
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(pids[1], signal.SIGKILL)
        _, text = process.communicate(timeout=60)
    assert "Worker 1 of 2" in text
    assert "SIGKILL" in text
    assert all_gone(pids)


def test_worker_out_of_memory_is_told_with_peak_and_limit(limited_group):
    def enter():
        (limited_group / "cgroup.procs").write_text(str(os.getpid()))

    code = (
        "from cobre_shm import WorkerError, spawn\n"
        "from tests.library import programs\n"
        "for how in 'fill', 'kill':\n"
        "    try: spawn.run(programs.end, 2, args=(1, how))\n"
        "    except WorkerError as error:\n"
        "        print(error.rank, error.signal, error.cause, error, sep='|')\n"
    )
    done = python("-c", code, preexec_fn=enter)
    assert done.returncode == 0, done.stderr
    starved, killed = (line.split("|") for line in done.stdout.splitlines())
    assert starved[:2] == killed[:2] == ["1", "9"]
    assert "a limit of 300 MiB" in starved[2]
    assert starved[2] in starved[3]
    assert killed[2] == "None"


REAPED = """
import math, os, signal
from cobre_shm import WorkerError, spawn
from tests.library import programs

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
killpg, groups = os.killpg, []
os.killpg = lambda *words: groups.append(words) or killpg(*words)
print(spawn.run(math.hypot, 2, (3.0, 4.0)), len(groups))
for how in ("raise", "exit", "kill"):
    try:
        spawn.run(programs.end, 1, (0, how))
    except WorkerError as error:
        print(error.exit_code, error.signal, type(error.inner).__name__, len(groups), error.message)
"""


def test_workers_of_a_program_that_ignores_sigchld():
    """Their ends leave no trace, and their pids may come to mean others at once."""
    done = python("-c", REAPED)
    assert done.returncode == 0, done.stderr
    result, *failures = done.stdout.splitlines()
    assert result == "[5.0, 5.0] 0"
    assert [line.split()[:4] for line in failures] == [
        ["None", "None", "ValueError", "0"],
        ["None", "None", "SystemExit", "0"],
        ["None", "None", "NoneType", "0"],
    ]
    assert "ended unseen: SIGCHLD is ignored" in failures[-1]


CLOSED = """
import os, sys
from pathlib import Path
import numpy
import cobre_shm
from tests.library import programs
target, *numbers = sys.argv[1:]
missing = [int(number) for number in numbers]
for descriptor in missing:
    os.close(descriptor)
for descriptor in missing if "reused" in target else []:
    assert os.open(target, os.O_CREAT | os.O_RDWR) == descriptor
found = cobre_shm.spawn.run(programs.speak_and_add_up, 2)
for descriptor in missing:
    try:
        found.append(os.fstat(descriptor).st_size)
    except OSError:
        found.append("closed")
Path(target).write_text(repr(found))
"""


@pytest.mark.parametrize("missing", [[0], [1], [2], [0, 1, 2]])
@pytest.mark.parametrize(("name", "after"), [("found", "closed"), ("reused", 0)])
def test_workers_of_a_program_without_standard_descriptors(tmp_path, missing, name, after):
    """Nor do they write into what the program has opened in their place."""
    done = python("-c", CLOSED, tmp_path / name, *map(str, missing))
    assert (tmp_path / name).read_text() == repr([2.0, 2.0] + [after] * len(missing)), done


def test_worker_that_dies_before_it_is_told_raises_no_signal(monkeypatch):
    raised, before = [], signal.getsignal(signal.SIGPIPE)
    monkeypatch.setattr(workers, "_BOOT", "raise SystemExit(7)")
    signal.signal(signal.SIGPIPE, lambda number, _: raised.append(number))
    try:
        with pytest.raises(WorkerError, match="exit code 7"):
            spawn.run(len, 1, (bytes(10_000_000),))
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert not raised
