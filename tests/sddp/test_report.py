"""The report of an output directory."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='needs the extra "report"')

from cobre_shm.sddp import MissingDependency, OutputError, load_case
from cobre_shm.sddp.__main__ import main
from cobre_shm.sddp.report import write_report
from tests.sddp.editing import edit, write_table

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def fonts():
    """Let matplotlib open its fonts, which it keeps, before a test counts open files."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().set_title("any")
    figure.savefig(io.BytesIO())


@pytest.fixture
def output(random_path, tmp_path, capsys):
    def change(content):
        content["simulation"] = {"enabled": True, "num_scenarios": 5}

    edit(random_path, "config.json", change)
    root = tmp_path / "out"
    arguments = [str(random_path), "--iterations", "3", "--output-dir", str(root), "--quiet"]
    assert main(arguments) == 0
    return root


def pictures(page):
    return [base64.b64decode(text) for text in re.findall(r"base64,([^\"]+)", page)]


def test_page_holds_every_picture_and_needs_no_other_file(output):
    page = write_report(output, [output]).read_text()
    names = {path.stem for path in (output / "report").glob("*.png")}
    assert names == {
        "convergence", "storage", "spot_price", "generation", "time", "speed_up",
    }  # fmt: skip
    files = {path.read_bytes() for path in (output / "report").glob("*.png")}
    assert set(pictures(page)) == files
    assert all(data.startswith(PNG) for data in files)
    assert re.findall(r'src="(?!data:)|href=|<script', page) == []


