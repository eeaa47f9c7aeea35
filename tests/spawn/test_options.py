"""Options that change what ranks are given and what is shown of them."""

import contextlib
import io
import json
import os
import signal
import sys

import pytest

from cobre_shm.spawn.command import execute

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def test_timestamps_and_labels_begin_every_line(spawn):
    code = "import sys; print('a\\nb'); print('c', file=sys.stderr)"
    done = spawn.run("-n", 1, "--timestamps", "--tag-output", "-c", code)
    for line, rest in zip(done.stdout.splitlines(), (b"a", b"b"), strict=True):
        stamp, label, text = line.split(b" ")
        assert (len(stamp), label, text) == (23, b"[0]", rest)
    assert done.stderr.split(b" ", 1)[1] == b"[0:err] c\n"


@pytest.mark.parametrize("tee", [False, True])
def test_output_goes_to_files_of_each_rank(spawn, tee):
    code = (
        "import os, sys, time\n"
        "sys.stdout.buffer.write(b'out \\xff ' + os.environ['RANK'].encode())\n"
        "print('err', file=sys.stderr)\n"
        "open('written' + os.environ['RANK'], 'w').close()\n"
        # Its failure ends the other, which may not have begun.
        "while not os.path.exists('written0'): time.sleep(0.001)\n"
        "sys.exit(3 * int(os.environ['RANK']))"
    )
    folder = spawn.folder / "new" / "logs"
    flags = ["--tee"] if tee else []
    done = spawn.run("-n", 2, "-l", "--output-dir", folder, *flags, "-c", code)
    for rank in range(2):
        assert (folder / f"rank-{rank}.out").read_bytes() == b"out \xff %d" % rank
        assert (folder / f"rank-{rank}.err").read_bytes() == b"err\n"
    assert (b"[1] out \xff 1" in done.stdout) == tee
    assert (b"[1:err] err" in done.stderr) == tee
    # Whoever sees nothing of a rank still sees why it failed.
    assert b"Rank 1 of 2" in done.stderr
    assert done.returncode == 3


def test_output_of_some_ranks_is_shown(spawn):
    done = spawn.run("-n", 5, "--show-ranks", "0,3-4", "-c", "import os; print(os.environ['RANK'])")
    assert sorted(done.stdout.split()) == [b"0", b"3", b"4"]


@pytest.mark.parametrize("option", ["--output-dir", "--events"])
def test_output_that_cannot_be_written_is_one_line(spawn, option):
    spawn.write("file", "")
    done = spawn.run("-n", 1, option, "file/below", "-c", "print('never')")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.count(b"\n") == 1
    assert b"file/below" in done.stderr


def test_full_disk_under_an_output_file_ends_the_run(spawn):
    folder = spawn.folder / "logs"
    folder.mkdir()
    (folder / "rank-0.out").symlink_to("/dev/full")
    code = "import time; print('x'); time.sleep(3600)"
    done = spawn.run("-n", 1, "--output-dir", folder, "-c", code)
    assert done.returncode == 1
    assert b"No space left" in done.stderr


def test_variables_of_the_command_line_reach_ranks(spawn):
    done = spawn.run(
        *("-n", 1, "-x", "A=1=2", "-x", "OLD", "-x", "OMP_NUM_THREADS=3"),
        *("--unset-env", "GONE", "--unset-env", "PYTHONUNBUFFERED", "--stall-warn", 2.5),
        *("-c", SHOW),
        env={"GONE": "1", "OLD": "old", "A": "0"},
    )
    seen = json.loads(done.stdout)
    assert (seen["A"], seen["OLD"], seen["OMP_NUM_THREADS"]) == ("1=2", "old", "3")
    assert seen["COBRE_SHM_STALL_WARN_SECS"] == "2.5"
    assert "GONE" not in seen
    assert "PYTHONUNBUFFERED" not in seen


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ([], {}, "1"),
        ([], {"OMP_NUM_THREADS": "7"}, "7"),
        (["--threads-per-rank", "2"], {"OMP_NUM_THREADS": "7"}, "2"),
        (["--threads-per-rank", "keep"], {}, None),
        (["--threads-per-rank", "keep"], {"OMP_NUM_THREADS": "7"}, "7"),
        (["--threads-per-rank", "auto"], {}, "2"),
    ],
)
def test_size_of_thread_pools(monkeypatch, flags, env, expected):
    from cobre_shm.spawn import options

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(options, "count_cpus", lambda: 6)
    job = options.parse(["-n", "3", *flags, "-c", "pass"]).job()
    assert job.environment.get("OMP_NUM_THREADS") == expected


