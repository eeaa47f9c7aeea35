"""How each rank of a group is, or ended: one line for all ranks of which the same is to be said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cobre_shm.spawn.binding import format_numbers
from cobre_shm.spawn.rank import Rank

if TYPE_CHECKING:
    from cobre_shm.spawn.meeting import Progress

__all__ = ["table_of_ranks"]

_HEAD = ("RANKS", "STATE", "LAST COLLECTIVE")


def table_of_ranks(progress: Progress | None, ranks: Sequence[Rank]) -> list[str]:
    """Return the lines of a table: which ranks, code or signal, last collective.

    Args:
        progress: Of all ranks; None: there is nothing to say about collectives.
        ranks: Those to be told about.
    """
    alike: dict[tuple[str, str], list[int]] = {}
    for rank in ranks:
        last = "" if progress is None else str(progress.last[rank.number] or "none")
        alike.setdefault((_state(rank), last), []).append(rank.number)
    head = _HEAD if progress is not None else (*_HEAD[:2], "")
    rows = [head, *((format_numbers(numbers), *what) for what, numbers in alike.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [
        f"  {numbers.rjust(widths[0])}  {state.ljust(widths[1])}  {last}".rstrip()
        for numbers, state, last in rows
    ]


def _state(rank: Rank) -> str:
    if rank.ending is None:
        from cobre_shm.segment.process import state_of

        return state_of(rank.pid)
    if rank.was_stopped:
        return f"stopped by the launcher ({rank.ending.short})"
    return rank.ending.short
