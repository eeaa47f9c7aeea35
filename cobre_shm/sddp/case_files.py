"""The files of a case as records, with one list of findings for all of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

from cobre_shm.sddp.documents import Documents
from cobre_shm.sddp.errors import SchemaViolation
from cobre_shm.sddp.fields import Record
from cobre_shm.sddp.findings import Findings

# What a row without effect names.
UNKNOWN = "no entity or no stage of the case"
UNKNOWN_STAGE = "no stage of the case"


class CaseFiles:
    """What was read of a case directory.

    Attributes:
        findings: The mistakes found so far.
        warnings: What was read and has no effect, and what counts as zero for want of a value.
    """

    def __init__(self, documents: Documents, findings: Findings) -> None:
        self._documents = documents
        self.findings = findings
        self.warnings: list[str] = []
        self._skipped: Counter[tuple[str, str]] = Counter()

    def __contains__(self, file: str) -> bool:
        return file in self._documents

    def record(self, file: str) -> Record:
        """Return the object of a JSON file, empty where there is no such file.

        A required file that is absent is a finding already, and another is none: nothing that they
        lack is a finding, so that readers may require of a file what it must have where it exists.
        """
        if file in self._documents:
            return Record(self._documents[file], file, self.findings)
        return Record({}, file, Findings())

    def rows(self, file: str, required: tuple[str, ...]) -> Iterator[Record]:
        """Yield the rows of a table as records, none where there is no such file.

        A table without one of the ``required`` columns is a finding and has no rows.
        """
        table = self._documents.get(file)
        if table is None:
            return
        missing = [column for column in required if column not in table]
        for column in missing:
            self.findings.add(
                SchemaViolation(
                    f"{file}: the column {column!r} is missing",
                    context={"file": file, "field": column, "expected": ", ".join(required)},
                )
            )
        if missing:
            return
        names = list(table)
        for i, values in enumerate(zip(*table.values(), strict=True)):
            row = dict(zip(names, values, strict=True))
            yield Record(row, file, self.findings, f"row {i}")

    def skip(self, file: str, what: str, rows: int = 1) -> None:
        """Take note of rows of a file that have no effect, because they name ``what``."""
        self._skipped[file, what] += rows

    def skipped(self) -> Iterator[str]:
        """Tell of these rows, file by file."""
        for (file, what), rows in self._skipped.items():
            if rows:
                yield f"{file}: rows without effect, for they name {what}: {rows}"

    def count_rows(self, file: str) -> int:
        """Return how many rows a table has, none where there is no such file."""
        return len(next(iter(self._documents.get(file, {}).values()), ()))

    def data_digest(self) -> str:
        """Return a hash over every file but ``config.json``."""
        counted = {file: data for file, data in self._documents.items() if file != "config.json"}
        return digest_of(counted)

    def columns_with_values(self, file: str) -> set[str]:
        """Return the names of the columns of a table that are not null throughout."""
        table = self._documents.get(file, {})
        return {name for name in table if any(value is not None for value in table[name])}


def digest_of(value: object) -> str:
    """Return a hash over a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
