"""Signals to a launcher: what it passes on, and how a run ends."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.spawn.terminals import Terminal, expect

pytestmark = pytest.mark.parametrize("spawn", ["zygote"], indirect=True)

# Ranks that say which signals they get and go on; the last one ends when told to.
LISTEN = """
import os, signal, sys, time
rank = os.environ["RANK"]
def hear(number, frame):
    print(signal.Signals(number).name, flush=True)
for number in map(int, sys.argv[1].split(",")):
    signal.signal(number, hear)
print("ready", flush=True)
while not os.path.exists("enough"):
    time.sleep(0.01)
"""


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_interrupt_key_ends_the_run_once_and_for_all_ranks(spawn):
    spawn.write(
        "program.py",
        "import time\n"
        "try:\n"
        "    print('ready')\n"
        # One long sleep misses a signal that comes when Python has just looked for one.
        "    while True: time.sleep(0.01)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
        "    raise SystemExit(3)",
    )
    with Terminal(spawn, "-n", 3, "program.py") as terminal:
        expect(terminal.process, 3, b"ready\n")
        terminal.type(b"\x03")
        out, err = terminal.process.communicate()
    assert (out, err, terminal.process.returncode) == (b"interrupted\n" * 3, b"", 130)


def test_second_and_third_interrupt_key_escalate(spawn):
    spawn.write("program.py", LISTEN)
    numbers = f"{signal.SIGINT:d},{signal.SIGTERM:d}"
    with Terminal(spawn, "-n", 2, "--grace", 600, "program.py", numbers) as terminal:
        expect(terminal.process, 2, b"ready\n")
        terminal.type(b"\x03")
        expect(terminal.process, 2, b"SIGINT\n")
        terminal.type(b"\x03")
        expect(terminal.process, 2, b"SIGTERM\n")
        terminal.type(b"\x03")
        out, _ = terminal.process.communicate()
    assert out == b""
    assert terminal.process.returncode == 130


def test_interrupt_escalates_by_itself_after_the_grace_time(spawn):
    spawn.write("program.py", LISTEN)
    numbers = f"{signal.SIGINT:d},{signal.SIGTERM:d}"
    process = spawn.start("-n", 2, "--grace", 3, "program.py", numbers)
    expect(process, 2, b"ready\n")
    process.send_signal(signal.SIGINT)
    expect(process, 2, b"SIGINT\n")
    expect(process, 2, b"SIGTERM\n")
    assert process.wait() == 130


def test_rank_may_finish_its_work_after_an_interrupt(spawn):
    spawn.write("program.py", LISTEN)
    process = spawn.start("-n", 2, "--grace", 600, "program.py", f"{signal.SIGINT:d}")
    expect(process, 2, b"ready\n")
    process.send_signal(signal.SIGINT)
    expect(process, 2, b"SIGINT\n")
    spawn.write("enough", "")
    assert process.wait() == 130


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_ranks_that_hear_an_interrupt_meet_on_for_as_long_as_they_may(spawn, backend):
    spawn.write(
        "program.py",
        "import signal, time, numpy, cobre_shm\n"
        "heard = []\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(time.monotonic()))\n"
        "with cobre_shm.create_communicator() as comm:\n"
        "    comm.barrier()\n"
        "    print('ready', flush=True)\n"
        "    is_over = numpy.zeros(1)\n"
        "    while not comm.allreduce(is_over, op='max')[0]:\n"
        "        time.sleep(0.01)\n"
        "        is_over[0] = bool(heard) and time.monotonic() - heard[0] > 1\n"
        "print('met')\n",
    )
    process = spawn.start("-n", 2, "--backend", backend, "--grace", 600, "program.py")
    expect(process, 2, b"ready\n")
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"met\n" * 2, b"")
    assert process.returncode == 130


def test_interrupt_ends_a_loop_of_jitted_code(spawn):
    spawn.write(
        "program.py",
        "import signal, numba, cobre_shm\n"
        "from cobre_shm import jit\n"
        # A wait that gets long is taken over by the interpreter, which would hear it.
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "@numba.njit\n"
        "def turn(handle, turns):\n"
        "    status = jit.OK\n"
        "    while status == jit.OK and turns != 0:\n"
        "        status = jit.barrier(handle)\n"
        "        turns -= 1\n"
        "    return status\n"
        "with cobre_shm.create_communicator() as comm:\n"
        "    handle = jit.handle(comm)\n"
        "    turn(handle, 1)\n"
        "    print('ready', flush=True)\n"
        "    try: jit.check(comm, turn(handle, -1))\n"
        "    except cobre_shm.CollectiveFailed as error: print(error.message)\n",
    )
    process = spawn.start("-n", 2, "--grace", 600, "program.py")
    expect(process, 2, b"ready\n")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0].count(b"The launcher ended the group") == 2
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminating_signal_is_passed_on_and_is_the_exit_code(spawn, number):
    spawn.write("program.py", LISTEN)
    process = spawn.start("-n", 2, "--grace", 600, "program.py", f"{number:d}")
    expect(process, 2, b"ready\n")
    process.send_signal(number)
    expect(process, 2, number.name.encode() + b"\n")
    spawn.write("enough", "")
    assert process.wait() == 128 + number
    assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGWINCH]
)
def test_other_signals_are_passed_on_and_the_run_goes_on(spawn, number):
    spawn.write("program.py", LISTEN)
    process = spawn.start("-n", 2, "program.py", f"{number:d}")
    expect(process, 2, b"ready\n")
    for _ in range(2):
        process.send_signal(number)
        expect(process, 2, number.name.encode() + b"\n")
    spawn.write("enough", "")
    assert process.wait() == 0


def test_signal_reaches_the_children_of_ranks(spawn):
    spawn.write("listen.py", LISTEN)
    code = (
        "import signal, subprocess, sys\n"
        f"signal.signal({signal.SIGUSR1:d}, lambda *_: None)\n"
        f"subprocess.run([sys.executable, 'listen.py', '{signal.SIGUSR1:d}'])"
    )
    process = spawn.start("-n", 1, "-c", code)
    expect(process, 1, b"ready\n")
    process.send_signal(signal.SIGUSR1)
    expect(process, 1, b"SIGUSR1\n")
    spawn.write("enough", "")
    assert process.wait() == 0


def test_ignored_hangup_stays_ignored_everywhere(spawn):
    code = (
        "import signal\n"
        "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)\n"
        "input()"
    )
    command = ["nohup", *spawn.command("-n", 1, "-c", code)]
    reader, writer = os.pipe()
    process = spawn.start(command=command, stdin=reader)
    os.close(reader)
    expect(process, 2, b"True\n")
    process.send_signal(signal.SIGHUP)
    os.write(writer, b"\n")
    os.close(writer)
    assert process.wait() == 0


def test_stop_key_stops_all_ranks_until_continued(spawn):
    spawn.write(
        "program.py", "import os\nprint(os.getpid())\nwhile not os.path.exists('enough'): 0"
    )
    with Terminal(spawn, "-n", 2, "program.py") as terminal:
        process = terminal.process
        pids = [process.pid, *(int(process.stdout.readline()) for _ in range(2))]
        process.send_signal(signal.SIGTSTP)
        spawn.wait_for(lambda: all(state(pid) == "T" for pid in pids))
        process.send_signal(signal.SIGCONT)
        spawn.wait_for(lambda: all(state(pid) != "T" for pid in pids))
        spawn.write("enough", "")
        assert process.wait() == 0


@pytest.mark.parametrize("moment", ["running", "starting"])
def test_killed_launcher_leaves_nothing_behind(spawn, moment):
    code = (
        "import os, subprocess, time\n"
        "subprocess.Popen(['sleep', '600'])\n"
        "print(os.environ['COBRE_SHM_NAME'])\n"
        "time.sleep(600)"
    )
    size = 8 if moment == "running" else 64
    process = spawn.start("-n", size, "-c", code)
    seen = [process.stdout.readline() for _ in range(size if moment == "running" else 1)]
    process.kill()
    spawn.wait_for(lambda: not spawn.processes())
    assert not Path("/dev/shm", seen[0].decode().strip().lstrip("/")).exists()


def test_killed_guard_does_not_disturb_the_run(spawn):
    code = "import os; print(os.getpid()); input()"
    reader, writer = os.pipe()
    process = spawn.start("-n", 1, "-c", code, stdin=reader)
    os.close(reader)
    rank = int(process.stdout.readline())
    (guard,) = set(spawn.processes()) - {process.pid, rank}
    os.kill(guard, signal.SIGKILL)
    os.write(writer, b"\n")
    os.close(writer)
    assert process.wait() == 0
    assert process.stderr.read() == b""


def test_ranks_die_with_the_launcher_even_without_the_guard(spawn):
    code = "import os, time\nprint(os.getpid(), os.environ['COBRE_SHM_NAME'])\ntime.sleep(600)"
    process = spawn.start("-n", 2, "-c", code)
    lines = [process.stdout.readline().split() for _ in range(2)]
    ranks = {int(pid) for pid, _ in lines}
    (guard,) = set(spawn.processes()) - {process.pid} - ranks
    os.kill(guard, signal.SIGKILL)
    process.kill()
    spawn.wait_for(lambda: not spawn.processes())
    # Nobody was left to remove the name: the next launcher does.
    spawn.run("-n", 1, "-c", "pass")
    assert not Path("/dev/shm", lines[0][1].decode().lstrip("/")).exists()


def test_signal_while_ranks_are_being_started_ends_the_run(spawn):
    process = spawn.start("-n", 32, "-c", "import time; print('up', flush=True); time.sleep(600)")
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143


def test_interrupt_whose_exception_is_dropped_ends_the_run(spawn):
    code = (
        "import os, signal, sys, weakref\n"
        "from cobre_shm.spawn import options\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "real = options.resolve_program\n"
        "class Module: pass\n"
        "def resolve(*words, **kind):\n"
        "    module = Module()\n"
        "    kept = weakref.ref(module, lambda _: os.kill(os.getpid(), signal.SIGINT))\n"
        "    del module\n"
        "    return real(*words, **kind)\n"
        "options.resolve_program = resolve\n"
        "sys.exit(main(['-n', '2', '-c', 'import time; time.sleep(600)']))"
    )
    done = spawn.run(command=[sys.executable, "-c", code])
    assert b"Exception ignored" in done.stderr
    assert done.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_while_the_segment_is_made_leaves_nothing(spawn, number):
    code = (
        "import os, sys\n"
        "from cobre_shm.segment.segment import Segment\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "real = Segment._make_ready\n"
        "def make_ready(segment, *words, **kind):\n"
        "    print(segment.name, flush=True)\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "    real(segment, *words, **kind)\n"
        "Segment._make_ready = make_ready\n"
        "sys.exit(main(['-n', '2', '-c', 'import time; time.sleep(600)']))"
    )
    done = spawn.run(command=[sys.executable, "-c", code])
    assert done.returncode in (128 + number, -number)
    assert done.stderr == b""
    spawn.wait_for(lambda: not Path(f"/dev/shm{done.stdout.decode().strip()}").exists())


def test_interrupt_before_any_rank_is_started_is_quiet(spawn):
    code = (
        "import os, signal, sys\n"
        "from cobre_shm.spawn import options\n"
        "from cobre_shm.spawn.__main__ import main\n"
        "def interrupt(words, **_): os.kill(os.getpid(), signal.SIGINT)\n"
        "options.resolve_program = interrupt\n"
        "sys.exit(main(['-n', '2', '-c', 'pass']))"
    )
    done = spawn.run(command=[sys.executable, "-c", code])
    assert done.returncode == 130
    assert done.stderr == b""
