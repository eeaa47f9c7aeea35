"""The monitor on real groups: what it shows, how it finds them, and that nobody notices it."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("posix_ipc")

from tests.support.backends import BACKENDS, COLLECTIVE_TIMEOUT_SECS
from tests.support.ranks import RankGroup, results_of, run_ranks
from tests.top.conftest import ENVIRONMENT, ROOT, WATCHDOG_SECS
from tests.top.programs import inherited_segments, one_comes_late, work_until

SIZE = 3
LATE = 1
NOBODY = 65534


@pytest.fixture
def go(tmp_path):
    return tmp_path / "go"


@pytest.fixture
def waiting(go):
    """A group without a launcher in which all but one rank wait in a barrier."""
    connects = BACKENDS["shm"].make_group(SIZE, COLLECTIVE_TIMEOUT_SECS)
    with RankGroup(connects, one_comes_late, (LATE, str(go))) as group:
        group.name = connects[0].name
        yield group


@pytest.fixture
def busy(go):
    """A group without a launcher that calls collectives without a pause."""
    connects = BACKENDS["shm"].make_group(SIZE, COLLECTIVE_TIMEOUT_SECS)
    with RankGroup(connects, work_until, (str(go),)) as group:
        yield group


def finish(group, go):
    """Let the group end and check that nothing was wrong with it."""
    go.touch()
    return results_of(group.outcomes(WATCHDOG_SECS))


def others_wait(facts):
    """Whether one rank alone is late, and the others have come to the barrier, where they stay."""
    return all(
        rank["is_late"]
        if rank["rank"] == LATE
        else not rank["is_late"] and rank["is_inside"] and rank["sequence"] == 2
        for rank in facts["ranks"]
    )


def test_late_rank_is_named_and_the_others_wait_for_it(top, waiting, go):
    facts = top.facts_when(waiting.pids[0], others_wait)
    assert [rank["is_late"] for rank in facts["ranks"]] == [rank == LATE for rank in range(SIZE)]
    assert [rank["pid"] for rank in facts["ranks"]] == waiting.pids
    assert facts["launcher"] is None
    assert facts["has_joined"]
    assert not facts["has_ended"]
    assert facts["failure"] is None
    for rank in facts["ranks"]:
        if rank["rank"] == LATE:
            assert (rank["call"], rank["sequence"]) == ("allreduce(1000 x float64, SUM)", 1)
            assert not rank["is_inside"]
        else:
            assert (rank["call"], rank["sequence"]) == ("barrier", 2)
            assert rank["is_inside"]
            assert rank["waiting_share"] > 0
        assert rank["bytes_per_sec"] > 0
        assert rank["since_secs"] > 0
    table = top.run(waiting.pids[0], "--once").stdout.splitlines()
    assert f"The others wait for rank {LATE} (pid {waiting.pids[LATE]}" in table[1]
    assert [("late" in line) for line in table[3:]] == [rank == LATE for rank in range(SIZE)]
    assert table[3 + LATE].endswith("(allreduce(1000 x float64, SUM))")
    assert table[3].endswith("  barrier")
    assert finish(waiting, go) == [3.0] * SIZE


def test_wait_that_goes_on_counts_as_waiting(top, waiting, go):
    """The share approaches 1 while nothing but waiting happens."""
    facts = top.facts_when(
        waiting.pids[0],
        lambda facts: others_wait(facts) and facts["ranks"][0]["waiting_share"] > 0.9,
    )
    assert facts["ranks"][LATE]["waiting_share"] < facts["ranks"][0]["waiting_share"]
    finish(waiting, go)


def test_every_rank_and_the_name_lead_to_the_same_group(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    keys = [*waiting.pids, waiting.name, waiting.name.lstrip("/")]
    found = [top.facts(key) for key in keys]
    assert {facts["name"] for facts in found} == {waiting.name}
    assert all(len(facts["ranks"]) == SIZE for facts in found)
    finish(waiting, go)


def test_stopped_rank_is_shown_stopped_and_goes_on(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    waiting.send_signal(2, signal.SIGSTOP)
    try:
        facts = top.facts_when(
            waiting.pids[2], lambda facts: facts["ranks"][2]["state"] == "stopped"
        )
        assert facts["ranks"][0]["state"] in ("running", "sleeping")
    finally:
        waiting.send_signal(2, signal.SIGCONT)
    assert finish(waiting, go) == [3.0] * SIZE


def test_late_and_stopped_rank_is_both(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    waiting.send_signal(LATE, signal.SIGSTOP)
    try:
        stopped = f"(pid {waiting.pids[LATE]}, stopped)"
        deadline = time.monotonic() + WATCHDOG_SECS
        while stopped not in top.run(waiting.pids[0], "--once").stdout:
            assert time.monotonic() < deadline
    finally:
        waiting.send_signal(LATE, signal.SIGCONT)
    finish(waiting, go)


LAUNCHED = """
import sys
import cobre_shm
from tests.top.programs import one_comes_late
with cobre_shm.create_communicator() as comm:
    assert one_comes_late(comm, 1, sys.argv[1]) == 3.0
