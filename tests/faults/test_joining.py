"""Groups that do not come together: everybody is told why, and nothing is left."""

import errno
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cobre_shm import layout
from cobre_shm.errors import InitializationFailed
from cobre_shm.segment import join
from cobre_shm.segment.posix import DIRECTORY
from cobre_shm.segment.segment import Segment
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from tests.support.backends import BACKENDS
from tests.support.ranks import RankGroup, results_of


class Join:
    """Join a group as one rank, with a configuration that may be wrong.

    Args:
        after: Ranks that are to be there before, or a file.
    """

    def __init__(self, name, rank, size, timeout=10.0, delay=0.0, after=(), **more):
        self.config = {"name": name, "rank": rank, "size": size, "timeout_secs": timeout, **more}
        self.delay = delay
        self.after = after

    def __call__(self):
        time.sleep(self.delay)
        if isinstance(self.after, Path):
            while not self.after.exists():
                time.sleep(0.01)
        elif self.after:
            wait_until_attached(self.config["name"], self.after)
        return ShmCommunicator(ShmConfig(**self.config))


def rank_and_size(comm):
    comm.barrier()
    return comm.rank, comm.size


@pytest.fixture
def name():
    text = f"/cobre-test-{secrets.token_hex(8)}"
    yield text
    assert not (DIRECTORY / text[1:]).exists()


def outcomes_of(*joins, timeout=90):
    with RankGroup(joins, rank_and_size) as group:
        return group.outcomes(timeout)


def codes_of(outcomes):
    return [
        outcome.error.context["code"] if type(outcome.error) is InitializationFailed else None
        for outcome in outcomes
    ]


@pytest.mark.parametrize("late", [0, 2])
def test_join_waits_for_a_late_rank(name, late):
    joins = [Join(name, rank, 3, delay=0.4 * (rank == late)) for rank in range(3)]
    assert results_of(outcomes_of(*joins)) == [(0, 3), (1, 3), (2, 3)]


def test_late_rank_is_named_by_the_lowest_that_waits_to_join(name, tmp_path):
    # Rank 0 is the first, so that it is the one to speak however long the others take.
    after = [(), [0], tmp_path / "go", [0]]
    joins = [Join(name, rank, 4, after=after[rank], stall_warn_secs=0.2) for rank in range(4)]
    told = rf"cobre_shm: 3 rank\(s\) have waited (\d+) s to join, for \[2\] of segment {name}\n"
    with RankGroup(joins, rank_and_size) as group:
        group.wait_until(lambda: len(re.findall(told, group.output(0))) >= 2)
        (tmp_path / "go").touch()
        outcomes = group.outcomes(90)
    assert results_of(outcomes) == [(rank, 4) for rank in range(4)]
    assert [outcome.output for outcome in outcomes[1:]] == [""] * 3
    # After 0.2 s and 1.4 s.
    assert int(re.findall(told, outcomes[0].output)[1]) >= 1


def test_ranks_that_wait_for_rank_zero_say_so(name, tmp_path):
    joins = [Join(name, 0, 2, after=tmp_path / "go"), Join(name, 1, 2, stall_warn_secs=0.5)]
    with RankGroup(joins, rank_and_size) as group:
        group.wait_until(lambda: group.output(1))
        # More of it would come now, if it came too often.
        time.sleep(0.3)
        (tmp_path / "go").touch()
        outcomes = group.outcomes(90)
    assert results_of(outcomes) == [(0, 2), (1, 2)]
    assert outcomes[0].output == ""
    told = rf"cobre_shm: rank 1 has waited \d s for segment {name}, which rank 0 makes\n"
    assert re.fullmatch(told, outcomes[1].output)


def test_join_with_an_absent_rank_times_out_and_lists_it(name):
    # Time begins when the last of them has come.
    patient = [Join(name, rank, 4, timeout=30.0) for rank in (0, 1)]
    outcomes = outcomes_of(*patient, Join(name, 3, 4, timeout=0.7, after=[0, 1]))
    assert codes_of(outcomes) == ["JoinTimeout"] * 3
    assert all(outcome.error.context["missing_ranks"] == [2] for outcome in outcomes)


def test_join_without_rank_zero_times_out_and_says_so(name):
    outcomes = outcomes_of(Join(name, 1, 3, timeout=0.5), Join(name, 2, 3, timeout=0.5))
    assert codes_of(outcomes) == ["JoinTimeout"] * 2
    assert "rank 0 has not made it" in str(outcomes[0].error)


def test_join_with_another_size_fails_everybody(name):
    joins = [Join(name, 0, 3), Join(name, 1, 3), Join(name, 2, 4, after=[0, 1])]
    outcomes = outcomes_of(*joins)
    assert codes_of(outcomes) == ["DuplicateRank", "DuplicateRank", "SizeMismatch"]
    assert outcomes[2].error.context["group_size"] == 3
    for outcome in outcomes[:2]:
        assert outcomes[2].pid in outcome.error.context["pids"]


