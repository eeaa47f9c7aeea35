"""``python -m cobre_shm.tune``: what it chooses, measures and writes, and groups that use it."""

import json
import os
import secrets
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from cobre_shm import tune
from cobre_shm.kernels import context
from cobre_shm.selection.kinds import ShmConfig
from cobre_shm.shm import ShmCommunicator
from cobre_shm.tuning import AUTO, NAMES, NEVER, load_tuning, tuned_file

KIB, MIB = 1 << 10, 1 << 20
# The whole of it, with what takes long left out. Ranks share cores here on any machine, so that
# what is asked of them only is asked.
QUICK = f"""
import sys
from cobre_shm import tune
tune.TRIALS = tuple(trial for trial in tune.TRIALS if trial.nbytes <= {MIB})
tune._ROUNDS, tune._SECONDS = 1, 0.0
tune.count_cpus = lambda: 1
sys.exit(tune.main(sys.argv[1:]))
"""


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Have ``main`` launch the quick one in the place of the module; returns what was launched."""
    program, commands = tmp_path / "quick.py", []
    program.write_text(QUICK)
    paths = [str(Path(tune.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def call(command):
        commands.append(command)
        at = command.index("cobre_shm.tune")
        assert command[at - 1] == "-m"
        return subprocess.call([*command[: at - 1], str(program), *command[at + 1 :]])

    monkeypatch.setattr(tune, "subprocess", SimpleNamespace(call=call))
    return commands


@pytest.fixture
def machine_file(tmp_path, monkeypatch):
    """Where the file of this machine would be; there is none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tuned_file()


def tried(name):
    candidates = [each for trial in tune.TRIALS for each in trial.candidates]
    return {each[name] for each in candidates if name in each}


@pytest.mark.parametrize("is_named", [True, False])
def test_ranks_measure_and_a_group_can_use_what_is_written(
    quick, machine_file, tmp_path, capfd, is_named
):
    path = tmp_path / "new" / "own.json" if is_named else machine_file
    named = ["--output", str(path)] if is_named else []
    assert tune.main(["-n", "2", *named]) == 0
    (command,) = quick
    assert command[command.index("-n") + 1] == "2"
    *measured, last = capfd.readouterr().out.splitlines()
    use = str(path) if is_named else AUTO
    assert last == f"Written to {path}; use it with COBRE_SHM_TUNING={use}"
    # Each line once: one rank speaks.
    assert len(measured) == len(set(measured)) > 0
    assert {line.split()[0] for line in measured} == {
        "allreduce", "allgatherv", "broadcast", "allreduce_shared",
    }  # fmt: skip
    chosen = load_tuning(use)
    assert list(chosen) == [name for name in NAMES if name in chosen]
    assert {"scatter_chunk", "gather_chunk", "chain_chunk", "broadcast_small_chunk"} <= set(chosen)
    assert all(value in tried(name) for name, value in chosen.items()), chosen
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_ranks_that_fail_leave_no_file_and_their_code(monkeypatch, machine_file, capsys):
    monkeypatch.setattr(tune, "subprocess", SimpleNamespace(call=lambda command: 7))
    assert tune.main(["-n", "2"]) == 7
    assert capsys.readouterr() == ("", "")
    assert not machine_file.exists()


@pytest.mark.parametrize("nprocs", ["1", "0", "two"])
def test_group_with_nothing_to_measure_is_refused(quick, capsys, nprocs):
    with pytest.raises(SystemExit) as caught:
        tune.main(["-n", nprocs])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert (out, quick) == ("", [])
    assert "usage: python -m cobre_shm.tune" in err
    assert "argument -n" in err


def test_place_that_takes_no_file_is_refused_before_anything_is_measured(quick, capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        tune.main(["--output", str(tmp_path / "file" / "tuning.json")])
    assert caught.value.code == 1
    assert quick == []
    assert "give another --output" in capsys.readouterr().err


# From which payload on the algorithm beyond a threshold wins, or up to which.
WINS = {
    "direct_bytes": lambda nbytes: nbytes <= 32 * KIB,
    "chain_min_bytes": lambda nbytes: nbytes >= 128 * KIB,
    "stream_bytes": lambda nbytes: nbytes >= 8 * MIB,
    "read_bytes": lambda nbytes: nbytes >= 2 * MIB,
    "share_bytes": lambda nbytes: True,
    "common_bytes": lambda nbytes: False,
}


def choose(monkeypatch, seconds, size, cpus):
    """Return what is chosen where measuring gives ``seconds(trial, value)``; and what was asked."""
    asked = []

    def measure(comm, trial, chosen):
        name = next(iter(trial.candidates[0]))
        asked.append((name, trial.nbytes))
        return [seconds(trial, name, candidate[name]) for candidate in trial.candidates]

    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "count_cpus", lambda: cpus)
    return tune._chosen_by(SimpleNamespace(size=size)), asked


def test_fastest_chunk_and_the_last_payload_that_wins_are_chosen(monkeypatch):
    def seconds(trial, name, value):
        if name not in WINS:
            return abs(value - 128 * KIB) + 1.0
        return 1.0 if (value == trial.nbytes) == WINS[name](trial.nbytes) else 1.1

    chosen, asked = choose(monkeypatch, seconds, size=3, cpus=2)
    chunks = {name: 128 * KIB for name in NAMES if name.endswith("chunk")}
    assert chosen == {
        **chunks,
        "direct_bytes": 32 * KIB,
        "chain_min_bytes": 128 * KIB,
        "stream_bytes": 3 * 8 * MIB,  # of all ranks together
        "read_bytes": 2 * MIB,
        "share_bytes": 32 * KIB,
        "common_bytes": NEVER,
    }
    # A threshold that has lost is not asked of again.
    assert [nbytes for name, nbytes in asked if name == "common_bytes"] == [MIB]
    assert ("direct_bytes", 128 * KIB) not in asked


def test_tie_is_no_answer_and_cores_of_their_own_need_no_chain(monkeypatch):
    chosen, asked = choose(monkeypatch, lambda *_: 1.0, size=2, cpus=2)
    thresholds = {name: chosen[name] for name in WINS if name in chosen}
    assert thresholds == {"read_bytes": NEVER, "chain_min_bytes": NEVER}
    assert "chain_chunk" not in chosen
    assert not any(name.startswith("chain") for name, _ in asked)
    # Asked of each payload, as none has told.
    assert [nbytes for name, nbytes in asked if name == "stream_bytes"] == [
        32 * MIB, 16 * MIB, 8 * MIB, 4 * MIB,
    ]  # fmt: skip


def test_variable_auto_takes_the_file_of_this_machine(machine_file):
    def used():
        name = f"cobre-test-{secrets.token_hex(8)}"
        env = {"NAME": name, "RANK": "0", "SIZE": "1", "TUNING": AUTO}
        config = ShmConfig.from_env({f"COBRE_SHM_{key}": value for key, value in env.items()})
        with ShmCommunicator(config) as comm:
            words = comm._context[context.TUNING : context.TUNING + len(NAMES)].tolist()
        return dict(zip(NAMES, words, strict=True))

    defaults = used()
    machine_file.parent.mkdir(parents=True)
    machine_file.write_text(json.dumps({"gather_chunk": 8192, "direct_bytes": 4321}))
    assert used() == {**defaults, "gather_chunk": 8192, "direct_bytes": 4321}
