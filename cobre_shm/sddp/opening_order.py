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


def opening_order(inflow: npt.NDArray[np.float64], start: int) -> list[int]:
    """Return all openings, each once: ``start``, the nearer end of the row, the other end.

    Args:
        inflow: float64, (openings, hydro plants), in m3/s.
        start: The opening to begin with.
    """
    # Summed in order: another order may round differently, and then sort differently.
    total = ordered_sum(inflow.T) if inflow.shape[1] else np.zeros(len(inflow))
    row = np.argsort(total, kind="stable").tolist()
    place = row.index(start)
    sides = row[:place][::-1], row[place + 1 :]
    return [start, *min(sides, key=len), *max(sides, key=len)]