@pytest.mark.parametrize("method", ["zygote", "spawn"])
def test_ranks_are_bound(spawn, method):
    cpus = sorted(os.sched_getaffinity(0))
    code = "import os; print(os.environ['RANK'], sorted(os.sched_getaffinity(0)))"
    policy = f"{cpus[-1]},{cpus[0]}"
    done = spawn.run("-n", 3, "--start-method", method, "--bind-to", policy, "-c", code)
    expected = [[cpus[-1]], [cpus[0]], [cpus[-1]]]
    assert sorted(done.stdout.decode().splitlines()) == [
        f"{rank} {each}" for rank, each in enumerate(expected)
    ]


def test_policies_of_binding(monkeypatch, tmp_path):
    from cobre_shm.spawn.binding import cpus_of_ranks
    from cobre_shm.spawn.errors import InvalidArguments

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 4, 5, 6})
    for cpu in range(8):
        topology = tmp_path / f"cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7", "\n")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cpus)
    assert cpus_of_ranks("none", 2, tmp_path) == []
    assert cpus_of_ranks("core", 4, tmp_path) == [[0, 4], [1, 5], [2, 6], [0, 4]]
    first, second = [0, 1, 4, 5], [2, 6]
    assert cpus_of_ranks("numa", 3, tmp_path) == [first, first, second]
    assert cpus_of_ranks("5-6,0", 4, tmp_path) == [[5], [6], [0], [5]]
    for wrong in ("3", "a", "2-1", "", "1-", "-1"):
        with pytest.raises(InvalidArguments):
            cpus_of_ranks(wrong, 2, tmp_path)


def test_any_command_can_be_run(spawn):
    # The failure of rank 1 ends rank 0, which may not have begun.
    wait = 'touch "up$RANK"; until [ -e up0 ]; do sleep 0.01; done'
    code = f'echo "$RANK $1"; {wait}; exit $RANK'
    done = spawn.run("-n", 2, "--no-python", "sh", "-c", code, "x", "a b")
    assert sorted(done.stdout.splitlines()) == [b"0 a b", b"1 a b"]
    assert done.returncode == 1
    for name, code in (("absent-command", 127), ("./data", 126)):
        spawn.write("data", "no program")
        done = spawn.run("-n", 2, "--no-python", name)
        assert (done.returncode, done.stderr.count(b"\n")) == (code, 1)


def test_dry_run_starts_nothing_and_shows_commands_that_work(spawn):
    words = ["-n", 2, "-x", "A=b c", "-c", "import os; print(os.environ['RANK'], os.environ['A'])"]
    shown = spawn.run("--dry-run", *words)
    assert shown.returncode == 0
    done = spawn.run(command=["sh", "-c", shown.stdout])
    assert done.stderr == b""
    assert done.stdout == b"0 b c\n1 b c\n"


