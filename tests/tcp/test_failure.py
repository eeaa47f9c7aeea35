"""Failures on the wire: what is told arrives, and what tells of none is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobre_net.tcp import wire
from cobre_net.tcp.failure import Failure
from cobre_net.tcp.link import last_word
from cobre_net.tcp.wire import BadFrame
from cobre_shm.errors import CollectiveMismatch, CollectiveTimeout, RankFailed


@st.composite
def failures(draw):
    rank = st.integers(-1, 2**31)
    return Failure(
        kind=draw(st.sampled_from(["died", "left", "aborted", "raised", "interrupted", "damaged"])),
        rank=draw(rank),
        pid=draw(st.integers(0, 2**22)),
        host=draw(st.text(max_size=50)),
        value=draw(st.integers(-(2**31), 2**31)),
        text=draw(st.text(max_size=300)),
        did=draw(st.text(max_size=100)),
        missing=tuple(draw(st.lists(rank, max_size=5))),
        seconds=draw(st.floats(0, 1e6)),
        calls=tuple(draw(st.lists(st.text(max_size=50), max_size=5))),
    )


@settings(max_examples=30)
@given(failures())
def test_failure_survives_the_wire(failure):
    data = failure.to_frame()
    assert len(data) <= wire.MAX_CONTROL_BYTES + wire.PREFIX_BYTES
    assert Failure.from_body(data[wire.PREFIX_BYTES :]) == failure
    assert last_word(b"junk" + data, 4).failure == failure


def test_failure_of_very_many_ranks_still_fits_a_frame():
    failure = Failure("mismatch", calls=("allreduce(3 x float64, SUM)",) * 20_000)
    data = failure.to_frame()
    assert len(data) <= wire.MAX_CONTROL_BYTES + wire.PREFIX_BYTES
    assert Failure.from_body(data[wire.PREFIX_BYTES :]).calls[0] == failure.calls[0]


def test_each_kind_of_failure_becomes_its_exception():
    assert type(Failure("mismatch", calls=("a", "b")).to_error()) is CollectiveMismatch
    late = Failure("timeout", 0, missing=(3,), seconds=2.0, text="rank 3").to_error()
    assert type(late) is CollectiveTimeout
    assert (late.missing_ranks, late.seconds) == ([3], 2.0)
    died = Failure("died", 3, 99, "node-3", text="{0} % {text}").to_error()
    assert type(died) is RankFailed
    assert (died.rank, died.pid, died.context["host"]) == (3, 99, "node-3")
    assert "{0} % {text}" in str(died)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 20_000,
        b"1" * 20_000,
        json.dumps({"kind": "died", "rank": "3"}).encode(),
        Failure("died", 3).to_frame()[5:].replace(b'"died"', b'"__class__"'),
        Failure("died", 3).to_frame()[5:].replace(b'"rank": 3', b'"rank": 1e400'),
        Failure("died", 3).to_frame()[5:].replace(b'"rank": 3', b'"rank": 999999999999999999999'),
        Failure("died", 3).to_frame()[5:].replace(b'"missing": []', b'"missing": "abc"'),
        Failure("died", 3).to_frame()[5:].replace(b'"calls": []', b'"calls": [[]]'),
    ],
)
def test_what_tells_of_no_failure_is_a_bad_frame(body):
    with pytest.raises(BadFrame):
        Failure.from_body(body)


@given(st.binary(max_size=200), st.integers(0, 50))
def test_last_word_takes_any_bytes(data, skip):
    last_word(data, skip)
