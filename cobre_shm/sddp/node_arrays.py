"""Arrays that live once per machine: its ranks make them together, then only read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cobre_shm.communicator import Communicator
from cobre_shm.sddp.case import Case
from cobre_shm.sddp.layout import StageLp
from cobre_shm.sddp.noise_bounds import NoiseBounds, noise_bounds
from cobre_shm.sddp.scenarios import copy_common_noise, draw_noise, noise_components

Floats = npt.NDArray[np.float64]


class NodeArrays:
    """Makes arrays for the ranks of a node. Construction and all methods are collective."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        with comm.split_local() as node:
            self._rank, self._size = node.rank, node.size

    def make(
        self,
        shape: tuple[int, int],
        fill: Callable[[Floats, range], None],
        finish: Callable[[Floats], None] | None = None,
    ) -> Floats:
        """Return a read-only float64 array.

        Args:
            shape: Its shape.
            fill: Writes the rows of a range, of which every rank of the node gets another.
            finish: Called by one rank of the node when all rows are there.

        Raises:
            AllocationFailed: The memory is not there; on every rank.
        """
        count = shape[0]
        mine = range(count * self._rank // self._size, count * (self._rank + 1) // self._size)
        with self._comm.create_shared_region(shape) as region:
            fill(region.array, mine)
            if finish is not None:
                region.fence()
                if self._comm.is_leader:
                    finish(region.array)
            region.freeze()
            array: Floats = region.array[:]
        # The leader may write to what is frozen. The memory goes with the last view of it.
        array.flags.writeable = False
        return array

    def opening_tree(self, case: Case) -> list[Floats]:
        """Return the noise of every opening: per stage float64 (openings, components).

        It depends on nothing but the case: the same for any number of ranks.
        """
        statistics, horizon = case.statistics, case.horizon
        if statistics.openings is not None:
            return list(statistics.openings)
        ends = _ends([stage.openings for stage in horizon.stages])

        def fill(values: Floats, rows: range) -> None:
            for t, (first, end) in enumerate(pairwise(ends)):
                openings = range(max(rows.start, first) - first, min(rows.stop, end) - first)
                noise = values[first:end]
                draw_noise(noise, openings, statistics, horizon, t, case.config.tree_seed)

        shape = ends[-1], noise_components(statistics, len(case.hydros))
        finish = lambda values: copy_common_noise(_split(values, ends), horizon)  # noqa: E731
        return _split(self.make(shape, fill, finish), ends)

    def noise_bounds(
        self, case: Case, lp: StageLp, noise: Floats, *, mean_load: bool = False
    ) -> NoiseBounds:
        """Return what :func:`cobre_shm.sddp.noise_bounds.noise_bounds` returns."""
        parts = _distinct(noise_bounds(case, lp, noise[:1], mean_load=mean_load))
        ends = _ends([part.shape[1] for part in parts.values()])

        def fill(values: Floats, rows: range) -> None:
            own = noise[rows.start : rows.stop]
            made = _distinct(noise_bounds(case, lp, own, mean_load=mean_load))
            for part, target in zip(made.values(), _columns(values, ends), strict=True):
                target[rows.start : rows.stop] = part

        # Each part's rows lie together, as the solver takes them.
        values = self.make((len(noise), ends[-1]), fill)
        shared = dict(zip(parts, _columns(values, ends), strict=True))
        return NoiseBounds(
            lower=shared["lower"],
            upper=shared.get("upper", shared["lower"]),
            inflow_noise=shared.get("inflow_noise"),
        )


def share_openings(case: Case, comm: Communicator) -> Case:
    """Return the case with the user's opening tree, if it has one, once per node. Collective."""
    given = case.statistics.openings
    if given is None:
        return case
    ends = _ends([len(noise) for noise in given])

    def fill(values: Floats, rows: range) -> None:
        for noise, target, first in zip(given, _split(values, ends), ends, strict=False):
            openings = slice(max(0, rows.start - first), max(0, rows.stop - first))
            target[openings] = noise[openings]

    values = NodeArrays(comm).make((ends[-1], given[0].shape[1]), fill)
    return replace(case, statistics=replace(case.statistics, openings=tuple(_split(values, ends))))


def _ends(counts: Sequence[int]) -> list[int]:
    """Return where blocks of so many begin, and where the last one ends."""
    return [0, *np.cumsum(counts).tolist()]


def _split(values: Floats, ends: Sequence[int]) -> list[Floats]:
    return [values[first:end] for first, end in pairwise(ends)]


def _columns(values: Floats, ends: Sequence[int]) -> list[Floats]:
    """Return the parts of memory that hold ``ends`` columns, each C-contiguous."""
    rows, flat = len(values), values.reshape(-1)
    return [
        flat[rows * first : rows * end].reshape(rows, end - first) for first, end in pairwise(ends)
    ]


def _distinct(bounds: NoiseBounds) -> dict[str, Floats]:
    parts = {"lower": bounds.lower}
    if bounds.upper is not bounds.lower:
        parts["upper"] = bounds.upper
    if bounds.inflow_noise is not None:
        parts["inflow_noise"] = bounds.inflow_noise
    return parts
