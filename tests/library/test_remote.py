"""Messages between a worker and who started it."""

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobre_shm import errors
from cobre_shm.sddp.errors import OutOfRange
from cobre_shm.spawn.frames import Channel, Frame, FrameReader, encode_frame
from cobre_shm.spawn.remote import RemoteError, decode_exception, encode_exception


@given(
    st.lists(st.tuples(st.sampled_from(Frame), st.binary(max_size=50)), max_size=6),
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_messages_are_the_same_in_whatever_pieces_they_arrive(messages, pieces):
    data = b"".join(encode_frame(kind, payload) for kind, payload in messages)
    reader, found, turn = FrameReader(), [], 0
    while data:
        length = pieces[turn % len(pieces)]
        found += reader.feed(data[:length])
        data, turn = data[length:], turn + 1
    assert found == messages


def test_bytes_that_are_no_message_are_refused():
    with pytest.raises(ValueError, match="Frame"):
        list(FrameReader().feed(b"\x63" + bytes(8)))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("text", 3, None, 1.5),
        KeyError("key"),
        FileNotFoundError(2, "No such file or directory", "/name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        OutOfRange("value", context={"file": "config.json"}, suggestion="less"),
        errors.InvalidBufferSize("allreduce", 3, 4),
        errors.RankFailed("Rank 1 died", rank=1, pid=7, signal=9),
        errors.WorkerError("Worker", rank=1, pid=7, inner=KeyError("inner")),
        errors.InitializationFailed("shm", "detail", source=OSError(13, "refused")),
        ExceptionGroup("group", [ValueError("one"), TypeError("two")]),
        SystemExit(3),
    ],
)
def test_exception_is_made_again(error):
    made = decode_exception(encode_exception(error))
    assert type(made) is type(error)
    assert str(made) == str(error)
    assert repr(made.args) == repr(error.args)
    if isinstance(error, OSError):
        assert (made.errno, made.filename) == (error.errno, error.filename)
    if isinstance(error, errors.CobreError):
        assert made.to_dict() == error.to_dict()


def test_errors_of_this_project_and_builtin_ones_are_not_pickled():
    for error in (ValueError("text"), OutOfRange("value"), errors.RankFailed("r", rank=1, pid=7)):
        assert "pickle" not in json.loads(encode_exception(error))


def test_exception_that_cannot_be_made_again_keeps_its_name_and_text():
    class Local(Exception):
        pass

    made = decode_exception(encode_exception(Local("text")))
    assert type(made) is RemoteError
    assert str(made).endswith("Local: text")


@pytest.mark.parametrize("name", ["os:system", "builtins:exec", "cobre_shm.errors:re", "x:y", ""])
def test_only_exceptions_are_made(name):
    described = {"class": name, "text": "t", "traceback": "", "plain": {"args": ["true"]}}
    assert type(decode_exception(json.dumps(described).encode())) is RemoteError


def test_wish_to_stop_that_comes_with_the_task_is_heard():
    ours, theirs = socket.socketpair()
    channel = Channel(theirs.detach())
    with ours:
        ours.sendall(encode_frame(Frame.TASK, b"task") + encode_frame(Frame.STOP))
        assert channel.receive_task() == b"task"
        assert channel.is_stopping()
    channel.close()


def test_error_without_what_is_underneath_has_the_attribute_for_it():
    error = errors.InitializationFailed("shm", "detail", source=OSError(13, "refused"))
    assert decode_exception(encode_exception(error)).source is None