def test_join_of_two_processes_as_one_rank_fails_everybody(name):
    joins = [Join(name, 0, 3), Join(name, 1, 3), Join(name, 1, 3, after=[0, 1])]
    outcomes = outcomes_of(*joins)
    assert codes_of(outcomes) == ["DuplicateRank"] * 3
    both = sorted(outcome.pid for outcome in outcomes[1:])
    assert sorted(outcomes[2].error.context["pids"]) == both
    assert sorted(outcomes[0].error.context["pids"]) == both


def wait_until_attached(name, ranks):
    """Wait until these ranks of a group that is coming together are attached."""
    for _ in range(2000):
        segment = Segment.open(name)
        if segment is not None:
            words = [segment.words.load(segment.control(r) + layout.STATE) for r in ranks]
            segment.close()
            if words == [layout.ATTACHED] * len(ranks):
                return
        time.sleep(0.01)
    raise AssertionError(f"ranks {ranks} of {name} did not attach")


def test_rank_killed_while_joining_fails_the_others(name):
    with RankGroup([Join(name, rank, 3) for rank in (0, 1)], rank_and_size) as group:
        wait_until_attached(name, [0, 1])
        group.send_signal(1, signal.SIGKILL)
        outcomes = group.outcomes(90)
    assert codes_of(outcomes)[0] == "RankFailed"
    assert outcomes[0].error.context["rank"] == 1
    assert outcomes[0].error.context["pid"] == outcomes[1].pid


def test_rank_zero_killed_while_joining_fails_the_others_and_leaves_no_name(name):
    with RankGroup([Join(name, rank, 3) for rank in (0, 1)], rank_and_size) as group:
        wait_until_attached(name, [0, 1])
        group.send_signal(0, signal.SIGKILL)
        outcomes = group.outcomes(90)
    assert codes_of(outcomes)[1] == "RankFailed"
    assert outcomes[1].error.context["rank"] == 0


def test_rank_zero_that_comes_after_a_failure_is_told_of_it(name):
    made = Segment.create(name, 2, slot_bytes=4096)
    outcomes = outcomes_of(Join(name, 1, 2, timeout=0.3))
    assert codes_of(outcomes) == ["JoinTimeout"]
    with pytest.raises(InitializationFailed, match="did not join"):
        ShmCommunicator(ShmConfig(name=name, rank=0, size=2), made=made)


_LEAVE_SEGMENT = """
import os, sys
from cobre_shm.segment.segment import Segment
segment = Segment.create(sys.argv[1], 3, slot_bytes=4096)
if len(sys.argv) > 2:
    segment.words.store(0, 0)  # as if killed before it was ready
print(os.getpid(), flush=True)
sys.stdin.read()
os._exit(0)
"""


