"""Checked access to the fields of JSON objects and Parquet rows.

Every reader names the file, the field and the entity it was asked for, so that a wrong value is
reported where it stands and not where it first hurts. A finding does not end the reading: the
reader returns a value that passes every later check, and the rest of the case is checked too.
"""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from cobre_shm.sddp.errors import (
    CaseError,
    DuplicateId,
    InvalidEnum,
    MissingReference,
    OutOfRange,
    SchemaViolation,
    TypeMismatch,
    Unsupported,
)
from cobre_shm.sddp.findings import Findings

_REQUIRED: Any = object()
# Stands for an integer that could not be read: no id, no stage and no count has this value.
UNREADABLE = -(2**62)
# From here on HiGHS takes a number for infinity, and refuses it where a quantity has one value.
_INFINITE = 1e20

_Reader = TypeVar("_Reader", bound=Callable[..., Any])


def _or(make: Callable[[], Any]) -> Callable[[_Reader], _Reader]:
    """Make a reader of a record note what it finds wrong and return ``make()`` in its place."""

    def decorate(read: _Reader) -> _Reader:
        @functools.wraps(read)
        def collect(record: Record, *args: Any, **kwargs: Any) -> Any:
            try:
                return read(record, *args, **kwargs)
            except CaseError as error:
                record.findings.add(error)
                return make()

        return cast(_Reader, collect)

    return decorate


class Positions(dict[int, int]):
    """Position of each entity by its id.

    Attributes:
        complete: False where some ids could not be read; then no id can be called unknown.
    """

    def __init__(self, ids: Iterable[int], *, complete: bool = True) -> None:
        super().__init__((entity_id, i) for i, entity_id in enumerate(ids))
        self.complete = complete


