"""The files of a case directory: absent, unreadable, unknown, and tables with too little."""

from __future__ import annotations

import datetime
import decimal
import errno
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cobre_shm.sddp import (
    MissingFile,
    OutOfRange,
    ParseError,
    SchemaViolation,
    TypeMismatch,
    Unsupported,
    load_case,
    shipped_case_path,
)
from cobre_shm.sddp.__main__ import main
from cobre_shm.sddp.documents import REQUIRED, decode, encode, read_documents
from cobre_shm.sddp.findings import Findings
from cobre_shm.sddp.results import read_table
from tests.sddp.editing import write_json, write_table
from tests.sddp.test_case import _COUNT_THREADS

OTHER_VALUES = {
    "time": datetime.datetime(2030, 1, 1, 12),
    "decimal": decimal.Decimal("1.5"),
    "bytes": b"x",
    "list": [datetime.date(2030, 1, 1)],
}


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_required_file_is_named(shipped_copy, name):
    (shipped_copy / name).unlink()
    with pytest.raises(MissingFile) as caught:
        load_case(shipped_copy)
    assert caught.value.context["file"] == name


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(MissingFile, match="absent"):
        load_case(tmp_path / "absent")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_directory_that_cannot_be_is_named(name, tmp_path):
    with pytest.raises(MissingFile, match="there is no case directory"):
        load_case(tmp_path / name)


def test_command_names_a_directory_that_cannot_be(capsys):
    assert main(["validate", "x" * 300]) == 3
    assert "File name too long" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["stages.json", "scenarios/correlation.json"])
def test_file_that_cannot_be_looked_at_is_named(shipped_copy, name):
    (shipped_copy / name).unlink(missing_ok=True)
    (shipped_copy / name).symlink_to(shipped_copy / name)
    with pytest.raises(ParseError, match="symbolic links") as caught:
        load_case(shipped_copy)
    assert caught.value.context["file"] == name


def test_closed_folder_is_named(shipped_copy, monkeypatch):
    """As for a user who may not enter it; the superuser may enter every one."""
    stat = Path.stat

    def refuse(path, **options):
        if path.parent == shipped_copy / "system":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ParseError, match=r"system/buses\.json: not readable: Permission denied"):
        load_case(shipped_copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stages.json", b"{"),
        ("stages.json", b"[]"),
        pytest.param("stages.json", b'{"stages": ' + b"[" * 200_000, id="nested"),
        ("penalties.json", b'{"bus": NaN}'),
        pytest.param("penalties.json", b'{"bus": {"a": 1, "a": 2}}', id="key twice"),
        ("system/buses.json", b"\xff\xfe\x00"),
        ("scenarios/load_seasonal_stats.parquet", b"not parquet"),
    ],
)
def test_unreadable_file_is_named(shipped_copy, name, content):
    (shipped_copy / name).write_bytes(content)
    with pytest.raises(ParseError) as caught:
        load_case(shipped_copy)
    assert caught.value.context["file"] == name
    if b'"a"' in content:
        assert "an object has the key 'a' twice" in caught.value.message


@pytest.mark.parametrize(
    "cls", [pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowCapacityError, pa.ArrowKeyError]
)
def test_table_that_pyarrow_refuses_is_named(shipped_copy, monkeypatch, cls):
    def refuse(*_args, **_options):
        raise cls("Integers with less than 8 bits not implemented")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    name = "scenarios/load_seasonal_stats.parquet"
    with pytest.raises(ParseError, match="less than 8 bits"):
        load_case(shipped_copy)
    with pytest.raises(ParseError, match="less than 8 bits"):
        read_table(shipped_copy / name)


@pytest.mark.parametrize(
    "file",
    [
        "scenarios/inflow_history.parquet",
        "scenarios/external_inflow.parquet",
        "constraints/pumping_bounds.parquet",
        "system/fpha_hyperplanes.parquet",
        "scenarios/more/load.csv",
    ],
)
def test_file_that_is_not_read_is_refused(shipped_copy, file):
    write_json(shipped_copy, file, {})
    with pytest.raises(Unsupported) as caught:
        load_case(shipped_copy)
    assert caught.value.context["file"] == file


def test_other_files_in_the_directory_do_no_harm(shipped_copy):
    (shipped_copy / "NOTES.txt").write_text("mine")
    (shipped_copy / "system" / "README.md").write_text("mine")
    load_case(shipped_copy)


def test_rows_of_unknown_entities_and_stages_have_no_effect(shipped_copy):
    constraint = {"id": 0, "name": "C", "expression": "hydro_turbined(0)", "sense": "<="}
    write_json(shipped_copy, "constraints/generic_constraints.json", {"constraints": [constraint]})
    write_table(
        shipped_copy,
        "constraints/generic_constraint_bounds.parquet",
        ["constraint_id", "stage_id", "block_id", "bound"],
        [(0, 2, None, 5.0), (0, 99, None, 6.0), (7, 2, None, 7.0)],
    )
    write_table(
        shipped_copy,
        "constraints/line_bounds.parquet",
        ["line_id", "stage_id", "direct_mw"],
        [(0, 99, 1.0), (99, 0, 1.0)],
    )
    case = load_case(shipped_copy)
    assert [dict(item.bounds) for item in case.constraints] == [{2: ((None, 5.0),)}]
    assert not case.overrides.tables["line_bounds"]


def test_table_without_a_required_column_is_refused(shipped_copy):
    write_table(
        shipped_copy, "scenarios/load_seasonal_stats.parquet", ["bus_id", "stage_id"], [(0, 0)]
    )
    with pytest.raises(SchemaViolation, match="'mean_mw'"):
        load_case(shipped_copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20, -1e20])
def test_table_with_a_number_that_is_none_is_refused(shipped_copy, value):
    write_table(
        shipped_copy,
        "scenarios/load_seasonal_stats.parquet",
        ["bus_id", "stage_id", "mean_mw", "std_mw"],
        [(0, 0, value, 0.0)],
    )
    with pytest.raises(OutOfRange, match="mean_mw"):
        load_case(shipped_copy)


def test_documents_survive_the_way_to_other_ranks():
    documents = read_documents(shipped_case_path(), Findings())
    assert decode(encode(documents)) == documents


def test_reading_starts_no_threads():
    """A process that ends while a foreign thread pool starts is aborted by the C++ runtime."""
    assert subprocess.run([sys.executable, "-c", _COUNT_THREADS], check=False).returncode == 0


def test_column_that_nothing_reads_may_hold_anything(shipped_copy):
    file = shipped_copy / "scenarios" / "load_seasonal_stats.parquet"
    table = pq.read_table(file)
    rows = len(table)
    for name, value in OTHER_VALUES.items():
        table = table.append_column(name, pa.array([value] * rows))
    pq.write_table(table, file)
    assert main(["validate", str(shipped_copy)]) == 0
    documents = read_documents(shipped_copy, Findings())
    assert decode(encode(documents)) == documents


@pytest.mark.parametrize("value", OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_column_of_no_numbers_is_refused_where_it_is_read(shipped_copy, value):
    file = shipped_copy / "scenarios" / "load_seasonal_stats.parquet"
    table = pq.read_table(file)
    column = table.column_names.index("mean_mw")
    pq.write_table(table.set_column(column, "mean_mw", pa.array([value] * len(table))), file)
    with pytest.raises(TypeMismatch, match=r"mean_mw.* must be a number"):
        load_case(shipped_copy)
