"""What --events and --json tell of a run, and when they cannot."""

import json
import os
import re
import select
import sys

import pytest


@pytest.mark.parametrize("where", ["file", "stderr"])
def test_events_are_one_object_a_line(spawn, where):
    spawn.write(
        "program.py",
        "import signal, time, cobre_shm\n"
        # Rank 0 may need longer to end than the launcher waits before it asks.
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "comm = cobre_shm.create_communicator()\n"
        "comm.barrier()\n"
        "while not __import__('os').path.exists('enough'): time.sleep(0.01)\n"
        "comm.close()\n"
        "raise SystemExit(3 * comm.rank)",
    )
    flags = ["--events", "events"] if where == "file" else ["--json"]
    process = spawn.start("-n", 2, "--grace", 60, *flags, "program.py")
    path = spawn.folder / "events"
    seen = []
    if where == "file":
        spawn.wait_for(lambda: path.exists() and b'"progress"' in path.read_bytes())
    else:
        while not seen or seen[-1].get("event") != "progress":
            seen.append(json.loads(process.stderr.readline()))
    spawn.write("enough", "")
    _, err = process.communicate()
    lines = path.read_bytes() if where == "file" else err
    seen += [json.loads(line) for line in lines.splitlines()]
    events = [each for each in seen if "event" in each]
    kinds = [each["event"] for each in events]
    assert kinds[:3] == ["start", "ready", "progress"]
    assert kinds[-3:] == ["exit", "exit", "exit"]
    assert [each["rank"] for each in events[-3:]][-1] is None
    assert {each["rank"]: each.get("exit_code") for each in events[-3:-1]} == {0: 0, 1: 3}
    assert events[-1]["code"] == 3
    assert all(each["elapsed_secs"] >= 0 and "time" in each for each in events)
    if where == "stderr":
        (error,) = [each for each in seen if "event" not in each]
        assert error["context"]["rank"] == 1


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], "spawn"),
        (["--start-method", "zygote"], "zygote"),
        (["--start-method", "zygote", "--no-python"], "spawn"),
    ],
)
def test_start_says_how_ranks_come_into_being(spawn, flags, method):
    program = ["true"] if "--no-python" in flags else ["-c", "pass"]
    done = spawn.run("-n", 1, "--events", "events", *flags, *program)
    assert done.returncode == 0, done.stderr
    first, *_ = (spawn.folder / "events").read_text().splitlines()
    assert json.loads(first)["start_method"] == method


@pytest.mark.parametrize("where", ["file", "stderr"])
@pytest.mark.parametrize("how", ["no program", "no fork", "no zygote"])
def test_start_that_is_refused_ends_with_an_exit(spawn, where, how):
    flags = ["--events", "events"] if where == "file" else ["--json"]
    if how == "no program":
        spawn.write("no-program", "")
        (spawn.folder / "no-program").chmod(0o755)
        words = ["--no-python", "./no-program"]
    else:
        refuse = "raise OSError('no more')" if how == "no fork" else "os.kill(os.getpid(), 9)"
        # The first ranks write for as long as they run.
        spawn.write(
            "refusing.py",
            "import os\n"
            "forks, fork = [], os.fork\n"
            "def refuse():\n"
            "    forks.append(None)\n"
            f"    if len(forks) > 2: {refuse}\n"
            "    return fork()\n"
            "os.fork = refuse",
        )
        spawn.write("program.py", "while True: print('y')")
        words = ["--start-method", "zygote", "--preload", "refusing", "program.py"]
    done = spawn.run("-n", 6, *flags, *words)
    assert done.returncode == 126
    told = (spawn.folder / "events").read_text() if where == "file" else done.stderr.decode()
    seen = [json.loads(line) for line in told.splitlines()]
    events = [each for each in seen if "event" in each]
    assert [each["event"] for each in events] == ["start", "exit"]
    assert (events[1]["rank"], events[1]["code"]) == (None, 126)
    if where == "stderr":
        assert seen[-1]["kind"] == "ProgramNotRunnable"


@pytest.mark.parametrize("place", ["/dev/full", "fifo"])
def test_events_that_cannot_be_written_end_nothing(spawn, place):
    if place == "fifo":
        os.mkfifo(spawn.folder / "fifo")
        reader = os.open(spawn.folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        code = "import os, time\nwhile not os.path.exists('enough'): time.sleep(0.01)\nprint(1)"
        process = spawn.start("-n", 1, "--events", "fifo", "-c", code)
        spawn.wait_for(lambda: select.select([reader], [], [], 0)[0])
        os.close(reader)
        spawn.write("enough", "")
        out, err = process.communicate()
        code, why = process.returncode, b"Broken pipe"
    else:
        done = spawn.run("-n", 1, "--events", place, "-c", "print(1)")
        out, err, code = done.stdout, done.stderr, done.returncode
        why = b"No space left on device"
    assert (code, out) == (0, b"1\n")
    assert err == b"cobre_shm.spawn: No more events are written to '%b': %b\n" % (
        place.encode(),
        why,
    )


def test_stall_is_an_event_once_and_names_who_is_late(spawn):
    spawn.write(
        "program.py",
        "import os, time, cobre_shm\n"
        "comm = cobre_shm.create_communicator()\n"
        "comm.barrier()\n"
        "while comm.rank == 1 and not os.path.exists('enough'): time.sleep(0.01)\n"
        "comm.barrier()\n"
        "comm.close()",
    )
    code = (
        "import sys\n"
        "from cobre_shm.spawn import events\n"
        "events._LOOK_SECS = 0.05\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "sys.exit(main(['-n3', '--stall-warn', '2', '--events', 'events', 'program.py']))"
    )
    process = spawn.start(command=[sys.executable, "-c", code])
    path = spawn.folder / "events"
    spawn.wait_for(lambda: path.exists() and b'"stall"' in path.read_bytes())
    # As long as the ranks wait before they say it.
    said = process.stderr.readline()
    assert re.search(rb"2 rank\(s\) have waited \d+ s in collective 2, barrier, for rank 1", said)
    spawn.write("enough", "")
    _, err = process.communicate()
    assert process.returncode == 0, err
    seen = [json.loads(line) for line in path.read_bytes().splitlines()]
    (stall,) = [each for each in seen if each["event"] == "stall"]
    assert stall["late_ranks"] == [1]
    assert stall["secs"] >= 2