"""


def test_launcher_and_its_ranks_lead_to_the_group(top, go):
    launcher = top.start("-n", SIZE, "-c", LAUNCHED, go, module="spawn")
    facts = top.facts_when(launcher.pid, others_wait)
    assert facts["launcher"] == launcher.pid
    assert facts["program"] == list(map(str, launcher.args))
    by_rank = top.facts(facts["ranks"][2]["pid"])
    assert by_rank["name"] == facts["name"]
    text = top.run(launcher.pid, "--once").stdout
    assert f"{SIZE} ranks, launcher {launcher.pid}: {sys.executable}" in text.splitlines()[0]
    go.touch()
    out, err = launcher.communicate(timeout=WATCHDOG_SECS)
    assert (launcher.returncode, out, err) == (0, "", "")


def test_live_table_is_repeated_and_ends_with_the_group(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    process = top.start(waiting.pids[0], "--interval", 0.05)
    heads = 0
    while heads < 3:
        line = process.stdout.readline()
        assert line, process.communicate()
        heads += line.startswith("RANK")
    assert finish(waiting, go) == [3.0] * SIZE
    out, err = process.communicate(timeout=WATCHDOG_SECS)
    assert (process.returncode, err) == (0, "")
    assert "The group has ended" in out.split("\n\n")[-1]


def test_end_of_the_group_ends_a_long_interval(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    process = top.start(waiting.pids[0], "--interval", 10**6, "--output-format", "json")
    assert not json.loads(process.stdout.readline())["has_ended"]
    finish(waiting, go)
    last = json.loads(process.communicate(timeout=WATCHDOG_SECS)[0])
    assert last["has_ended"]
    assert all(rank["state"] in ("closed", "gone") for rank in last["ranks"])
    assert process.returncode == 0


def test_killed_rank_is_shown_gone_and_the_failure_named(top, waiting):
    top.facts_when(waiting.pids[0], others_wait)
    process = top.start(waiting.pids[0], "--interval", 0.05)
    assert process.stdout.readline()
    waiting.send_signal(LATE, signal.SIGKILL)
    out, _ = process.communicate(timeout=WATCHDOG_SECS)
    assert process.returncode == 0
    last = out.split("\n\n")[-1]
    assert f"The group has failed: rank {LATE} died" in last
    killed = next(line for line in last.splitlines() if str(waiting.pids[LATE]) in line)
    # Whoever started it may not have reaped it yet.
    assert "gone" in killed or "zombie" in killed


def test_monitors_that_are_killed_disturb_nobody(top, busy, go):
    # Before that a rank may belong to no group yet.
    top.facts_when(busy.pids[0], lambda facts: facts["ranks"][0]["sequence"] > 0)
    for turn in range(6):
        process = top.start(busy.pids[turn % SIZE], "--interval", 0.001, "--output-format", "json")
        for _ in range(5):
            assert process.stdout.readline()
        process.kill()
        process.wait(WATCHDOG_SECS)
    assert top.facts(busy.pids[0])["ranks"][0]["sequence"] > 0
    assert finish(busy, go) == [0] * SIZE


def test_facts_of_a_busy_group_hold_together(top, busy, go):
    top.facts_when(busy.pids[0], lambda facts: facts["ranks"][0]["sequence"] > 1000)
    process = top.start(busy.pids[0], "--interval", 0.1, "--output-format", "json")
    sequences = []
    for _ in range(10):
        facts = json.loads(process.stdout.readline())
        assert len(facts["ranks"]) == SIZE
        for rank in facts["ranks"]:
            assert rank["call"] in ("allreduce(3 x float64, SUM)", "broadcast(1 x int64, root 0)")
            assert 0 <= rank["waiting_share"] <= 1
            assert rank["bytes_per_sec"] > 0
            assert rank["since_secs"] >= 0
        sequences.append(facts["ranks"][0]["sequence"])
    assert sequences == sorted(sequences)
    assert sequences[0] < sequences[-1]
    process.kill()
    assert finish(busy, go) == [0] * SIZE


def test_monitor_maps_the_segment_for_reading_and_keeps_no_descriptor(top, waiting, go):
    name = top.facts_when(waiting.pids[0], others_wait)["name"]
    process = top.start(waiting.pids[0], "--interval", 10**6)
    assert process.stdout.readline()
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    permissions = [line.split()[1] for line in maps if f"/dev/shm{name}" in line]
    assert permissions == ["r--s"]
    targets = []
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        # It looks at the process table meanwhile, and closes what it has opened for that.
        with contextlib.suppress(FileNotFoundError):
            targets.append(str(descriptor.readlink()))
    assert targets
    assert not any("/dev/shm/" in target for target in targets)
    finish(waiting, go)
    process.communicate(timeout=WATCHDOG_SECS)


def test_programs_that_a_rank_starts_do_not_get_the_segment():
    assert results_of(run_ranks(inherited_segments, 2)) == [[False]] * 2


# The interpreter may lie where only root can read: a first run imports all that is needed.
AS_NOBODY = f"""
import contextlib, io, os, sys
from cobre_shm import top
with contextlib.redirect_stderr(io.StringIO()):
    top.main(["999999999"])
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
sys.exit(top.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_group_of_another_user_is_refused(top, waiting, go):
    name = top.facts_when(waiting.pids[0], others_wait)["name"]
    for group, reason in [
        (str(waiting.pids[0]), f"belongs to uid 0, not to {NOBODY}"),
        (name, f"No group {name} of this user"),
    ]:
        refused = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, group, "--once"],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert (refused.returncode, refused.stdout) == (1, "")
        assert reason in refused.stderr
    finish(waiting, go)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_is_another_user_too(top):
    process = subprocess.Popen(["sleep", "600"], user=NOBODY)
    try:
        refused = top.run(process.pid, "--once")
    finally:
        process.kill()
        process.wait(WATCHDOG_SECS)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"belongs to uid {NOBODY}, not to 0" in refused.stderr


