import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cobre_shm.spawn.rank import Ending, Rank
from cobre_shm.spawn.report import judge

# The first lines of a program: ``ready`` waits until all ranks have come here, ``gone`` until
# one has ended, and ``sleep`` would outlast every watchdog.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
Path(f"pid{rank}.new").write_text(str(os.getpid()))
Path(f"pid{rank}.new").rename(f"pid{rank}")
def ready():
    while not all(Path(f"pid{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.001)
def gone(other):
    while not Path(f"pid{other}").exists():
        time.sleep(0.001)
    stat = Path("/proc", Path(f"pid{other}").read_text(), "stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
def sleep():
    time.sleep(3600)
"""


@pytest.mark.parametrize(
    ("last_act", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(7)", 7),
        ("sys.exit(255)", 255),
        ("sys.exit('text')", 1),
        ("os._exit(3)", 3),
        ("raise ValueError", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("os.abort()", 134),
        ("import ctypes; ctypes.string_at(0)", 139),
    ],
)
def test_exit_code_of_the_failing_rank_is_ours(spawn, last_act, code):
    wait = "sleep()" if code else "pass"
    spawn.write("program.py", f"{PRELUDE}\nif rank != 1: {wait}\n{last_act}")
    done = spawn.run("-n", 3, "program.py")
    assert done.returncode == code
    if code == 0:
        assert done.stderr == b""
    else:
        assert b"Rank 1 of 3" in done.stderr.splitlines()[-1]


def test_first_failure_wins_over_later_ones(spawn):
    # Rank 0 would be looked at first, if the launcher found all of them ended at once.
    spawn.write(
        "program.py",
        f"{PRELUDE}\n"
        "ready()\n"
        "while rank != 1 and '\"exit\"' not in Path('events').read_text(): time.sleep(0.001)\n"
        "sys.exit(10 + rank)",
    )
    done = spawn.run("-n", 4, "--events", "events", "program.py")
    assert done.returncode == 11
    assert b"Rank 1 of 4" in done.stderr


def test_killed_rank_is_named_with_pid_and_signal(spawn):
    spawn.write("program.py", f"{PRELUDE}\nprint(rank, os.getpid(), flush=True)\nsleep()")
    process = spawn.start("-n", 4, "program.py")
    pids = dict(map(int, process.stdout.readline().split()) for _ in range(4))
    os.kill(pids[2], signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 137
    assert out == b""
    text = f"Rank 2 of 4 (pid {pids[2]}) was killed by signal 9 (SIGKILL); exit code 137"
    assert err.decode().splitlines() == [
        "cobre_shm.spawn: The run has failed:",
        "  RANKS  STATE                              LAST COLLECTIVE",
        "  0-1,3  stopped by the launcher (SIGTERM)  none",
        "      2  SIGKILL                            none",
        f"cobre_shm.spawn: {text}",
    ]


def test_last_words_of_the_first_failing_rank_stand_last(spawn):
    spawn.write(
        "program.py",
        f"{PRELUDE}\n"
        "if rank == 1:\n"
        "    while not Path('listening').exists(): time.sleep(0.001)\n"
        "    for i in range(100): print('word', i, file=sys.stderr)\n"
        "    sys.stderr.buffer.write(b'\\xff' * 5000)\n"
        "    sys.exit(5)\n"
        # Asked to end, it knows that the launcher has seen the end of the other and its pipe.
        "def end(*_):\n"
        "    print('other', file=sys.stderr)\n"
        "    sys.exit(6)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "Path('listening').touch()\n"
        "sleep()",
    )
    done = spawn.run("-n", 2, "program.py")
    lines = done.stderr.split(b"\n")
    assert lines[100:103] == [b"\xff" * 5000, b"other", b"cobre_shm.spawn: The run has failed:"]
    assert lines[104].split()[:8] == b"0 stopped by the launcher (exit code 6)".split()
    assert lines[105].split()[:4] == b"1 exit code 5".split()
    assert lines[106].startswith(b"cobre_shm.spawn: Rank 1 of 2 ")
    words = [b"  word %d" % i for i in range(61, 100)]
    assert lines[107:] == [*words, b"  " + b"\xff" * 2000, b""]


def test_last_words_are_not_repeated_where_nothing_came_behind(spawn):
    done = spawn.run("-n", 1, "-c", "raise SystemExit('the reason')")
    assert done.stderr.count(b"the reason") == 1
    assert done.returncode == 1


def test_failure_can_be_json(spawn):
    code = "import os, sys; sys.stderr.write('why\\n'); sys.exit(9)"
    done = spawn.run("-n", 1, "--output-format", "json", "-c", code)
    first, second = done.stderr.splitlines()
    assert first == b"why"
    error = json.loads(second)
    assert set(error) == {"kind", "message", "context", "suggestion"}
    context = error["context"]
    assert (context["rank"], context["exit_code"], context["signal"]) == (0, 9, None)
    assert (context["size"], context["run_exit_code"], context["stderr"]) == (1, 9, ["why"])
    assert done.returncode == 9


def test_rank_that_ignores_sigterm_is_killed_after_the_grace_time(spawn):
    spawn.write(
        "program.py",
        f"{PRELUDE}\n"
        "if rank == 0:\n"
        "    while not Path('deaf').exists(): time.sleep(0.001)\n"
        "    sys.exit(4)\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked'))\n"
        "Path('deaf').touch()\n"
        "while True: sleep()",
    )
    done = spawn.run("-n", 2, "--grace", 3, "program.py")
    assert done.returncode == 4
    assert done.stdout == b"asked\n"


def patient(spawn, *arguments):
    """Run with a moment that suffices on any machine."""
    code = (
        "import sys\n"
        "from cobre_shm.spawn import group, ladder\n"
        "group.MOMENT = 30.0\n"
        "ladder.failing_steps.__defaults__ = (30.0,)\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    method = f"--start-method={spawn.method}"
    return spawn.run(command=[sys.executable, "-c", code, method, *arguments])


def test_others_have_a_moment_to_end_by_themselves(spawn):
    spawn.write(
        "program.py",
        f"{PRELUDE}\nready()\nif rank == 1: sys.exit(3)\ngone(1)\nprint('saved')",
    )
    done = patient(spawn, "-n3", "program.py")
    assert done.stdout == b"saved\n" * 2
    assert done.returncode == 3


@pytest.mark.parametrize("rank_code", [0, 2])
def test_process_left_behind_in_the_group_is_ended(spawn, rank_code):
    code = (
        "import subprocess, sys\n"
        "subprocess.Popen(['sleep', '3600'])\n"
        f"print('leaving'); sys.exit({rank_code})"
    )
    done = spawn.run("-n", 2, "-c", code)
    assert done.stdout.startswith(b"leaving\n")
    assert done.returncode == rank_code
    assert spawn.processes() == []


def test_child_that_ends_soon_after_its_rank_may_finish(spawn):
    code = "import subprocess\nsubprocess.Popen(['sh', '-c', 'sleep 0.02; echo finished'])"
    done = patient(spawn, "-n1", "-c", code)
    assert done.stdout == b"finished\n"
    assert done.returncode == 0


def test_process_that_left_the_group_is_not_waited_for(spawn):
    code = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
        "print(child.pid)"
    )
    done = spawn.run("-n", 1, "-c", code)
    assert done.returncode == 0
    # Still there, with our pipes open; the launcher ended nonetheless.
    os.kill(int(done.stdout), signal.SIGKILL)


def test_nothing_stays_in_shared_memory(spawn):
    code = "import os; print(os.environ['COBRE_SHM_NAME'])"
    (name,) = set(spawn.run("-n", 2, "-c", code).stdout.split())
    assert not Path("/dev/shm", name.decode().lstrip("/")).exists()


def stub(number, code=None, *, was_stopped=False):
    return SimpleNamespace(
        number=number,
        pid=100 + number,
        ending=Ending(exit_code=code),
        was_stopped=was_stopped,
        cause="",
    )


@pytest.mark.parametrize(
    ("ranks", "first", "blamed", "abort", "rank", "code"),
    [
        # Rank 1 failed and poisoned; rank 0, woken by that, was reaped first.
        ([stub(0, 4), stub(1, 9)], 0, 1, None, 1, 9),
        # The culprit was too slow to end by itself, so that it has no code of its own.
        ([stub(0, 4), stub(1, 143, was_stopped=True)], 0, 1, None, 0, 4),
        # It left early, with 0, and others failed for it, or for reasons of their own.
        ([stub(0, 4), stub(1, 0)], 0, 1, None, 0, 4),
        # The others caught their errors and all was well in the end.
        ([stub(0, 0), stub(1, 0)], None, 1, None, None, 0),
        ([stub(0, 4), stub(1, 21)], 0, 1, 21, 1, 21),
        ([stub(0, 0), stub(1, 6)], 1, None, None, 1, 6),
        ([stub(0, 0), stub(1, 0)], None, None, None, None, 0),
    ],
)
def test_poison_names_the_rank_that_decides(ranks, first, blamed, abort, rank, code):
    verdict = judge(ranks, None if first is None else ranks[first], blamed, abort)
    if rank is None:
        assert verdict is None
    else:
        assert (verdict.rank.number, verdict.code) == (rank, code)


def test_end_that_nobody_saw_is_no_success_and_its_pid_is_left_alone(monkeypatch):
    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setattr(os, "killpg", lambda *words: pytest.fail("somebody else's group"))
    rank = Rank(0, process.pid)
    assert rank.look() == Ending()
    assert rank.ending.code != 0
    rank.send(signal.SIGKILL)
