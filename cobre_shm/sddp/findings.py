"""What is wrong with a case, collected so that it can be reported all at once."""

from __future__ import annotations

from collections.abc import Iterator

from cobre_shm.sddp.errors import CaseError


class Findings:
    """The mistakes of a case in the order they were found.

    A reader that finds one adds it and goes on with a value that leads to no further finding;
    nothing is built from a case with findings.
    """

    def __init__(self) -> None:
        self._errors: list[CaseError] = []

    def __len__(self) -> int:
        return len(self._errors)

    def __iter__(self) -> Iterator[CaseError]:
        return iter(self._errors)

    def add(self, error: CaseError) -> None:
        """Take note of a mistake."""
        self._errors.append(error)

    def check(self) -> None:
        """Raise the first mistake, if there is one; it tells how many there are.

        Raises:
            CaseError: As found.
        """
        if not self._errors:
            return
        first, others = self._errors[0], len(self._errors) - 1
        if others:
            more = f"The case has {others} more {'finding' if others == 1 else 'findings'}; "
            more += "'python -m cobre_shm.sddp validate CASE' lists all"
            advice = [first.suggestion] if first.suggestion else []
            raise type(first)(
                first.message, context=first.context, suggestion=". ".join([*advice, more])
            ) from first
        raise first
