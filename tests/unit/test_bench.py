"""The parts of the benchmarks that decide what a measurement means."""

import builtins
import importlib
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    """Import a benchmark as it imports its neighbours: bench/ is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        return importlib.import_module(name)


report = load("report")
rounds = load("rounds")
safety = load("safety")


def launch(**calls):
    """A launch in which a call takes so long beside a microsecond of other work."""
    measured = {
        key.replace("_", " "): {"whole": [us + 1, us + 1, us + 9], "work": [1, 1, 1], "p99": 2 * us}
        for key, us in calls.items()
    }
    return {"version": "1", "measured": measured}


def run_of(*rounds, ranks=2):
    limits = {"ping_pong_us": 0.1, "switch_us": 1.0, "load": 0.5, "copy_us": {"8": 0.01}}
    return {
        "conditions": {
            "ranks": ranks,
            "cpus": 2,
            "processor": "P",
            "kernel": "6",
            "python": "3",
            "commit": "c",
        },
        "rounds": [
            {"time": f"2000-01-0{number + 1}", "limits": limits, "libraries": libraries}
            for number, libraries in enumerate(rounds)
        ],
    }


def test_a_ratio_is_made_within_a_round_over_its_fastest_peer():
    run = run_of(
        {
            "shm": launch(allreduce_8=1),
            "mpich": launch(allreduce_8=2),
            "impi": launch(allreduce_8=4),
        },
        {
            "shm": launch(allreduce_8=9),
            "mpich": launch(allreduce_8=30),
            "impi": launch(allreduce_8=10),
        },
        {
            "shm": launch(allreduce_8=1),
            "mpich": launch(allreduce_8=8),
            "impi": launch(allreduce_8=5),
        },
    )
    found = rounds.ratio(run, "allreduce 8", "shm")
    assert (found["ratio"], found["least"], found["most"]) == (0.5, 0.2, 0.9)
    assert (found["ours"], found["peer"], found["name"]) == (1, 5, "impi")


def test_a_round_without_one_of_the_peers_does_not_count():
    failed = {"error": "ended with 1"}
    run = run_of(
        {"shm": launch(allreduce_8=1), "mpich": launch(allreduce_8=4), "impi": failed},
        {
            "shm": launch(allreduce_8=1),
            "mpich": launch(allreduce_8=4),
            "impi": launch(allreduce_8=2),
        },
        {"shm": launch(allreduce_8=1), "mpich": launch(allreduce_8=4)},
    )
    assert rounds.ratio(run, "allreduce 8", "shm")["ratio"] == 0.5
    assert rounds.ratio(run, "allreduce 8", "shm")["rounds"] == 1
    libraries, keys = ["shm", "mpich", "impi", "gloo"], ["allreduce 8"]
    complete = [rounds.is_complete(r, libraries, keys, run) for r in run["rounds"]]
    assert complete == [False, True, False]
    said = report.conditions_text(run)
    assert "Intel MPI failed in a launch: ended with 1." in said
    assert "; 1 rounds from 2000-01-02 to 2000-01-02;" in said
    assert report.summary([run])["ranks"][2]["rounds"] == ["2000-01-02"]


def test_runs_that_never_had_all_libraries_together_say_so():
    ran, failed = launch(allreduce_8=1), {"error": "ended with 1"}
    run = run_of({"shm": ran, "mpich": failed}, {"shm": failed, "mpich": ran})
    text = report.column_text(run)
    assert "no round in which every library that has run took part" in text
    assert "MPICH failed in a launch: ended with 1." in text
    assert report.summary([run])["ranks"] == {}


def test_a_round_in_which_noise_hid_a_peer_does_not_count():
    run = run_of(
        {"shm": launch(allreduce_8=1), "gloo": launch(allreduce_8=-300)},
        {"shm": launch(allreduce_8=1), "gloo": launch(allreduce_8=4)},
    )
    found = rounds.ratio(run, "allreduce 8", "shm")
    assert (found["ratio"], found["rounds"]) == (0.25, 1)


@pytest.mark.parametrize(
    ("payload", "ours", "cell"),
    [
        (8, 0.16, "**0.16** (0.13)"),
        (8, 0.17, "0.17 (0.13)"),
        (65536, 0.55, "**0.55** (0.55)"),
        (65536, 0.56, "0.56 (0.55)"),
    ],
)
def test_a_goal_is_reached_with_what_is_allowed_for_small_payloads(payload, ours, cell):
    key = f"allreduce_{payload}"
    run = run_of({"shm": launch(**{key: ours}), "mpich": launch(**{key: 1})})
    assert f"| {cell} · " in report.column_text(run)


def test_the_summary_has_what_readme_is_filled_with(tmp_path):
    calls = {"barrier_0": 1, "allreduce_8": 1}
    run = run_of({"shm": launch(**calls), "gloo": launch(barrier_0=4, allreduce_8=2)}, ranks=8)
    rounds.save(tmp_path / "peers-8.json", run)
    # In a process of its own: matplotlib keeps its fonts open.
    subprocess.run([sys.executable, ROOT / "bench/report.py", tmp_path], check=True)
    summary = rounds.load(tmp_path / "peers.json")
    assert summary["ranks"]["8"]["ratios"] == {
        "shm": {"barrier 0": [0.25, 1, 4, "gloo"], "allreduce 8": [0.5, 1, 2, "gloo"]}
    }
    assert summary["versions"] == {"Gloo": "1"}
    assert "### Private buffers, 8 ranks" in (tmp_path / "peers.md").read_text()


def test_a_comparison_ends_when_a_library_that_ran_once_fails_from_then_on(
    monkeypatch, tmp_path, capsys
):
    peers, begun = load("peers"), []

    def launched(library, ranks, options):
        begun.append(library)
        is_over = library == "mpich" and begun.count("mpich") > 2
        return {"error": "ended with 1"} if is_over else launch(allreduce_8=1)

    monkeypatch.setattr(peers, "launch", launched)
    monkeypatch.setattr(peers, "limits", lambda ranks, payloads: run_of({})["rounds"][0]["limits"])
    line = "peers --ranks 2 --peers mpich --ours shm --operations allreduce --payloads 8 --out"
    monkeypatch.setattr(sys, "argv", [*line.split(), str(tmp_path)])
    monkeypatch.setattr(peers, "write_report", lambda folder: "")
    peers.main()
    assert begun.count("mpich") == 2 + peers.VAIN_ROUNDS
    assert "3 rounds in a row lacked a library that had run" in capsys.readouterr().err


def unknown_names(source):
    """Names that a module's functions use and nobody defines."""
    module = symtable.symtable(source, "source", "exec")
    known = {*module.get_identifiers(), *vars(builtins)}
    return {
        symbol.get_name()
        for function in module.get_children()
        for symbol in function.get_symbols()
        if symbol.is_global() and symbol.get_name() not in known
    }


def test_every_safety_feature_is_found_in_the_kernels_and_taken_out():
    kernels = ROOT / "cobre_shm/kernels"
    for edits in safety.FEATURES.values():
        for name in {edit.file for edit in edits}:
            source = (kernels / name).read_text()
            there = [edit for edit in edits if edit.file == name]
            without = safety.edited(source, there)
            assert without != safety.edited(source, [])
            assert not unknown_names(without), name


def test_a_safety_feature_that_is_not_there_any_more_is_an_error():
    source = "def begin():\n    one()\n    two()\n"
    assert safety.edited(source, [safety.Drop("f", "begin", "one")]) == "def begin():\n    two()"
    for edit in (
        safety.Drop("f", "begin", "three"),
        safety.Swap("f", "begin", "three", "four"),
        safety.Body("f", "end", "pass"),
    ):
        with pytest.raises(SystemExit, match="FEATURES"):
            safety.edited(source, [edit])