class Record:
    """One JSON object or table row together with its place in the case directory.

    Attributes:
        data: The fields.
        file: Path of the file inside the case directory.
        findings: Where mistakes are noted.
        path: Place of the record inside the file.
        entity_id: Id of the entity that the record belongs to, if it has one.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        file: str,
        findings: Findings,
        path: str = "",
        entity_id: int | None = None,
    ) -> None:
        self.data = data
        self.file = file
        self.findings = findings
        self.path = path
        self.entity_id = entity_id

    def __contains__(self, key: str) -> bool:
        """Tell whether the field is present and not null."""
        return self.data.get(key) is not None

    def error(
        self,
        cls: type[CaseError],
        key: str,
        problem: str,
        *,
        value: Any = None,
        expected: str | None = None,
        suggestion: str | None = None,
    ) -> CaseError:
        """Return an error of class ``cls`` about field ``key`` of this record."""
        field = f"{self.path}.{key}" if self.path and key else self.path or key
        context: dict[str, Any] = {"file": self.file, "field": field}
        if self.entity_id is not None:
            context["entity_id"] = self.entity_id
        if value is not None:
            shown = (str, int, float, bool)
            context["value"] = value if isinstance(value, shown) else repr(value)[:80]
        if expected is not None:
            context["expected"] = expected
        owner = "" if self.entity_id is None else f" (id {self.entity_id})"
        return cls(
            f"{self.file}: {field}{owner}: {problem}", context=context, suggestion=suggestion
        )

    def report(self, cls: type[CaseError], key: str, problem: str, **details: Any) -> None:
        """Note an error about field ``key``; ``details`` as for :meth:`error`."""
        self.findings.add(self.error(cls, key, problem, **details))

    def refuse(self, key: str, what: str) -> None:
        """Note that the value of ``key`` is not supported."""
        self.report(Unsupported, key, f"{what} is not supported", value=self.data.get(key))

    def _get(self, key: str, default: Any, wanted: str) -> Any:
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.error(SchemaViolation, key, f"is required: {wanted}", expected=wanted)
            return default
        return value

    def _wrong_type(self, key: str, value: Any, wanted: str) -> CaseError:
        return self.error(
            TypeMismatch, key, f"must be {wanted}, not {value!r}", value=value, expected=wanted
        )

    @_or(lambda: math.nan)
    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        minimum: float | None = None,
        above: float | None = None,
        maximum: float | None = None,
    ) -> float:
        """Return a float below 1e20 in size; an absent field gives ``default`` unchecked."""
        value = self._get(key, default, "a number")
        if value is default and key not in self:
            return value  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong_type(key, value, "a number")
        try:
            result = float(value)
        except OverflowError:
            # An integer that is too large for a float.
            result = math.inf if value > 0 else -math.inf
        expected = None
        if not math.isfinite(result):
            expected = "a finite number"
        elif abs(result) >= _INFINITE:
            expected = f"less than {_INFINITE:g} in size"
        elif minimum is not None and result < minimum:
            expected = f"at least {minimum:g}"
        elif above is not None and result <= above:
            expected = f"greater than {above:g}"
        elif maximum is not None and result > maximum:
            expected = f"at most {maximum:g}"
        if expected is not None:
            raise self.error(
                OutOfRange,
                key,
                f"must be {expected}, not {result!r}",
                value=str(result),
                expected=expected,
            )
        return result

    @_or(lambda: UNREADABLE)
    def integer(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> int:
        """Return an integer; an absent field gives ``default`` unchecked."""
        value = self._get(key, default, "an integer")
        if value is default and key not in self:
            return value  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(key, value, "an integer")
        if minimum is not None and value < minimum:
            raise self.error(
                OutOfRange,
                key,
                f"must be at least {minimum}, not {value}",
                value=value,
                expected=f"at least {minimum}",
            )
        if maximum is not None and value > maximum:
            raise self.error(
                OutOfRange,
                key,
                f"must be at most {maximum}, not {value}",
                value=value,
                expected=f"at most {maximum}",
            )
        return value

    @_or(str)
    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """Return a string."""
        value = self._get(key, default, "a text")
        if value is not default and not isinstance(value, str):
            raise self._wrong_type(key, value, "a text")
        return value  # type: ignore[no-any-return]

    @_or(bool)
    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self._wrong_type(key, value, "true or false")
        return value

    @_or(str)
    def choice(
        self,
        key: str,
        allowed: tuple[str, ...],
        default: Any = _REQUIRED,
        *,
        unsupported: tuple[str, ...] = (),
    ) -> str:
        """Return one of ``allowed``; the words in ``unsupported`` are refused as such."""
        value: str = self._get(key, default, "a text")
        if value in unsupported:
            raise self.error(Unsupported, key, f"{value!r} is not supported", value=value)
        if value not in allowed:
            wanted = "one of " + ", ".join(allowed)
            raise self.error(
                InvalidEnum if isinstance(value, str) else TypeMismatch,
                key,
                f"must be {wanted}, not {value!r}",
                value=value,
                expected=wanted,
            )
        return value

    @_or(lambda: None)
    def date(self, key: str) -> datetime.date | None:
        """Return an ISO date, or None for one that cannot be read."""
        wanted = "a date like 2024-01-31"
        value = self._get(key, _REQUIRED, wanted)
        try:
            return datetime.date.fromisoformat(value)
        except (TypeError, ValueError):
            raise self._wrong_type(key, value, wanted) from None

    def record(self, key: str, *, required: bool = True) -> Record:
        """Return a nested object; an absent optional one counts as empty."""
        path = f"{self.path}.{key}" if self.path else key
        value, findings = self._object(key, _REQUIRED if required else {}), self.findings
        if value is None:
            # The object as a whole is wrong: what it lacks is no finding of its own.
            value, findings = {}, Findings()
        return Record(value, self.file, findings, path, self.entity_id)

    @_or(lambda: None)
    def _object(self, key: str, default: Any) -> Mapping[str, Any] | None:
        value = self._get(key, default, "an object")
        if not isinstance(value, dict):
            raise self._wrong_type(key, value, "an object")
        return value

    @_or(list)
    def items(self, key: str, default: Any = _REQUIRED) -> list[Any]:
        """Return a list of anything."""
        value = self._get(key, default, "a list")
        if not isinstance(value, list):
            raise self._wrong_type(key, value, "a list")
        return value

    def records(self, key: str, default: Any = _REQUIRED) -> list[Record]:
        """Return a list of objects."""
        path = f"{self.path}.{key}" if self.path else key
        result = []
        for i, item in enumerate(self.items(key, default)):
            if isinstance(item, dict):
                record = Record(item, self.file, self.findings, f"{path}[{i}]", self.entity_id)
                result.append(record)
            else:
                self.findings.add(self._wrong_type(f"{key}[{i}]", item, "an object"))
        return result

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite floats."""
        values = self.items(key)
        cells = Record(
            {f"{key}[{i}]": value for i, value in enumerate(values)},
            self.file,
            self.findings,
            self.path,
            self.entity_id,
        )
        return tuple(cells.number(name) for name in cells.data)

    def reference(self, key: str, positions: Positions, what: str) -> int:
        """Return the position of the entity whose id stands in ``key``; -1 if it has none."""
        value = self.integer(key)
        if value in positions:
            return positions[value]
        if value != UNREADABLE and positions.complete:
            self.report(
                MissingReference,
                key,
                f"there is no {what} with id {value}",
                value=value,
                expected=f"the id of a {what}",
            )
        return -1


def identified(document: Record, key: str) -> tuple[list[Record], Positions]:
    """Return the objects of list ``key`` sorted by their ``id``, and the position of each id.

    Objects without an id of their own are noted and left out. An id has 32 bits, as in the tables
    that a training writes.
    """
    before = len(document.findings)
    records = document.records(key)
    for record in records:
        record.entity_id = record.integer("id", minimum=-(2**31), maximum=2**31 - 1)
    complete = len(document.findings) == before
    by_id: dict[int, Record] = {}
    for record in records:
        if record.entity_id is None or record.entity_id == UNREADABLE:
            continue
        if record.entity_id in by_id:
            record.report(
                DuplicateId,
                "id",
                f"the id {record.entity_id} occurs twice",
                value=record.entity_id,
                expected="distinct ids",
            )
        else:
            by_id[record.entity_id] = record
    ids = sorted(by_id)
    return [by_id[entity_id] for entity_id in ids], Positions(ids, complete=complete)