STUCK = """
import sys, time
import cobre_shm
comm = cobre_shm.create_communicator()
comm.barrier()
def stuck():
    open("stuck", "w").close()
    while True: time.sleep(0.01)
if comm.rank == 1: stuck()
comm.barrier()
"""
# The time is up when all are where they stay, however long that takes, and all say where.
IN_TIME = """
import os, sys
from cobre_shm.spawn import group
from cobre_shm.spawn.__main__ import main
end = group.Group._on_timeout
def end_when_stuck(self):
    waiting = self.meeting.progress().last[0]
    if waiting and waiting.sequence == 2 and os.path.exists("stuck"):
        end(self)
    else:
        self.loop.call_after(0.1, lambda: end_when_stuck(self))
group.Group._on_timeout = end_when_stuck
group.STACKS_SECS = 3.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("spawn", ["zygote", "spawn"], indirect=True)
def test_run_that_takes_too_long_shows_where_all_ranks_are(spawn):
    spawn.write("program.py", STUCK)
    # Late ranks would show their stacks by themselves before.
    limits = ("--grace", "1", "--timeout", "1", "--stall-warn", "600")
    words = [f"--start-method={spawn.method}", "-n", "2", *limits, "program.py"]
    done = spawn.run(command=[sys.executable, "-c", IN_TIME, *words])
    text = done.stderr.decode()
    assert done.returncode == 124
    assert "longer than 1 s (--timeout)" in text
    assert "inside collective 2, barrier" in text
    assert "finished collective 1, barrier" in text
    first, second = text.split("Rank 1 (pid")
    assert "program.py" in first.split("Rank 0 (pid")[1]
    assert "in stuck" in second
    # The way to the program is nobody's concern.
    assert "direct.py" not in text


def test_group_that_failed_is_started_again(spawn):
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "me = Path(os.environ['RANK'])\n"
        "tries = me.read_text() if me.exists() else ''\n"
        "me.write_text(tries + os.environ['COBRE_SHM_NAME'] + '\\n')\n"
        "print(len(tries.split()))\n"
        "sys.exit(0 if len(tries.split()) == 2 else 5)"
    )
    done = spawn.run("-n", 1, "--max-restarts", 5, "--output-dir", "logs", "-c", code)
    assert done.returncode == 0
    assert (spawn.folder / "logs" / "rank-0.out").read_text() == "0\n1\n2\n"
    assert len(set((spawn.folder / "0").read_text().split())) == 3
    assert done.stderr.count(b"Starting again") == 2
    done = spawn.run("-n", 1, "--max-restarts", 1, "-c", "raise SystemExit(5)")
    assert (done.returncode, done.stderr.count(b"Starting again")) == (5, 1)


def test_time_limit_holds_for_all_attempts_together(spawn):
    limits = ("--max-restarts", 10_000, "--timeout", 3)
    done = spawn.run("-n", 1, *limits, "-c", "raise SystemExit(5)")
    assert done.returncode == 124


def test_stopped_run_is_not_started_again(spawn):
    code = "print('up', flush=True); import time; time.sleep(3600)"
    process = spawn.start("-n", 1, "--max-restarts", 5, "-c", code)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143


def test_kill_for_want_of_memory_is_told_from_another(tmp_path):
    from cobre_shm.spawn.memory import MemoryGroup

    (tmp_path / "membership").write_text("0::/a/b\n")
    group = tmp_path / "mount" / "a" / "b"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    (group / "memory.peak").write_text("104857600\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("209715200\n")
    memory = MemoryGroup(tmp_path / "membership", tmp_path / "mount")
    assert not memory.has_killed()
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert memory.has_killed()
    assert "a peak of 100 MiB and a limit of 200 MiB" in memory.describe()
    (tmp_path / "membership").write_text("3:memory:/c\n")
    legacy = tmp_path / "mount" / "memory" / "c"
    legacy.mkdir(parents=True)
    (legacy / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    (legacy / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    memory = MemoryGroup(tmp_path / "membership", tmp_path / "mount")
    assert not memory.has_killed()
    (legacy / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert memory.has_killed()
    assert "a peak that is not known and the machine's memory" in memory.describe()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tee"], "--output-dir"),
        (["--timeout", "0"], "'0'"),
        (["--max-restarts", "-1"], "'-1'"),
        (["--threads-per-rank", "none"], "'none'"),
        (["--show-ranks", "1-"], "'1-'"),
        (["--bind-to", "socket"], "'socket'"),
        (["-x", "=1"], "'=1'"),
        (["-x", "NOT_SET_HERE"], "NOT_SET_HERE"),
        (["--start-method", "fork"], "'fork'"),
        (["--preload", "a b"], "'a b'"),
        (["--preload", "numba,"], "'numba,'"),
        (["-x", "COBRE_TCP_SECRET=hush"], "COBRE_TCP_SECRET_FILE"),
        (["-x", "COBRE_COMM_BACKEND=tcp"], "--backend"),
        (["-x", "RANK=1"], "RANK"),
        (["--unset-env", "COBRE_SHM_SIZE"], "COBRE_SHM_SIZE"),
        (["--backend", "mpi"], "mpiexec"),
        (["--backend", "local"], "no launcher"),
        (["--backend", "smh"], "'smh'"),
        (["--show-ranks", "0,2-3"], "no rank 2"),
        (["--monitor"], "--output-dir"),
        (["--monitor", "--output-dir", "d", "--tee"], "--tee"),
        (["--monitor", "--output-dir", "d", "--backend", "tcp"], "tcp"),
        (["--node-rank", "1"], "--backend tcp"),
        (["--backend", "shm", "--coordinator", "node-0:29500"], "--backend tcp"),
    ],
)
def test_wrong_options_are_one_line_and_code_1(capsys, arguments, word):
    from cobre_shm.spawn.__main__ import main

    assert main(["-n", "2", *arguments, "-c", "pass"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert word in err
    assert "hush" not in err


@pytest.mark.parametrize(
    ("flags", "backend"),
    [
        ([], "shm"),
        (["--backend", "auto"], "shm"),
        (["--backend", "tcp"], "tcp"),
        (["--coordinator", "node-0:29500"], "tcp"),
        (["--nnodes", "2", "--coordinator", "node-0:29500"], "tcp"),
    ],
)
def test_several_machines_mean_tcp(monkeypatch, flags, backend):
    from cobre_shm.spawn.options import parse

    monkeypatch.setenv("COBRE_TCP_SECRET_FILE", "/a/file")
    assert parse(["-n", "2", *flags, "-c", "pass"]).job().backend == backend


def test_no_python_needs_a_command(capsys):
    from cobre_shm.spawn.__main__ import main

    assert main(["-n", "2", "--no-python"]) == 1
    assert "command" in capsys.readouterr().err
    assert main(["-n", "2", sys.executable]) == 126
    assert "--no-python" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "policy"), [("zygote", "core"), ("spawn", "numa")])
def test_ranks_run_where_the_policy_says(spawn, method, policy):
    from cobre_shm.spawn.binding import cpus_of_ranks

    code = "import os; print(os.environ['RANK'], sorted(os.sched_getaffinity(0)))"
    done = spawn.run("-n", 2, "--start-method", method, "--bind-to", policy, "-c", code)
    assert (done.returncode, done.stderr) == (0, b"")
    seen = sorted(done.stdout.decode().splitlines())
    allowed = cpus_of_ranks(policy, 2)
    assert seen == [f"{rank} {cpus}" for rank, cpus in enumerate(allowed)]
    if policy == "core" and allowed[0] != allowed[1]:
        # Said by the machine, not by what deals out the cores.
        (first, second) = (set(json.loads(line.partition(" ")[2])) for line in seen)
        assert not first & second


def test_rank_that_runs_another_program_has_time_to_end(spawn):
    spawn.write(
        "program.py",
        "import os\n"
        "os.execvp('sh', ['sh', '-c', 'trap \"echo saved; exit 0\" TERM; echo on; '\n"
        "          'while :; do sleep 0.1; done'])\n",
    )
    done = spawn.run("-n", 1, "--timeout", 10, "--grace", 60, "program.py")
    assert done.stdout == b"on\nsaved\n"
    assert done.returncode == 124


def test_programs_are_found_in_the_environment_of_the_ranks(spawn):
    (spawn.folder / "places").mkdir()
    spawn.write("places/only_there.py", "print('found')")
    script = spawn.folder / spawn.write("places/only-there", "#!/bin/sh\necho found\n")
    script.chmod(0o755)
    places = str(spawn.folder / "places")
    for name, flags in (
        ("PYTHONPATH", ["-m", "only_there"]),
        ("PATH", ["--no-python", "only-there"]),
    ):
        paths = os.pathsep.join([spawn.environment()[name], places])
        done = spawn.run("-n", 1, "-x", f"{name}={paths}", *flags)
        assert (done.stdout, done.returncode) == (b"found\n", 0), done.stderr


def test_module_whose_package_says_something_is_found_in_the_environment_of_the_ranks(spawn):
    (spawn.folder / "places/talking").mkdir(parents=True)
    spawn.write("places/talking/__init__.py", "print('imported')")
    spawn.write("places/talking/tool.py", "print('found')")
    paths = os.pathsep.join([spawn.environment()["PYTHONPATH"], str(spawn.folder / "places")])
    done = spawn.run("-n", 1, "-x", f"PYTHONPATH={paths}", "-m", "talking.tool")
    assert (done.stdout, done.returncode) == (b"imported\nfound\n", 0), done.stderr
    done = spawn.run("-n", 1, "-x", f"PYTHONPATH={paths}", "-m", "talking.absent")
    assert done.returncode == 127
    assert b"spawn: No module named 'talking.absent'" in done.stderr


def test_dry_run_is_shown_where_only_text_is_taken():
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert execute(["-n", "1", "--dry-run", "-c", "pass"]) == 0
    assert "# 1 rank, start method" in shown.getvalue()


def test_dry_run_that_nobody_reads_ends_as_by_sigpipe(spawn):
    reader, writer = os.pipe()
    os.close(reader)
    done = spawn.run("-n", 2, "--dry-run", "-c", "pass", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_dry_run_shows_any_bytes(spawn):
    done = spawn.run(
        *("-n", 1, "--dry-run", "-x", b"A=\xff".decode(errors="surrogateescape"), "-c", "pass"),
        env={"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0
    assert b"A='\xff'" in done.stdout


def test_options_of_the_interpreter_reach_ranks(spawn):
    command = spawn.command("-n", 1, "-c", "import sys; print(sys.get_int_max_str_digits())")
    done = spawn.run(command=[command[0], "-X", "int_max_str_digits=0", *command[1:]])
    assert done.stdout == b"0\n"
