"""``validate``: every finding at once, none that only follows from another."""

from __future__ import annotations

import json
import shutil

import pytest

from cobre_shm.sddp import check_case, shipped_case_path
from cobre_shm.sddp.__main__ import main
from cobre_shm.sddp.documents import REQUIRED
from tests.sddp.editing import copy_case, edit, write_json, write_table
from tests.sddp.test_case import delete_path, set_path
from tests.sddp.variants import VARIANTS, write_variant


def found(path):
    """Return kind, file and field of each finding."""
    case, findings, _ = check_case(path)
    assert (case is None) == bool(len(findings))
    return [(f.kind, f.context["file"], f.context.get("field")) for f in findings]


@pytest.mark.parametrize("name", VARIANTS)
def test_case_without_mistakes_has_no_finding(name, tmp_path):
    assert found(write_variant(name, tmp_path / name)) == []


def test_mistakes_of_all_files_are_reported_at_once(random_path):
    mistakes = [
        ("config.json", set_path("training", "forward_passes", value=0)),
        ("stages.json", set_path("stages", 1, "end_date", value="soon")),
        ("penalties.json", set_path("bus", "excess_cost", value="dear")),
        ("system/buses.json", set_path("buses", 0, "deficit_segments", value=[])),
        ("system/thermals.json", set_path("thermals", 0, "bus_id", value=5)),
        ("system/thermals.json", delete_path("thermals", 0, "cost_per_mwh")),
        ("system/hydros.json", set_path("hydros", 1, "downstream_id", value=9)),
        ("system/hydros.json", delete_path("hydros", 2, "reservoir")),
        ("system/hydros.json", set_path("hydros", 0, "evaporation", value={})),
        ("initial_conditions.json", set_path("storage", 1, "value_hm3", value=-1.0)),
        ("scenarios/load_factors.json", set_path("load_factors", 0, "stage_id", value="x")),
    ]
    for file, change in mistakes:
        edit(random_path, file, change)
    write_table(
        random_path,
        "constraints/hydro_bounds.parquet",
        ["hydro_id", "stage_id", "max_storage_hm3"],
        [(2, 1, -80.0)],
    )
    assert sorted(found(random_path)) == sorted(
        [
            ("OutOfRange", "config.json", "training.forward_passes"),
            ("TypeMismatch", "stages.json", "stages[1].end_date"),
            ("TypeMismatch", "penalties.json", "bus.excess_cost"),
            ("SchemaViolation", "system/buses.json", "buses[0].deficit_segments"),
            ("MissingReference", "system/thermals.json", "thermals[0].bus_id"),
            ("SchemaViolation", "system/thermals.json", "thermals[0].cost_per_mwh"),
            ("MissingReference", "system/hydros.json", "hydros[1].downstream_id"),
            ("SchemaViolation", "system/hydros.json", "hydros[2].reservoir"),
            ("Unsupported", "system/hydros.json", "hydros[0].evaporation"),
            ("OutOfRange", "initial_conditions.json", "storage[1].value_hm3"),
            ("TypeMismatch", "scenarios/load_factors.json", "load_factors[0].stage_id"),
            ("OutOfRange", "constraints/hydro_bounds.parquet", "row 0.max_storage_hm3"),
        ]
    )


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("content", [None, "[]", "{}"])
def test_one_bad_file_gives_findings_about_that_file_only(random_path, name, content):
    if content is None:
        (random_path / name).unlink()
    else:
        (random_path / name).write_text(content)
    files = {file for _, file, _ in found(random_path)}
    assert files == {name}


LISTS = {
    "system/hydro_production_models.json": "production_models",
    "scenarios/load_factors.json": "load_factors",
    "scenarios/non_controllable_factors.json": "non_controllable_factors",
    "constraints/exchange_factors.json": "exchange_factors",
}


@pytest.mark.parametrize(("name", "key"), LISTS.items())
def test_optional_file_needs_its_list(random_path, name, key):
    """A list under another name would count as none."""
    write_json(random_path, name, {key.upper(): []})
    assert found(random_path) == [("SchemaViolation", name, key)]
    write_json(random_path, name, {key: []})
    assert found(random_path) == []


def test_factor_is_required_where_its_block_is_named(random_path):
    edit(
        random_path,
        "scenarios/load_factors.json",
        delete_path("load_factors", 0, "block_factors", 1, "factor"),
    )
    line = {"id": 0, "name": "L", "source_bus_id": 0, "target_bus_id": 0}
    line["capacity"] = {"direct_mw": 1.0, "reverse_mw": 1.0}
    write_json(random_path, "system/lines.json", {"lines": [line]})
    factors = {"line_id": 0, "stage_id": 0, "block_factors": [{"block_id": 0, "direct_factor": 1}]}
    name = "constraints/exchange_factors.json"
    write_json(random_path, name, {"exchange_factors": [factors]})
    assert sorted(found(random_path)) == [
        ("SchemaViolation", name, "exchange_factors[0].block_factors[0].reverse_factor"),
        (
            "SchemaViolation",
            "scenarios/load_factors.json",
            "load_factors[0].block_factors[1].factor",
        ),
    ]


