"""README's places for figures, and what fills them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REPORT = {
    "machine": "a machine",
    "cpus": 2,
    "versions": {"mpich": "MPICH 5.0", "mpich, tuned": "MPICH 5.0", "gloo": "torch 2"},
    "ranks": {
        "4": {
            "rounds": ["2000-01-02 03:04:05", "2000-01-02 03:05:06"],
            "commit": "abcdef1",
            "limits": {"load": 0.5, "ping_pong_us": 0.1234},
            "ratios": {
                "shm": {"allreduce 8": [0.5, 1.0, 2.0, "mpich"], "barrier 0": [0.25, 1, 4, "gloo"]},
                "shm-shared": {"broadcast 1048576": [1.5, 30.0, 20.0, "openmpi"]},
            },
        }
    },
}


@pytest.fixture
def fill(tmp_path):
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)

    def run(*options):
        command = [sys.executable, ROOT / "bench/readme.py", tmp_path, "--readme", readme, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done, readme.read_text()

    return run


def test_figures_go_between_the_marks_and_nowhere_else(fill, tmp_path):
    (tmp_path / "peers.json").write_text(json.dumps(REPORT))
    before = (ROOT / "README.md").read_text()
    done, text = fill()
    assert done.returncode == 0, done.stderr
    head, _, rest = text.partition("<!-- bench:peers -->")
    body, _, tail = rest.partition("<!-- /bench:peers -->")
    assert before.startswith(head)
    assert before.endswith(tail)
    for said in (
        "Measured on a machine, 2 CPUs; MPICH 5.0, torch 2.",
        "**4 ranks**, 2 on each CPU; 2 rounds from 2000-01-02 03:04:05 on, commit abcdef1; median",
        "load average 0.5, a cache line to another core and back 0.12 us.",
        "| barrier | - | **0.25** (1 / 4, gloo) | | | |",
        "| 8 B | private | **0.50** (1 / 2, mpich) |  |  |  |",
        "| 1 MiB | shared |  |  | 1.50 (30 / 20, openmpi) |  |",
    ):
        assert said in body
    assert fill("--check")[0].returncode == 0
    (tmp_path / "peers.json").write_text(json.dumps({**REPORT, "cpus": 4}))
    assert fill("--check")[0].returncode == 1


def test_missing_measurement_says_how_to_make_one(fill):
    done, _ = fill()
    assert done.returncode == 1
    assert "scripts/bench peers" in done.stderr
