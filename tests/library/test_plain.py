"""Results as bytes without pickle."""

import io
import json
import pickle

import numpy as np
import pytest

from cobre_shm.api.plain import decode, encode
from cobre_shm.sddp.cuts import StageCuts
from cobre_shm.sddp.training_result import mean_and_std


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        0.1,
        float("inf"),
        "text\u0000é",
        (1, (2, [3, None])),
        {1: "a", "b": (2.5,), None: []},
        [],
        (),
        {"a": 1, "t": 2},
    ],
)
def test_plain_values_come_back_as_they_were(value):
    found = decode(encode(value))
    assert found == value
    assert type(found) is type(value)


def test_arrays_keep_every_bit_and_their_shape():
    arrays = (
        np.random.default_rng(1).normal(size=(3, 4, 2)),
        np.array([np.nan, -0.0, 5e-324]),
        np.zeros((0, 3), dtype=np.int8),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.arange(12).reshape(3, 4).T,
    )
    for mine, theirs in zip(arrays, decode(encode(arrays)), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mine.tobytes() == theirs.tobytes()


def test_dataclasses_of_this_project_come_back():
    cuts = StageCuts(np.ones(2), np.ones((2, 3)), np.arange(2), np.arange(2))
    (found,) = decode(encode([cuts]))
    assert type(found) is StageCuts
    assert found.coefficients.tolist() == cuts.coefficients.tolist()


@pytest.mark.parametrize(
    "value",
    [object(), {1}, b"bytes", lambda: 1, [1, {"x": 1j}], np.array([{1}], dtype=object)],
)
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match="not plain data"):
        encode(value)


def message(structure, *arrays):
    buffer = io.BytesIO()
    head = np.frombuffer(json.dumps(structure).encode(), dtype=np.uint8)
    np.savez(buffer, head, *arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["subprocess:Popen", "builtins:list", "cobre_shm.sddp.cuts:ordered_sum", "os:system"]
)
def test_nothing_but_dataclasses_of_this_project_is_made(name):
    with pytest.raises(ValueError, match="not a dataclass of this project"):
        decode(message({"d": [name, {}]}))


def test_pickled_arrays_are_refused():
    with pytest.raises(ValueError, match="allow_pickle"):
        decode(message({"a": 0}, np.array([mean_and_std], dtype=object)))
    with pytest.raises(ValueError, match="pickle"):
        decode(pickle.dumps([1]))


def test_oldest_numpy_stores_nothing_beside_the_arrays(monkeypatch):
    """Before numpy 2.1 ``savez`` has no options: every keyword is the name of an array."""
    savez = np.savez
    monkeypatch.setattr(
        np, "savez", lambda file, *args, **named: savez(file, *args, **renamed(named))
    )
    assert decode(encode({"a": np.ones(2)}))["a"].tolist() == [1.0, 1.0]


def renamed(named):
    return {f"named_{name}": values for name, values in named.items()}