def test_all_missing_files_are_named(tmp_path):
    (tmp_path / "case").mkdir()
    assert found(tmp_path / "case") == [("MissingFile", name, None) for name in REQUIRED]


def test_table_that_is_wrong_throughout_is_no_flood(random_path, capsys):
    file = "scenarios/load_seasonal_stats.parquet"
    names = ["bus_id", "stage_id", "mean_mw", "std_mw"]
    write_table(random_path, file, names, [(0, 1, 5.0, -1.0)] * 1250)
    edit(random_path, "config.json", set_path("training", "forward_passes", value=0))
    _, findings, _ = check_case(random_path)
    listed = list(findings)
    assert len(findings) > 1250
    assert len(listed) == 102
    more = f"{len(findings) - 101:,}"
    assert (listed[-1].message, listed[-1].context) == (
        f"{file}: and {more} more findings",
        {"file": file},
    )
    assert main(["validate", str(random_path)]) == 3
    assert capsys.readouterr().out.startswith(f"{random_path}: {len(findings):,} findings")
    assert main([str(random_path)]) == 2
    assert f"The case has {len(findings) - 1} more findings" in capsys.readouterr().err


@pytest.mark.parametrize("junk", [None, True, "x", -1, 1e300, [], {}, [[]], [{}], {"id": 0}])
def test_any_field_may_hold_anything(random_path, junk):
    """No content of a field makes the reader fail rather than report."""
    original = random_path.with_name("original")
    copy_case(random_path, original)
    for file in sorted(original.rglob("*.json")):
        name = str(file.relative_to(original))
        for place in places(json.loads(file.read_text())):
            edit(random_path, name, set_path(*place, value=junk))
            check_case(random_path)
            shutil.copyfile(file, random_path / name)


def places(content, path=()):
    """Yield the path of every value inside a JSON value, but only of the first two in a list."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content[:2])
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def test_text_names_every_finding_and_the_code_is_three(random_path, capsys):
    edit(random_path, "system/thermals.json", set_path("thermals", 0, "bus_id", value=5))
    edit(random_path, "config.json", set_path("training", "forward_passes", value=0))
    assert main(["validate", str(random_path)]) == 3
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"{random_path}: 2 findings"
    assert lines[1] == (
        "  OutOfRange: config.json: training.forward_passes: must be at least 1, not 0"
    )
    assert lines[2] == (
        "  MissingReference: system/thermals.json: thermals[0].bus_id (id 0): "
        "there is no bus with id 5"
    )


def test_json_is_one_envelope(random_path, capsys):
    edit(random_path, "system/thermals.json", set_path("thermals", 0, "bus_id", value=5))
    assert main(["validate", str(random_path), "--output-format", "json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["command"] == "validate"
    assert (answer["success"], answer["exit_code"], answer["data"]) == (False, 3, None)
    assert answer["summary"] == {"error_count": 1, "warning_count": 0}
    (finding,) = answer["errors"]
    assert finding["kind"] == "MissingReference"
    assert finding["context"] == {
        "file": "system/thermals.json",
        "field": "thermals[0].bus_id",
        "entity_id": 0,
        "value": 5,
        "expected": "the id of a bus",
    }


def test_valid_case_is_described_with_its_warnings(shipped_copy, capsys):
    edit(shipped_copy, "system/lines.json", set_path("lines", 0, "losses_percent", value=3.0))
    assert main(["validate", str(shipped_copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the case is valid (stages 12, buses 2, lines 1" in lines[0]
    assert "losses_percent is ignored" in lines[1]
    assert main(["validate", str(shipped_case_path()), "--output-format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["success"], answer["errors"]) == (True, [])
    assert answer["data"]["stages"] == 12


def test_absent_directory_is_a_finding(tmp_path, capsys):
    assert main(["validate", str(tmp_path / "absent")]) == 3
    assert "absent" in capsys.readouterr().out


def test_training_raises_the_first_finding_and_counts_the_others(random_path, capsys):
    edit(random_path, "system/thermals.json", set_path("thermals", 0, "bus_id", value=5))
    write_json(random_path, "system/hydros.json", {})
    assert main([str(random_path)]) == 3
    err = capsys.readouterr().err
    assert "thermals[0].bus_id" in err
    assert "1 more finding;" in err


def test_first_finding_keeps_its_own_advice(random_path, capsys):
    (random_path / "system" / "lines.json").unlink()
    (random_path / "system" / "buses.json").unlink()
    write_json(random_path, "system/hydros.json", {})
    assert main([str(random_path)]) == 3
    err = capsys.readouterr().err
    assert "A case needs the files" in err
    assert "2 more findings;" in err