def leave_segment(name, *args):
    return subprocess.Popen(
        [sys.executable, "-c", _LEAVE_SEGMENT, name, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_segment_of_a_dead_run_is_replaced_with_one_line_of_notice(name):
    with leave_segment(name) as process:
        process.stdout.readline()
        process.kill()
    assert (DIRECTORY / name[1:]).exists()
    # Rank 1 comes first and must not settle in the dead run's segment.
    outcomes = outcomes_of(Join(name, 0, 2, delay=0.3), Join(name, 1, 2))
    assert results_of(outcomes) == [(0, 2), (1, 2)]
    notices = [line for line in outcomes[0].output.splitlines() if "cobre_shm" in line]
    assert notices == [f"cobre_shm: removed segment {name}, left by a dead run (pid {process.pid})"]
    assert outcomes[1].output == ""


def test_segment_of_an_earlier_boot_is_dead_whoever_has_its_pids_now(name):
    with leave_segment(name) as process:
        process.stdout.readline()
        segment = Segment.open(name)
        segment.words.store_bytes(layout.HEADER_BOOT_ID, bytes(16))
        assert segment.living_process() == 0
        segment.close()
        outcomes = outcomes_of(Join(name, 0, 2, delay=0.3), Join(name, 1, 2))
        process.kill()
    assert results_of(outcomes) == [(0, 2), (1, 2)]
    assert f"removed segment {name}, left by a dead run" in outcomes[0].output


def test_segment_of_a_live_run_is_refused_and_left_alone(name):
    with leave_segment(name) as process:
        process.stdout.readline()
        before = (DIRECTORY / name[1:]).read_bytes()
        outcomes = outcomes_of(Join(name, 0, 2, timeout=2.0))
        assert codes_of(outcomes) == ["NameInUse"]
        context = outcomes[0].error.context
        assert (context["pid"], context["uid"]) == (process.pid, os.geteuid())
        # In whole seconds, and a machine may have been busy since.
        age = datetime.now(UTC) - datetime.fromisoformat(context["started"])
        assert timedelta(seconds=-1) < age < timedelta(minutes=5)
        assert (DIRECTORY / name[1:]).read_bytes() == before
        process.kill()
    (DIRECTORY / name[1:]).unlink()


def test_segment_that_is_never_ready_is_replaced(name):
    with leave_segment(name, "unready") as process:
        process.stdout.readline()
        process.kill()
    outcomes = outcomes_of(Join(name, 0, 2), Join(name, 1, 2))
    assert results_of(outcomes) == [(0, 2), (1, 2)]
    assert "removed segment" in outcomes[0].output


@pytest.mark.parametrize("state", [(), ("unready",)])
def test_segment_of_a_dead_run_is_removed_by_who_waits_for_it_in_vain(name, state):
    with leave_segment(name, *state) as process:
        process.stdout.readline()
        process.kill()
    outcomes = outcomes_of(Join(name, 1, 2, timeout=0.5))
    assert codes_of(outcomes) == ["JoinTimeout"]
    assert "removed segment" in outcomes[0].output


def test_two_groups_in_one_process_do_not_meet(name):
    comms = [ShmCommunicator(ShmConfig(name=name, rank=0, size=1)) for _ in range(2)]
    for comm in comms:
        comm.barrier()
        comm.close()
    assert not (DIRECTORY / name[1:]).exists()


def test_communicators_made_and_closed_in_a_loop_leave_nothing(name):
    def mappings():
        with open("/proc/self/maps") as maps:
            return sum("cobre" in line for line in maps)

    before = mappings(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        ShmCommunicator(ShmConfig(name=name, rank=0, size=1)).close()
    assert (mappings(), len(list(Path("/proc/self/fd").iterdir()))) == before


def test_unlinked_name_is_gone_while_the_group_lives(name):
    comm = ShmCommunicator(ShmConfig(name=name, rank=0, size=1))
    assert not (DIRECTORY / name[1:]).exists()
    assert Segment.open(name) is None
    comm.close()


def test_control_lock_of_a_killed_owner_is_taken_over(name):
    segment = Segment.create(name, 1, slot_bytes=4096)
    pid = os.fork()
    if pid == 0:
        segment._control_mutex().try_lock()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with segment.control_lock() as locked:
        assert locked
    assert segment.words.load(layout.HEADER_POISON) == 0
    segment.unlink()
    segment.close()


@pytest.mark.parametrize("left", [0, 64, layout.CONTROL, -layout.PAGE_BYTES])
def test_segment_that_is_cut_off_during_joining_is_an_error_and_not_sigbus(name, left):
    path = DIRECTORY / name[1:]
    for _ in range(5):
        with RankGroup([Join(name, rank, 3) for rank in (0, 1)], rank_and_size) as group:
            wait_until_attached(name, [0, 1])
            os.truncate(path, left if left >= 0 else path.stat().st_size + left)
            outcomes = group.outcomes(90)
        assert codes_of(outcomes) == ["CutOff"] * 2, outcomes
        assert all("was cut off while the ranks joined" in str(o.error) for o in outcomes)
        assert not path.exists()


def join_after_a_cut(comm, name):
    """A group that is cut off while this process joins it, then one that is whole."""
    with ShmCommunicator(ShmConfig(name=f"{name}-whole", rank=0, size=1)) as older:
        with pytest.raises(InitializationFailed, match="cut off"):
            ShmCommunicator(ShmConfig(name=name, rank=0, size=2, timeout_secs=20))
        older.barrier()
        with ShmCommunicator(ShmConfig(name=name, rank=0, size=1)) as newer:
            newer.barrier()
    return True


def test_process_goes_on_after_a_segment_was_cut_off(name):
    with RankGroup(BACKENDS["shm"].make_group(1, 10.0), join_after_a_cut, (name,)) as group:
        wait_until_attached(name, [0])
        os.truncate(DIRECTORY / name[1:], 0)
        assert results_of(group.outcomes(90)) == [True]


def test_all_ranks_killed_at_once_while_joining_are_replaced_at_the_next_start(name):
    for _ in range(5):
        with RankGroup([Join(name, rank, 4) for rank in (0, 1, 2)], rank_and_size) as group:
            wait_until_attached(name, [0, 1, 2])
            for rank in (2, 0, 1):
                group.send_signal(rank, signal.SIGKILL)
            dead = group.outcomes(90)
        assert [outcome.signal for outcome in dead] == [signal.SIGKILL] * 3
        outcomes = outcomes_of(Join(name, 0, 2), Join(name, 1, 2))
        assert results_of(outcomes) == [(0, 2), (1, 2)]
        assert f"left by a dead run (pid {dead[0].pid})" in outcomes[0].output


class FailToClaim(Join):
    """The same in a process that the system refuses something, and that lives on."""

    def __call__(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(join, "offer_stack", self.refuse)
            try:
                return super().__call__()
            finally:
                time.sleep(2.0)

    def refuse(self, *args):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_rank_that_fails_while_it_claims_its_place_fails_the_others_while_it_lives(name):
    first, second = outcomes_of(
        Join(name, 0, 2, timeout=math.inf), FailToClaim(name, 1, 2, timeout=math.inf)
    )
    assert second.error.context["code"] == "SystemError"
    assert first.error.context["code"] == "RankFailed"
    assert "interrupted" in first.error.message
