"""What is wrong with a case, collected so that it can be reported all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cobre_shm.sddp.errors import CaseError

# Of one file; a table with a mistake in every row tells nothing more by the next one.
_LISTED = 100


class Findings:
    """The mistakes of a case in the order they were found, the first hundred of each file.

    A reader that finds one adds it and goes on with a value that leads to no further finding;
    nothing is built from a case with findings. All of them count; for those of a file that are not
    kept the last ones tell how many they are.
    """

    def __init__(self) -> None:
        self._errors: list[CaseError] = []
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def __iter__(self) -> Iterator[CaseError]:
        yield from self._errors
        for file, count in self._counts.items():
            if count > _LISTED:
                yield CaseError(
                    f"{file}: and {count - _LISTED:,} more findings", context={"file": file}
                )

    def add(self, error: CaseError) -> None:
        """Take note of a mistake."""
        file = str(error.context.get("file", ""))
        self._counts[file] += 1
        if self._counts[file] <= _LISTED:
            self._errors.append(error)

    def check(self) -> None:
        """Raise the first mistake, if there is one; it tells how many there are.

        Raises:
            CaseError: As found.
        """
        if not self._errors:
            return
        first, others = self._errors[0], len(self) - 1
        if others:
            more = f"The case has {others} more {'finding' if others == 1 else 'findings'}; "
            more += "'python -m cobre_shm.sddp validate CASE' lists all"
            advice = [first.suggestion] if first.suggestion else []
            raise type(first)(
                first.message, context=first.context, suggestion=". ".join([*advice, more])
            ) from first
        raise first
