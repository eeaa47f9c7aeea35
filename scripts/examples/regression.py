"""Logistic regression on data that is spread over the ranks: numpy and ``allreduce``.

    python regression.py                                  # alone
    python -m cobre_shm.spawn -n 4 regression.py          # shared memory
    python -m cobre_shm.spawn --backend tcp -n 4 regression.py
    mpiexec -n 4 python regression.py                     # MPI

Every rank makes its rows from a seed of their own, so the data does not depend on the number of
ranks. Newton's method needs the gradient and the Hessian of the sum over all rows: one allreduce
of 30 numbers an iteration, whatever the number of rows. All ranks get the same bits, so they take
the same steps and stop together without another word.
"""

import numpy as np

import cobre_shm

BLOCKS, ROWS, FEATURES = 24, 5_000, 5
TRUTH = np.array([0.5, -1.0, 2.0, 0.0, 1.5])


def make_block(number):
    """Return the rows of one block, and which of them came out true."""
    random = np.random.default_rng(number)
    rows = random.normal(size=(ROWS, FEATURES))
    return rows, random.random(ROWS) < 1 / (1 + np.exp(-rows @ TRUTH))


def main():
    """Fit, and compare with what made the data."""
    with cobre_shm.create_communicator() as comm:
        mine = [make_block(number) for number in range(comm.rank, BLOCKS, comm.size)]
        if not mine:
            mine = [(np.empty((0, FEATURES)), np.empty(0))]
        rows = np.concatenate([block[0] for block in mine])
        outcome = np.concatenate([block[1] for block in mine])

        beta = np.zeros(FEATURES)
        sums = comm.empty(FEATURES + FEATURES * FEATURES)  # travels often: a shared array
        steps = [np.inf]
        while steps[-1] > 1e-10:
            chance = 1 / (1 + np.exp(-rows @ beta))
            sums[:FEATURES] = rows.T @ (outcome - chance)
            sums[FEATURES:] = ((rows.T * (chance * (1 - chance))) @ rows).ravel()
            comm.allreduce(sums, sums)
            step = np.linalg.solve(sums[FEATURES:].reshape(FEATURES, FEATURES), sums[:FEATURES])
            beta += step
            steps.append(np.abs(step).max())
            assert len(steps) < 25, steps

        # The error of the estimate is a few of its standard deviations, which the Hessian gives.
        deviation = np.sqrt(np.diag(np.linalg.inv(sums[FEATURES:].reshape(FEATURES, FEATURES))))
        assert np.all(np.abs(beta - TRUTH) < 4 * deviation), (beta, deviation)
        everybody = comm.allgatherv(beta).reshape(comm.size, FEATURES)
        assert np.array_equal(everybody, np.tile(beta, (comm.size, 1))), "ranks differ"
        if comm.rank == 0:
            print(f"{comm.size} rank(s) over {comm.backend}: {len(steps) - 1} iterations")
            print("beta", *(f"{value:.6f}" for value in beta))


main()
