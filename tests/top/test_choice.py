"""Which group is meant, and what is shown of states that last too short to be caught live."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("posix_ipc")

from cobre_shm import layout, top
from cobre_shm.segment.observe import GroupFacts, RankFacts, observe
from cobre_shm.segment.poison import poison
from cobre_shm.segment.process import process_state, start_time
from cobre_shm.segment.segment import Segment


@pytest.fixture
def groups(monkeypatch):
    """Makes segments of this process, the only one that the monitor looks at by default."""
    monkeypatch.setattr(top, "own_processes", lambda: iter([os.getpid()]))
    made = []

    def make(size=2):
        made.append(Segment.create(Segment.random_name(), size, slot_bytes=4096))
        made[-1].unlink()
        return made[-1]

    yield make
    for segment in made:
        segment.close()


def join(segment, rank, state=layout.ATTACHED):
    block = segment.control(rank)
    segment.words.store(block + layout.START, start_time(os.getpid()))
    segment.words.store(block + layout.PID, os.getpid())
    segment.words.store(block + layout.STATE, state)


def test_without_any_group_it_says_so(groups, capsys):
    assert top.main(["--once"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "cobre_shm.top: No group of this user runs on this machine\n")


def test_the_only_group_is_taken(groups, capsys):
    segment = groups()
    join(segment, 0)
    assert top.main(["--once", "--output-format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == segment.name
    assert [rank["state"] for rank in facts["ranks"]] == [facts["ranks"][0]["state"], "absent"]
    assert facts["ranks"][0]["state"] in ("running", "sleeping")
    assert not facts["has_joined"]


@pytest.mark.parametrize("wanted", [[], [str(os.getpid())]])
def test_several_groups_are_listed_and_a_name_decides(groups, capsys, wanted):
    first, second = groups(1), groups(3)
    for segment in (first, second):
        join(segment, 0)
    assert top.main([*wanted, "--once"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert "2 groups run here; name one of them" in lines[0]
    assert any(f"{first.name}, pid {os.getpid()}, 1 rank:" in line for line in lines[1:])
    assert any(f"{second.name}, pid {os.getpid()}, 3 ranks:" in line for line in lines[1:])
    assert top.main([second.name, "--once"]) == 0
    assert second.name in capsys.readouterr().out


def test_a_group_that_has_ended_is_not_meant(groups, capsys):
    ended, running = groups(1), groups(1)
    join(ended, 0, layout.CLOSED)
    join(running, 0)
    assert top.main(["--once"]) == 0
    assert running.name in capsys.readouterr().out
    assert top.main([ended.name, "--once"]) == 1


def test_shared_memory_that_is_no_segment_is_passed_over(groups, capsys):
    running = groups(1)
    join(running, 0)
    foreign = groups(1)
    foreign.words.store(0, 12345)
    assert top.main(["--once"]) == 0
    assert running.name in capsys.readouterr().out


def test_segment_of_another_version_is_refused_when_named(groups, capsys):
    segment = groups(1)
    segment.words.store(layout.HEADER_VERSION, 99)
    assert top.main(["--once"]) == 1
    assert top.main([segment.name, "--once"]) == 1
    assert "version is 99" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--interval", "0"],
        ["--interval", "nan"],
        ["--interval", "soon"],
        ["--output-format", "xml"],
        ["1", "2"],
    ],
)
def test_command_line_that_is_not_understood(words, capsys):
    with pytest.raises(SystemExit) as caught:
        top.main(words)
    assert caught.value.code == 1
    assert "error:" in capsys.readouterr().err


def test_process_that_does_not_exist(capsys):
    assert top.main(["999999999"]) == 1
    assert "There is no process 999999999" in capsys.readouterr().err


def test_states_of_a_process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        start = start_time(process.pid)
        assert process_state(process.pid, start) in ("running", "sleeping", "in the kernel")
        assert process_state(process.pid, start + 1) == "gone"
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(process.pid, start) == "zombie"
    assert process_state(process.pid, start) == "gone"


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (layout.DIED, 0, "rank 1 died"),
        (layout.ABORTED, 7, "rank 1 called abort(7)"),
        (layout.STOPPED, 15, "the launcher stopped it (signal 15)"),
        (layout.TIMED_OUT, 0, "rank 1 gave up waiting"),
    ],
)
def test_failure_is_named(groups, kind, value, text):
    segment = groups()
    join(segment, 0)
    poison(segment, kind, 1, value)
    assert observe(segment).failure == text


def test_exit_that_the_launcher_reported_is_shown(groups):
    segment = groups()
    join(segment, 0)
    block = segment.control(1)
    segment.words.store(block + layout.EXIT_CODE, -9)
    segment.words.store(block + layout.EXITED, 1)
    assert [rank.exit_code for rank in observe(segment).ranks] == [None, -9]
    assert not observe(segment).has_ended


def facts_of(size, late=()):
    ranks = [
        RankFacts(
            rank=rank,
            pid=1000 + rank,
            state="sleeping",
            exit_code=None,
            is_late=rank in late,
            epoch=5,
            sequence=5,
            call="barrier",
            is_inside=rank not in late,
            since_secs=1.0,
            waiting_share=0.5,
            bytes_per_sec=2.0**21,
        )
        for rank in range(size)
    ]
    return GroupFacts(
        name="/cobre",
        launcher=None,
        program=["python", "a\x1b[2Jb"],
        size=size,
        has_joined=True,
        has_ended=False,
        failure=None,
        ranks=ranks,
    )


def test_late_ranks_stay_when_not_all_have_room():
    lines = top._lines(facts_of(100, late={70, 95}), height=10)
    assert len(lines) == 10
    assert "The others wait for rank 70 (pid 1070, sleeping), 95 (pid 1095, sleeping)" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "2", "3", "70", "95", "and"]
    assert lines[-1] == "and 94 more ranks"


@pytest.mark.parametrize("height", [1, 2, 3])
def test_terminal_of_a_few_lines_is_no_error(height):
    assert top._lines(facts_of(4, late={2}), height=height)


def test_terminal_does_not_obey_a_command_line():
    assert all(line.isprintable() for line in top._lines(facts_of(2)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1e-6, "0 ms"),
        (0.00125, "1.25 ms"),
        (0.9999, "999.9 ms"),
        (59.96, "60.0 s"),
        (600, "10.0 min"),
        (7200, "2.0 h"),
    ],
)
def test_durations(seconds, text):
    assert top._duration(seconds) == text
