"""Kills at random microseconds, through the code of the long run (bench/chaos.py)."""

import random

from bench import chaos
from cobre_shm.local import LocalCommunicator
from tests.support.ranks import RankGroup, results_of


def chaos_of(_, kills, seed):
    return chaos.run(kills, seed=seed)


def test_random_kills_leave_no_hang_no_leak_no_wrong_answer_and_no_wrong_blame():
    seed = random.randrange(2**32)
    # Before the report, which a hang never gives.
    print("seed", seed)
    # In a process of its own: the program forks, for which the test runner has too many threads.
    with RankGroup([LocalCommunicator], chaos_of, (200, seed)) as group:
        (report,) = results_of(group.outcomes(720))
    print(report)
    assert report["kills"] == 200
    assert report["survivors"] > 0
    assert {name: report[name] for name in chaos.MUST_BE_ZERO} == dict.fromkeys(
        chaos.MUST_BE_ZERO, 0
    ), report["problems"]
