"""Checked access to the fields of JSON objects and Parquet rows.

Every reader names the file, the field and the entity it was asked for, so that a wrong value is
reported where it stands and not where it first hurts.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from cobre_shm.sddp.errors import (
    CaseError,
    MissingReference,
    OutOfRange,
    SchemaViolation,
    Unsupported,
)

_REQUIRED: Any = object()


class Record:
    """One JSON object or table row together with its place in the case directory."""

    def __init__(
        self, data: Mapping[str, Any], file: str, path: str = "", entity_id: int | None = None
    ) -> None:
        self.data = data
        self.file = file
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

    def refuse(self, key: str, what: str) -> NoReturn:
        """Raise :class:`Unsupported` for the value of ``key``."""
        raise self.error(Unsupported, key, f"{what} is not supported", value=self.data.get(key))

    def _get(self, key: str, default: Any, wanted: str) -> Any:
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.error(SchemaViolation, key, f"is required: {wanted}", expected=wanted)
            return default
        return value

    def _wrong_type(self, key: str, value: Any, wanted: str) -> CaseError:
        return self.error(
            SchemaViolation, key, f"must be {wanted}, not {value!r}", value=value, expected=wanted
        )

    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        minimum: float | None = None,
        above: float | None = None,
        maximum: float | None = None,
    ) -> float:
        """Return a finite float; an absent field gives ``default`` unchecked."""
        value = self._get(key, default, "a number")
        if value is default and key not in self:
            return value  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong_type(key, value, "a number")
        result = float(value)
        expected = None
        if not math.isfinite(result):
            expected = "a finite number"
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

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """Return a string."""
        value = self._get(key, default, "a text")
        if value is not default and not isinstance(value, str):
            raise self._wrong_type(key, value, "a text")
        return value  # type: ignore[no-any-return]

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self._wrong_type(key, value, "true or false")
        return value

    def choice(
        self,
        key: str,
        allowed: tuple[str, ...],
        default: Any = _REQUIRED,
        *,
        unsupported: tuple[str, ...] = (),
    ) -> str:
        """Return one of ``allowed``; the words in ``unsupported`` are refused as such."""
        value = self.text(key, default)
        if value in unsupported:
            self.refuse(key, f"{value!r}")
        if value not in allowed:
            wanted = "one of " + ", ".join(allowed)
            raise self.error(
                SchemaViolation,
                key,
                f"must be {wanted}, not {value!r}",
                value=value,
                expected=wanted,
            )
        return value

    def date(self, key: str) -> datetime.date:
        """Return an ISO date."""
        value = self.text(key)
        try:
            return datetime.date.fromisoformat(value)
        except ValueError:
            raise self._wrong_type(key, value, "a date like 2024-01-31") from None

    def record(self, key: str, *, required: bool = True) -> Record:
        """Return a nested object; an absent optional one counts as empty."""
        value = self._get(key, _REQUIRED if required else {}, "an object")
        if not isinstance(value, dict):
            raise self._wrong_type(key, value, "an object")
        return Record(value, self.file, f"{self.path}.{key}" if self.path else key, self.entity_id)

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
            if not isinstance(item, dict):
                raise self._wrong_type(f"{key}[{i}]", item, "an object")
            result.append(Record(item, self.file, f"{path}[{i}]", self.entity_id))
        return result

    def numbers(self, key: str, default: Any = _REQUIRED) -> tuple[float, ...]:
        """Return a list of finite floats."""
        values = self.items(key, default)
        cells = Record(
            {f"{key}[{i}]": value for i, value in enumerate(values)},
            self.file,
            self.path,
            self.entity_id,
        )
        return tuple(cells.number(name) for name in cells.data)

    def reference(self, key: str, positions: Mapping[int, int], what: str) -> int:
        """Return the position of the entity whose id stands in ``key``."""
        value = self.integer(key)
        if value not in positions:
            raise self.error(
                MissingReference,
                key,
                f"there is no {what} with id {value}",
                value=value,
                expected=f"the id of a {what}",
            )
        return positions[value]


def identified(document: Record, key: str) -> list[Record]:
    """Return the objects of list ``key`` sorted by their ``id``, each knowing its id."""
    records = document.records(key)
    seen: set[int] = set()
    for record in records:
        record.entity_id = record.integer("id")
        if record.entity_id in seen:
            raise record.error(
                SchemaViolation,
                "id",
                f"the id {record.entity_id} occurs twice",
                value=record.entity_id,
                expected="distinct ids",
            )
        seen.add(record.entity_id)
    return sorted(records, key=lambda record: record.entity_id or 0)


def rows(table: Mapping[str, list[Any]], file: str, required: tuple[str, ...]) -> Iterator[Record]:
    """Yield the rows of a table as records; an absent required column is an error."""
    for column in required:
        if column not in table:
            raise SchemaViolation(
                f"{file}: the column {column!r} is missing",
                context={"file": file, "field": column, "expected": ", ".join(required)},
            )
    names = list(table)
    for i, values in enumerate(zip(*table.values(), strict=True)):
        yield Record(dict(zip(names, values, strict=True)), file, f"row {i}")