def test_speed_up_is_relative_to_one_run(output, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(output, other)
    file = other / "training" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata |= {"backend": "shm", "ranks": 2, "seconds": metadata["seconds"] / 1.5}
    file.write_text(json.dumps(metadata))
    page = write_report(output, [other]).read_text()
    table = page[page.index(">Speed-up over ranks<") :]
    rows = re.findall(r"<td>(local|shm)</td><td>(\d)</td><td>[\d,]+</td><td>(.*?)</td>", table)
    assert rows == [("local", "1", "1.00"), ("shm", "2", "1.50")]


def test_run_of_another_case_is_not_compared(output, random_path, tmp_path):
    def change(content):
        content["training"]["forward_passes"] += 1

    edit(random_path, "config.json", change)
    other = tmp_path / "other"
    arguments = [str(random_path), "--iterations", "1", "--output-dir", str(other), "--quiet"]
    assert main(arguments) == 0
    with pytest.raises(OutputError, match=r"other' cannot be compared: it is a run of another"):
        write_report(output, [other])


def test_time_axis_is_readable_for_a_short_run():
    from cobre_shm.sddp.plots import time_parts, time_split

    axes = time_split({key: np.full(2, 0.03) for key, _ in time_parts()}).axes[0]
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3


def test_tables_tell_the_results(output):
    page = write_report(output).read_text()
    metadata = json.loads((output / "training" / "metadata.json").read_text())
    summary = json.loads((output / "simulation" / "summary.json").read_text())
    assert f"{metadata['lower_bound']:,.2f} $" in page
    assert f"{summary['mean']:,.2f}" in page
    assert "--compare" in page
    assert metadata["notes"]
    assert all(note in page for note in metadata["notes"])


def test_generation_and_deficit_meet_the_load(output):
    page = write_report(output).read_text()
    table = page[page.index(">Generation by stage<") :]
    rows = re.findall(r"<tr><td>\d+</td>(.*?)</tr>", table.split("</table>")[0])
    assert len(rows) == 3
    for row in rows:
        *parts, load = (float(text.replace(",", "")) for text in re.findall(r"<td>(.*?)<", row))
        # Excess is not drawn: the parts can only be more than the load.
        assert sum(parts) >= load - 0.1 * len(parts)
        assert load > 100.0


def test_training_without_simulation_has_a_report(random_path, tmp_path):
    root = tmp_path / "out"
    arguments = [str(random_path), "--iterations", "2", "--output-dir", str(root), "--quiet"]
    assert main(arguments) == 0
    assert "was not simulated" in write_report(root).read_text()
    assert load_case(random_path).config.simulation_scenarios == 0


def test_stage_may_have_the_largest_id(small, tmp_path):
    """An array with a place for every id and block below it would take 1.6 TiB."""
    last = 2**31 - 1
    blocks = [{"id": k, "name": str(k), "hours": 1.0} for k in range(100)]
    edit(small, "stages.json", lambda content: content["stages"][0].update(id=last, blocks=blocks))
    change = {"enabled": True, "num_scenarios": 2}
    edit(small, "config.json", lambda content: content.update(simulation=change))
    write_table(
        small,
        "scenarios/load_seasonal_stats.parquet",
        ["bus_id", "stage_id", "mean_mw", "std_mw"],
        [(0, last, 50.0, 0.0)],
    )
    root = tmp_path / "out"
    assert main([str(small), "--output-dir", str(root), "--quiet"]) == 0
    page = write_report(root).read_text()
    assert f"<td>{last}</td><td>50.0</td><td>0.0</td><td>50.0</td>" in page


def test_command_prints_the_path(output, capsys):
    assert main(["report", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output / "report" / "index.html")


def test_directory_without_result_is_refused(tmp_path, capsys):
    with pytest.raises(OutputError, match="no result of a training"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 1
    assert "metadata.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 200_000, "\xff"])
@pytest.mark.parametrize("name", ["training/metadata.json", "simulation/summary.json"])
def test_result_of_another_program_is_refused_by_name(output, capsys, name, content):
    (output / name).write_text(content, encoding="latin-1")
    assert main(["report", str(output)]) == 1
    err = capsys.readouterr().err
    assert name in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", [r"SE $\frac$ x", "A\ud800"])
def test_name_may_hold_anything(random_path, tmp_path, name):
    edit(random_path, "system/buses.json", lambda content: content["buses"][0].update(name=name))
    simulated = {"enabled": True, "num_scenarios": 2}
    edit(random_path, "config.json", lambda content: content.update(simulation=simulated))
    assert main([str(random_path), "--output-dir", str(tmp_path / "out"), "--quiet"]) == 0
    assert len(pictures(write_report(tmp_path / "out").read_text())) == 5


def test_case_without_buses_has_a_report(small, tmp_path):
    for name in ("buses", "thermals"):
        edit(small, f"system/{name}.json", lambda content, name=name: content.update({name: []}))
    simulated = {"enabled": True, "num_scenarios": 2}
    edit(small, "config.json", lambda content: content.update(simulation=simulated))
    assert main([str(small), "--output-dir", str(tmp_path / "out"), "--quiet"]) == 0
    assert "no buses" in write_report(tmp_path / "out").read_text()


def test_table_that_is_none_is_refused_by_name(output):
    (output / "training" / "timing.parquet").write_bytes(b"no table")
    with pytest.raises(OutputError, match=r"timing\.parquet: not readable"):
        write_report(output)


def test_missing_matplotlib_names_the_extra(output, monkeypatch):
    monkeypatch.delitem(sys.modules, "cobre_shm.sddp.plots", raising=False)
    monkeypatch.delattr("cobre_shm.sddp.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency) as caught:
        write_report(output)
    assert caught.value.suggestion == 'pip install "cobre-shm[report]"'


def test_command_compares_runs_and_answers_in_json(output, tmp_path, capsys):
    others = [tmp_path / "two", tmp_path / "three"]
    for ranks, other in enumerate(others, 2):
        shutil.copytree(output, other)
        file = other / "training" / "metadata.json"
        metadata = json.loads(file.read_text())
        file.write_text(json.dumps(metadata | {"backend": "shm", "ranks": ranks}))
    words = ["report", str(output), "--output-format", "json", "--compare", *map(str, others)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["command"], answer["success"], answer["exit_code"]) == ("report", True, 0)
    assert (answer["errors"], answer["summary"], err) == ([], None, "")
    assert answer["data"] == {"path": str(output / "report" / "index.html")}
    page = (output / "report" / "index.html").read_text()
    table = page[page.index(">Speed-up over ranks<") :]
    rows = re.findall(r"<td>(local|shm)</td><td>(\d)</td>", table)
    assert rows == [("local", "1"), ("shm", "2"), ("shm", "3")]


def test_command_refuses_to_compare_with_what_is_no_run(output, tmp_path, capsys):
    words = ["report", str(output), "--compare", str(tmp_path / "absent")]
    assert main([*words, "--output-format", "json"]) == 1
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["success"], answer["data"]) == (False, None)
    assert answer["errors"] == [json.loads(err)]
    assert str(tmp_path / "absent") in answer["errors"][0]["message"]