def test_interrupt_ends_it_quietly(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    process = top.start(waiting.pids[0], "--interval", 10**6)
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WATCHDOG_SECS)
    assert (process.returncode, err) == (0, "")
    assert finish(waiting, go) == [3.0] * SIZE


def test_reader_that_goes_away_ends_it_quietly(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    process = top.start(waiting.pids[0], "--interval", 0.01)
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(WATCHDOG_SECS), err) == (141, "")
    finish(waiting, go)


def test_on_a_terminal_the_table_is_drawn_over_the_last_one(top, waiting, go):
    top.facts_when(waiting.pids[0], others_wait)
    master, slave = pty.openpty()
    # 50 columns: what is wider is cut, or each line would take two.
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "50", "LINES": "20"}
    command = [sys.executable, "-m", "cobre_shm.top", str(waiting.pids[0]), "--interval", "0.05"]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=ROOT, env=environment)
    os.close(slave)
    seen = ""
    try:
        deadline = time.monotonic() + WATCHDOG_SECS
        while seen.count("\x1b[6A") < 2:
            assert select.select([master], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(master, 4096).decode()
    finally:
        process.kill()
        process.wait(WATCHDOG_SECS)
        os.close(master)
    # A title, who is late, the head, and three ranks.
    table = seen.split("\x1b[6A")[1].split("\x1b[J")[0].splitlines()
    assert [line.split()[0] for line in table[2:]] == ["RANK", "0", "1", "2"]
    assert all(line.endswith("\x1b[K") and len(line) <= 49 + len("\x1b[K") for line in table)
    finish(waiting, go)


def test_errors_are_json_where_that_is_asked_for(top):
    done = top.run(os.getpid(), "--once", "--output-format", "json")
    assert (done.returncode, done.stdout) == (1, "")
    error = json.loads(done.stderr)
    assert error["kind"] == "GroupNotFound"
    assert error["message"] == f"Process {os.getpid()} is in no running group"


def test_the_monitor_does_without_numba():
    code = "import sys, cobre_shm.top; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT).returncode == 0
