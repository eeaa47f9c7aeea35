"""Reduction names, the dtype table, and the tags that stand for dtypes in shared memory."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobre_shm.datatypes import ReduceOp, dtype_tag, is_movable, is_reducible, tag_text
from cobre_shm.testing.conformance.payloads import MOVABLE


@pytest.mark.parametrize("op", ReduceOp)
@pytest.mark.parametrize("spell", [str, str.lower, str.title, lambda name: f" {name} "])
def test_parse_name_in_any_case_found(op, spell):
    assert ReduceOp.parse(spell(op.name)) is op
    assert ReduceOp.parse(op) is op


@pytest.mark.parametrize(
    "op", ["", "mean", "sum max", 0, 1, None, 1.0, b"SUM", True, [ReduceOp.SUM]]
)
def test_parse_anything_else_refused(op):
    with pytest.raises(ValueError, match="expected one of"):
        ReduceOp.parse(op)


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
def test_is_movable_fixed_size_accepted(dtype):
    assert is_movable(dtype)


@pytest.mark.parametrize(
    "dtype",
    ["O", [("a", "O")], [("a", [("b", "O", (2,))])], "S0", "U0", "V0", []],
    ids=str,
)
def test_is_movable_object_or_empty_refused(dtype):
    assert not is_movable(np.dtype(dtype))


@pytest.mark.parametrize(
    ("codes", "defined"),
    [
        ("bBhHiIlLqQefdg", set(ReduceOp)),
        ("FDG", {ReduceOp.SUM, ReduceOp.PROD}),
        ("?", {ReduceOp.MIN, ReduceOp.MAX}),
        (["S3", "U3", "V8", "M8[s]", "m8[s]", "i4,f8", "O"], set()),
    ],
)
def test_is_reducible_by_kind_as_listed(codes, defined):
    for code in codes:
        dtype = np.dtype(code)
        for each in (dtype, dtype.newbyteorder("S")):
            assert {op for op in ReduceOp if is_reducible(each, op)} == defined, each


def test_dtype_tag_different_dtypes_differ():
    long_texts = [np.dtype("M8[25s]"), np.dtype("M8[25ns]"), np.dtype("U1000000"), np.dtype("S7")]
    renamed = [np.dtype([("a", "i4"), ("b", "i4")]), np.dtype([("a", "i4"), ("c", "i4")])]
    moved = [np.dtype({"names": ["a"], "formats": ["i4"], "offsets": [at]}) for at in (0, 4)]
    distinct = list(dict.fromkeys([*MOVABLE, *long_texts, *renamed, *moved]))
    for left, right in itertools.combinations(distinct, 2):
        assert dtype_tag(left) != dtype_tag(right), (left, right)


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
def test_dtype_tag_any_dtype_fits_eight_bytes(dtype):
    tag = dtype_tag(dtype)
    assert -(2**63) <= tag < 2**63
    assert tag == dtype_tag(pickle.loads(pickle.dumps(dtype)))


def test_dtype_tag_aliases_equal():
    assert dtype_tag(np.dtype("l")) == dtype_tag(np.dtype("q")) == dtype_tag(np.dtype("int64"))
    assert dtype_tag(np.dtype("=f8")) == dtype_tag(np.dtype("f8"))


def test_dtype_tag_plain_dtype_is_its_array_protocol_string():
    # Written to shared memory: processes of another version must understand it.
    assert dtype_tag(np.dtype("<f8")).to_bytes(8, "little", signed=True) == b"<f8\0\0\0\0\0"
    assert dtype_tag(np.dtype("<M8[25s]")).to_bytes(8, "little", signed=True)[:1] == b"<"


@pytest.mark.parametrize(
    ("dtype", "text"),
    [("f8", "float64"), (">i4", ">i4"), ("?", "bool"), ("S5", "|S5"), ("M8[ns]", "datetime64[ns]")],
)
def test_tag_text_plain_dtype_readable(dtype, text):
    assert tag_text(dtype_tag(np.dtype(dtype))) == text


def test_tag_text_record_recognisable():
    tag = dtype_tag(np.dtype([("a", "i4"), ("b", "f8")]))
    assert tag_text(tag).startswith("record ")


@given(st.integers(-(2**63), 2**63 - 1))
def test_tag_text_any_word_readable(tag):
    # A message about a damaged segment must not fail itself.
    assert isinstance(tag_text(tag), str)


@pytest.mark.parametrize("first", [False, True])
def test_tags_of_equal_records_are_equal(first):
    """Whether one was made by alignment says nothing, nor which of them was met before."""
    fields = [("key", "i1"), ("inner", [("point", "f4", (2, 2))]), ("value", "f8")]
    aligned = np.dtype(fields, align=True)
    plain = np.dtype(
        {
            "names": list(aligned.names),
            "formats": [aligned[name] for name in aligned.names],
            "offsets": [aligned.fields[name][1] for name in aligned.names],
            "itemsize": aligned.itemsize,
        }
    )
    assert aligned == plain
    assert repr(aligned) != repr(plain)
    dtype_tag.cache_clear()
    pair = (aligned, plain) if first else (plain, aligned)
    tags = []
    for dtype in pair:
        tags.append(dtype_tag(dtype))
        dtype_tag.cache_clear()
    assert tags[0] == tags[1] != dtype_tag(np.dtype(fields))


def test_tags_of_records_differ_in_every_part():
    parts = [
        [("a", "f8"), ("b", "f8")],
        [("a", "f8"), ("c", "f8")],
        [("a", "f8"), ("b", "i8")],
        [("a", "f8"), ("b", "f8", (1,))],
        [("a", "f8"), (("title", "b"), "f8")],
        {"names": ["a", "b"], "formats": ["f8", "f8"], "offsets": [8, 0]},
        {"names": ["a", "b"], "formats": ["f8", "f8"], "itemsize": 24},
    ]
    assert len({dtype_tag(np.dtype(part)) for part in parts}) == len(parts)
