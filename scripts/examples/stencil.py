"""Heat on a plate: one array for all ranks, and barriers inside a numba function.

    python -m cobre_shm.spawn -n 4 stencil.py

Two shared regions hold the temperatures of this step and the next. Every rank works on its rows
and reads its neighbours' edge rows where they are: nothing is sent, no halo is copied. One
barrier a step is enough: within a step one array is only read and the other only written, and a
rank changes their roles when all have ended the step.
"""

import numba
import numpy as np

import cobre_shm
from cobre_shm import jit

ROWS, COLUMNS, STEPS = 202, 300, 500


@numba.njit
def step(before, after, first, last):
    """One step of explicit Euler on rows first..last-1; the border keeps its temperature."""
    for i in range(first, last):
        for j in range(1, before.shape[1] - 1):
            around = before[i - 1, j] + before[i + 1, j] + before[i, j - 1] + before[i, j + 1]
            after[i, j] = before[i, j] + 0.2 * (around - 4 * before[i, j])


@numba.njit
def sweep(handle, plate, other, first, last, steps):
    """Run all steps; return the status of the last barrier."""
    for _ in range(steps):
        step(plate, other, first, last)
        status = jit.barrier(handle)
        if status:
            return status  # a peer is gone, or ^C: jit.check() says what
        plate, other = other, plate
    return jit.OK


def heat_edges(plate):
    """Make two edges warm."""
    plate[0, :] = 100.0
    plate[:, 0] = 50.0


def main():
    """Compute on all ranks; compare with one rank doing everything."""
    with cobre_shm.create_communicator() as comm:
        plate = comm.create_shared_region((ROWS, COLUMNS), np.float64)
        other = comm.create_shared_region((ROWS, COLUMNS), np.float64)
        if comm.is_leader:
            heat_edges(plate.array)
            heat_edges(other.array)
        plate.fence()
        other.fence()

        inner = ROWS - 2
        first = 1 + comm.rank * inner // comm.size
        last = 1 + (comm.rank + 1) * inner // comm.size
        status = sweep(jit.handle(comm), plate.array, other.array, first, last, STEPS)
        jit.check(comm, status)

        if comm.is_leader:
            one, two = np.zeros((ROWS, COLUMNS)), np.zeros((ROWS, COLUMNS))
            heat_edges(one)
            heat_edges(two)
            for _ in range(STEPS):
                step(one, two, 1, ROWS - 1)
                one, two = two, one
            result = plate.array if STEPS % 2 == 0 else other.array
            assert np.array_equal(result, one), "not the bits of one rank"
            print(f"{comm.size} rank(s), {STEPS} steps: {result[10, 10]:.4f}")


main()
