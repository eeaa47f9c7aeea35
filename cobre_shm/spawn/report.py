"""Which rank decides the exit code, and how that is told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cobre_shm.errors import RankFailed
from cobre_shm.spawn.rank import Rank

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """The failure of a run.

    Attributes:
        rank: The rank that failed first.
        what: What it did, as the rest of a sentence.
        code: Exit code of the run.
    """

    rank: Rank
    what: str
    code: int

    def to_text(self, size: int, table: Sequence[str], last_lines: Iterable[bytes]) -> bytes:
        """Return the block that ends a failed run's standard error.

        Args:
            size: Number of ranks.
            table: How all ranks ended, line by line.
            last_lines: The rank's last lines on its standard error, if they are to be repeated.
        """
        above = [line.encode() for line in table]
        if above:
            above.insert(0, b"cobre_shm.spawn: The run has failed:")
        head = f"cobre_shm.spawn: {self._sentence(size)}"
        ending = self.rank.ending
        if ending is None or ending.exit_code != self.code:
            head += f"; exit code {self.code}"
        lines = [b"  " + line for line in last_lines]
        if lines:
            head += ". The last lines of its standard error:"
        return b"\n".join([*above, head.encode(), *lines, b""])

    def to_json(self, size: int, last_lines: Iterable[bytes]) -> bytes:
        """Return the same as one line of JSON, in the form of every error."""
        ending = self.rank.ending
        error = RankFailed(
            self._sentence(size),
            rank=self.rank.number,
            pid=self.rank.pid,
            signal=ending.signal if ending else None,
            exit_code=ending.exit_code if ending else None,
            context={
                "size": size,
                "run_exit_code": self.code,
                "stderr": [line.decode(errors="backslashreplace") for line in last_lines],
            },
        )
        return json.dumps(error.to_dict()).encode() + b"\n"

    def _sentence(self, size: int) -> str:
        return f"Rank {self.rank.number} of {size} (pid {self.rank.pid}) {self.what}"


def judge(
    ranks: Sequence[Rank],
    first_failure: Rank | None,
    poisoned_by: int | None,
    abort_code: int | None,
) -> Verdict | None:
    """Return the failure that decides, or None when no rank failed.

    Args:
        ranks: All ranks that were started here, ended.
        first_failure: The rank that was the first seen to fail by itself.
        poisoned_by: The one of them that the group itself blames. If it failed, it decides,
            even when a rank that failed only because of it was reaped earlier.
        abort_code: What a rank passed to ``abort``.
    """
    if poisoned_by is not None:
        culprit = next(rank for rank in ranks if rank.number == poisoned_by)
        if abort_code is not None:
            return Verdict(culprit, f"called abort({abort_code})", abort_code)
        # Two kinds of culprit have no code to give: one that left early with 0, and one that was
        # slow to end and so was stopped by us.
        if culprit.ending is not None and culprit.ending.code != 0 and not culprit.was_stopped:
            first_failure = culprit
    if first_failure is None or first_failure.ending is None:
        return None
    what = str(first_failure.ending)
    if first_failure.cause:
        what += f": {first_failure.cause}"
    return Verdict(first_failure, what, first_failure.ending.code)
