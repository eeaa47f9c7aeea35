"""An exception of a worker as data, and made again in the process that started it.

Built-in exceptions with plain arguments and the errors of this project travel as JSON: the name of
the class and the values. Others are pickled, if they can be; if not, or if their class cannot be
found again, their name and text are what is left (:class:`RemoteError`). The worker is of this
user, was started by this process and runs what this process gave it, so it is trusted as far as
unpickling goes; nothing that came from elsewhere is unpickled.
"""

from __future__ import annotations

import base64
import builtins
import importlib
import json
import pickle
import traceback
from typing import Any

from cobre_shm.errors import CobreError

__all__ = ["RemoteError", "RemoteTraceback", "decode_exception", "encode_exception"]

_OWN = ("cobre_shm", "cobre_net")


class RemoteTraceback(Exception):
    """Where an exception was raised in its own process; the cause of what is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text.rstrip()}"


class RemoteError(Exception):
    """Stands for an exception of a worker that could not be made again here."""


def encode_exception(error: BaseException) -> bytes:
    """Return an exception with its traceback as bytes."""
    described: dict[str, Any] = {
        "class": f"{type(error).__module__}:{type(error).__qualname__}",
        "text": "",
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        described["text"] = str(error)
    except Exception as failed:
        # Whoever shows it there would fail in the same way.
        described["text"] = f"its text cannot be made: {type(failed).__name__}"
        return json.dumps(described).encode()
    plain = _plain_arguments(error)
    if plain is not None:
        described["plain"] = plain
    else:
        try:
            data = pickle.dumps(error)
            # Whether it can be made again shows only when it is tried.
            pickle.loads(data)
            described["pickle"] = base64.b64encode(data).decode()
        except Exception:
            described["pickle"] = None
    return json.dumps(described).encode()


def decode_exception(data: bytes) -> BaseException:
    """Return the exception; its ``__cause__`` is a :class:`RemoteTraceback`."""
    described = json.loads(data)
    try:
        error = _rebuild(described)
    except Exception:
        error = RemoteError(f"{described['class'].replace(':', '.')}: {described['text']}")
    error.__cause__ = RemoteTraceback(described["traceback"])
    return error


def _plain_arguments(error: BaseException) -> dict[str, Any] | None:
    """What JSON can say of an exception, or None if that is not all of it."""
    cls = type(error)
    if isinstance(error, CobreError) and cls.__module__.partition(".")[0] in _OWN:
        # What is underneath is told by the traceback.
        state = {k: None if k == "source" else value for k, value in vars(error).items()}
        found = {"args": list(error.args), "state": state}
    elif cls.__module__ == "builtins":
        reduced = error.__reduce__()
        if not isinstance(reduced, tuple) or len(reduced) != 2:
            return None
        found = {"args": list(reduced[1])}
    else:
        return None
    try:
        same: bool = json.loads(json.dumps(found)) == found
    except (TypeError, ValueError):
        return None
    return found if same else None


def _exception_class(found: object) -> type[BaseException]:
    if isinstance(found, type) and issubclass(found, BaseException):
        return found
    raise TypeError(f"not a class of exceptions: {found!r}")


def _rebuild(described: dict[str, Any]) -> BaseException:
    module, _, name = described["class"].partition(":")
    plain = described.get("plain")
    if plain is None:
        error: BaseException = pickle.loads(base64.b64decode(described.get("pickle") or b""))
    elif module == "builtins":
        error = _exception_class(getattr(builtins, name))(*plain["args"])
    elif module.partition(".")[0] in _OWN:
        cls = _exception_class(getattr(importlib.import_module(module), name))
        # As CobreError.__reduce__ does: constructors differ, the attributes are the whole state.
        error = BaseException.__new__(cls)
        error.args = tuple(plain["args"])
        error.__dict__.update(plain["state"])
    else:
        raise ValueError(f"not a class to be made again: {module}")
    if not isinstance(error, BaseException):
        raise TypeError(f"not an exception: {error!r}")
    return error
