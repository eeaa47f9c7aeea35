"""Values as bytes, without pickle: what can be made from them is data and nothing else.

Plain Python values, numpy arrays, and the dataclasses of this project, nested as they like. The
structure travels as JSON, in which every value that JSON has no word for is an object with one
key; arrays follow as they lie in memory. Floats keep every bit.

    {"t": [...]}      a tuple            {"a": 3}               the fourth array
    {"m": [[k, v]]}   a dictionary       {"d": [name, {...}]}   a dataclass and its fields
"""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["decode", "encode"]

_OWN = "cobre_shm."


def encode(value: object) -> bytes:
    """Return a value as bytes.

    Raises:
        TypeError: It holds something of another kind.
    """
    arrays: list[npt.NDArray[Any]] = []
    structure = json.dumps(_describe(value, arrays), separators=(",", ":")).encode()
    buffer = io.BytesIO()
    head = np.frombuffer(structure, dtype=np.uint8)
    # Without allow_pickle, which numpy before 2.1 would store as an array of that name.
    np.savez(buffer, head, *arrays)
    return buffer.getvalue()


def decode(data: bytes) -> Any:
    """Return the value that :func:`encode` was given.

    Raises:
        ValueError: These are not the bytes of one.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = [stored[f"arr_{i}"] for i in range(len(stored.files))]
    head, *rest = arrays
    return _make(json.loads(head.tobytes()), rest)


def _describe(value: object, arrays: list[npt.NDArray[Any]]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        # A numpy scalar may be a float as well; what comes back is the plain one.
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        arrays.append(np.asarray(value))
        return {"a": len(arrays) - 1}
    if isinstance(value, tuple):
        return {"t": [_describe(item, arrays) for item in value]}
    if isinstance(value, list):
        return [_describe(item, arrays) for item in value]
    if isinstance(value, dict):
        return {"m": [[_describe(k, arrays), _describe(v, arrays)] for k, v in value.items()]}
    cls = type(value)
    if is_dataclass(cls) and cls.__module__.startswith(_OWN):
        described = {
            field.name: _describe(getattr(value, field.name), arrays) for field in fields(cls)
        }
        return {"d": [f"{cls.__module__}:{cls.__qualname__}", described]}
    raise TypeError(f"{cls.__module__}.{cls.__qualname__} is not plain data")


def _make(described: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    if isinstance(described, list):
        return [_make(item, arrays) for item in described]
    if not isinstance(described, dict):
        return described
    ((kind, content),) = described.items()
    if kind == "a":
        return arrays[content]
    if kind == "t":
        return tuple(_make(item, arrays) for item in content)
    if kind == "m":
        return {_make(k, arrays): _make(v, arrays) for k, v in content}
    name, described = content
    return _make_dataclass(name, described, arrays)


def _make_dataclass(name: str, described: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    module, _, qualname = name.partition(":")
    if not module.startswith(_OWN):
        raise ValueError(f"{name} is not a dataclass of this project")
    cls = getattr(importlib.import_module(module), qualname)
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ValueError(f"{name} is not a dataclass of this project")
    made = object.__new__(cls)
    for field in fields(cls):
        # As it was: what a constructor would check has been checked where it was made.
        object.__setattr__(made, field.name, _make(described[field.name], arrays))
    return made
