"""In which order the openings at a trial point are solved.

From one opening to the next only the noise changes, so the last basis is a good start where the
noise changes little. Openings are therefore sorted by their total inflow, and solved from the one
whose basis is known outwards. The order depends on the openings alone, so that every rank takes
the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cobre_shm.sddp.cuts import ordered_sum


def sorted_openings(inflow: npt.NDArray[np.float64]) -> list[int]:
    """Return the openings from the driest to the wettest.

    Args:
        inflow: float64, (openings, hydro plants), in m3/s.
    """
    # Summed in order: another order may round differently, and then sort differently.
    total = ordered_sum(inflow.T) if inflow.shape[1] else np.zeros(len(inflow))
    order: list[int] = np.argsort(total, kind="stable").tolist()
    return order


def groups(order: list[int], count: int) -> list[list[int]]:
    """Return ``order`` in at most ``count`` parts of neighbours, the longer ones first."""
    return [part.tolist() for part in np.array_split(order, min(count, len(order)))]


def outwards(order: list[int], start: int) -> list[int]:
    """Return all openings of ``order``: ``start``, then the shorter side, then the other one."""
    place = order.index(start)
    shorter, longer = sorted((order[:place][::-1], order[place + 1 :]), key=len)
    return [start, *shorter, *longer]
