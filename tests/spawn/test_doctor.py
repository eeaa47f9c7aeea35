"""The launcher's looks at the machine, and at a group while it runs."""

import contextlib
import json
import os
import pty
import resource
import signal

import pytest

from cobre_shm import limits, machine
from cobre_shm.spawn import doctor
from cobre_shm.spawn.descriptors import descriptors_of, more_descriptors

pytest.importorskip("posix_ipc")

WORK = """
import os, time, cobre_shm, numpy
comm = cobre_shm.create_communicator()
print("output of", comm.rank)
is_over = numpy.zeros(1)
while not is_over[0]:
    comm.allreduce(numpy.array([float(os.path.exists("enough"))]), is_over, op="max")
    time.sleep(0.01)
comm.close()
raise SystemExit(3 * comm.rank)
"""


def verdicts(checks):
    return {check.name: check.verdict for check in checks}


def test_doctor_starts_the_ranks_and_finds_nothing_bad(spawn):
    done = spawn.run("-n", 3, "--doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["passed"], done.stderr) == (0, True, b"")
    found = {check["name"]: check for check in report["checks"]}
    assert "3 ranks were started, met" in found["a barrier"]["found"]
    assert set(found) >= {"CPUs", "/dev/shm", "kernel", "open files", "segments", "MPI"}
    assert {check["verdict"] for check in report["checks"]} <= {"ok", "note"}


def test_doctor_says_what_is_bad_and_what_to_change(spawn):
    def allow_few_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    done = spawn.run("-n", 20, "--doctor", preexec_fn=allow_few_descriptors)
    assert done.returncode == 4
    bad = [line for line in done.stdout.decode().splitlines() if line.startswith("bad")]
    assert [line.split()[1] for line in bad] == ["open", "a"]
    assert b"ulimit -Hn" in done.stdout
    assert b"Too many open files" in done.stdout


def test_doctor_tells_what_is_lost(monkeypatch):
    monkeypatch.setattr(doctor, "_barrier", lambda *_: doctor.Check("a barrier", "ok", ""))
    monkeypatch.setattr(machine, "has_futex", lambda: False)
    monkeypatch.setattr(machine, "has_pidfd", lambda: False)
    monkeypatch.setattr(limits, "shared_memory_bytes", lambda: (64 << 20, 4096))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    checks = list(doctor.examine(101, "shm"))
    by_name = {check.name: check for check in checks}
    assert verdicts(checks).items() >= {
        ("kernel", "note"),
        ("/dev/shm", "note"),
        ("open files", "bad"),
        ("processes", "note"),
        ("CPUs", "note"),
    }
    assert "without futex" in by_name["kernel"].advice
    assert "without memfd" not in by_name["kernel"].advice
    assert "--shm-size=" in by_name["/dev/shm"].advice
    monkeypatch.setattr(machine, "has_memfd", lambda: False)
    assert verdicts(doctor.examine(101, "shm"))["/dev/shm"] == "bad"
    assert "/dev/shm" not in verdicts(doctor.examine(101, "tcp"))


def test_doctor_does_not_take_a_size_that_is_unknown_for_none(monkeypatch):
    monkeypatch.setattr(doctor, "_barrier", lambda *_: doctor.Check("a barrier", "ok", ""))
    monkeypatch.setattr(limits, "shared_memory_bytes", lambda: None)
    monkeypatch.setattr(machine, "has_memfd", lambda: False)
    (check,) = (check for check in doctor.examine(2, "shm") if check.name == "/dev/shm")
    assert check.verdict == "note"
    assert check.found.startswith("unknown free, ")
    assert "--shm-size" not in check.advice


@pytest.mark.parametrize("method", ["zygote", "spawn"])
def test_low_soft_limit_of_descriptors_is_raised_and_ranks_keep_theirs(spawn, method):
    def allow_few_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 400))

    code = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    done = spawn.run(
        *("-n", 24, "--start-method", method, "-c", code), preexec_fn=allow_few_descriptors
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"40 400\n" * 24


def test_limit_of_descriptors_is_given_back():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with more_descriptors(before[0]) as original:
        now = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert now[0] == min(descriptors_of(before[0]), before[1]) or now == before
    assert original == before == resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.mark.parametrize("method", ["zygote", "spawn"])
def test_monitor_shows_the_group_until_its_end_and_the_report_stands_last(spawn, method):
    spawn.write("program.py", WORK)
    flags = ("--monitor", "--output-dir", "logs", "--start-method", method)
    process = spawn.start("-n", 2, *flags, "program.py")
    shown = b""
    while b"allreduce" not in shown:
        line = process.stdout.readline()
        assert line, shown
        shown += line
    spawn.write("enough", "")
    out, err = process.communicate()
    assert b"The group has ended" in out
    assert b"output of" not in shown + out
    assert (spawn.folder / "logs/rank-1.out").read_bytes() == b"output of 1\n"
    assert b"Rank 1 of 2" in err.splitlines()[-1]
    assert process.returncode == 3


def read_all(descriptor):
    """What comes from a terminal until its last user has closed it."""
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(descriptor, 4096):
            shown += data
    return shown


def test_monitor_on_a_terminal_draws_over_its_last_table_and_ends_with_the_run(spawn):
    master, slave = pty.openpty()
    spawn.write("program.py", WORK)
    process = spawn.start(
        *("-n", 2, "--monitor", "--output-dir", "logs", "program.py"),
        stdout=slave,
        stderr=slave,
        env={"TERM": "xterm"},
        preexec_fn=lambda: os.login_tty(slave),
        pass_fds=[slave],
    )
    os.close(slave)
    shown = b""
    while shown.count(b"allreduce") < 3:
        shown += os.read(master, 4096)
    # The interrupt key reaches launcher and monitor at once.
    os.write(master, b"\x03")
    shown += read_all(master)
    os.close(master)
    assert b"\x1b[4A" in shown
    assert b"Traceback" not in shown
    assert process.wait() == 128 + signal.SIGINT


@pytest.mark.parametrize("lasts", [False, True])
def test_program_that_never_joins_does_not_hold_the_monitor(spawn, lasts):
    code = "import os, time\nwhile not os.path.exists('enough'): time.sleep(0.01)"
    process = spawn.start("-n", 2, "--monitor", "--output-dir", "logs", "-c", code)
    if lasts:
        assert b"joining" in process.stdout.readline()
    spawn.write("enough", "")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert b"Traceback" not in out


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_examination_that_nobody_reads_ends_as_by_sigpipe(spawn, flags):
    env = {"PYTHONUNBUFFERED": ""}
    process = spawn.start("-n", 1, "--doctor", *flags, env=env)
    process.stdout.close()
    process.stdout = None
    assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_every_attempt_is_shown(spawn):
    # Each runs until it was shown: the monitor may be up later than the ranks.
    spawn.write("program.py", WORK.replace('"enough"', 'os.environ["COBRE_SHM_NAME"][1:]'))
    flags = ("--monitor", "--output-dir", "logs", "--max-restarts", 1)
    process = spawn.start("-n", 2, *flags, "program.py")
    names = set()
    while len(names) < 2:
        line = process.stdout.readline()
        assert line, names
        if line.startswith(b"/cobre-"):
            names.add(line.partition(b",")[0])
            spawn.write(line.partition(b",")[0].decode()[1:], "")
    process.communicate()
    assert process.returncode == 3
