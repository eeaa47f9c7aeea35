"""A rank is killed at every named place of the protocols: always told, never left over."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cobre_shm import failpoints
from tests.faults import failpoints_run

ROOT = Path(__file__).parents[2]


# How often each place, and for groups of which sizes.
LONG = pytest.param("5 2 3 8", marks=[pytest.mark.slow, pytest.mark.timeout(3000)])


@pytest.fixture(scope="module", params=["1 3", LONG])
def outcomes(request):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.failpoints_run", *request.param.split()],
        cwd=ROOT,
        env={**os.environ, "COBRE_FAIL": "on"},
        capture_output=True,
        text=True,
        timeout=840 if request.param == "1 3" else 2900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def survivors(case):
    return [rank for number, rank in enumerate(case["ranks"]) if number != case["victim"]]


def test_every_place_is_reached(outcomes):
    reached = {
        case["place"].split(":")[0]
        for case in outcomes
        if case["ranks"][case["victim"]]["signal"] == signal.SIGKILL
    }
    assert reached == set(failpoints.PHASES)
    for case in outcomes:
        assert case["ranks"][case["victim"]]["signal"] == signal.SIGKILL, case


def test_every_survivor_is_told_who_died(outcomes):
    told = 0
    for case in outcomes:
        if case["place"].startswith("close"):
            continue  # all collectives were done: nobody waits for it
        for rank in survivors(case):
            error = rank["told"]
            assert error is not None, (case["place"], case["algorithm"], rank["traceback"])
            if case["place"].startswith(failpoints_run.JOINING) and error["code"] == "JoinTimeout":
                # It came after the victim had gone, and never met it; or nobody ever met it.
                unmet = case["victim"] if case["place"].startswith("begin") else 0
                assert error["missing_ranks"] == [unmet]
                continue
            assert error["code"] == "RankFailed", case
            assert error["rank"] == case["victim"], case
            victim = case["ranks"][case["victim"]]["pid"]
            assert error["pid"] in (victim, 0), case
            told += error["pid"] == victim
    assert told > len(outcomes) / 2


def test_nothing_is_left_in_shared_memory(outcomes):
    names = {case["name"].lstrip("/") for case in outcomes}
    told = (rank["told"] or {} for case in outcomes for rank in survivors(case))
    prefixes = {facts["regions"].lstrip("/") for facts in told if "regions" in facts}
    left = {path.name for path in Path("/dev/shm").iterdir()}
    assert not left & names
    assert not {name[: name.rfind("-") + 1] for name in left} & prefixes
    assert len(names) == len(outcomes)
    assert any("region" in case["place"] for case in outcomes)
    assert len(prefixes) > len(outcomes) / 2


@pytest.mark.parametrize("text", ["nowhere:kill@0,0", "idle:stop@0,0", "idle:kill@x,0", "idle"])
def test_malformed_directive_is_refused_with_what_would_be_right(text):
    done = subprocess.run(
        [sys.executable, "-c", "import cobre_shm.failpoints"],
        cwd=ROOT,
        env={**os.environ, "COBRE_FAIL": text},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "expected on, anywhere:yield@RANK,SEED, or PHASE:kill@RANK,SEQUENCE" in done.stderr
