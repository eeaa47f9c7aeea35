"""The square root of a symmetric matrix, with the same bits on every machine.

LAPACK's eigenvectors depend on the processor and on the number of threads, which is another for
each number of ranks. Here the order of all arithmetic is fixed: numpy multiplies and adds arrays
element by element, and what is summed is summed by a loop.

Source: G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th edition (2013), 8.5: the cyclic
Jacobi method in the parallel ordering of 8.5.5, with the threshold of 8.5.4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

# Several times what is needed: convergence is quadratic, ten sweeps do for hundreds of rows.
_MAX_SWEEPS = 60
_EPSILON = float(np.finfo(np.float64).eps)


def symmetric_root(matrix: Floats) -> Floats:
    """Return the symmetric square root; eigenvalues below zero count as zero.

    Args:
        matrix: float64, symmetric; what is above the diagonal is not looked at.
    """
    root = np.zeros_like(matrix)
    for value, vector in zip(*_eigen(matrix), strict=True):
        if value > 0.0:
            root += np.sqrt(value) * (vector[:, None] * vector)
    return root


def _eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Return the eigenvalues and, as rows, the eigenvectors."""
    rest = np.tril(matrix) + np.tril(matrix, -1).T
    vectors = np.eye(len(rest))
    rounds = _rounds(len(rest))
    for _ in range(_MAX_SWEEPS):
        # What is below this is rounding.
        negligible = _EPSILON * np.abs(rest.diagonal()).max()
        is_diagonal = True
        for p, q in rounds:
            chosen = np.abs(rest[p, q]) > negligible
            if not chosen.any():
                continue
            is_diagonal = False
            p, q = p[chosen], q[chosen]
            c, s = _rotations(rest[p, p], rest[q, q], rest[p, q])
            _rotate(rest, p, q, c, s)
            _rotate(rest.T, p, q, c, s)
            rest[p, q] = rest[q, p] = 0.0
            _rotate(vectors, p, q, c, s)
        if is_diagonal:
            break
    return rest.diagonal(), vectors


def _rounds(size: int) -> list[tuple[Indices, Indices]]:
    """Return every pair of rows once, in rounds of pairs without a common row.

    As in a tournament: one stays where it is, the others go round the table.
    """
    seats = np.arange(size + size % 2)
    half = len(seats) // 2
    rounds = []
    for _ in range(len(seats) - 1):
        one, other = seats[:half], seats[: half - 1 : -1]
        # Of an odd number the one without an opponent rests.
        plays = np.maximum(one, other) < size
        rounds.append((np.minimum(one, other)[plays], np.maximum(one, other)[plays]))
        seats = np.concatenate([seats[:1], seats[-1:], seats[1:-1]])
    return rounds


def _rotations(pp: Floats, qq: Floats, pq: Floats) -> tuple[Floats, Floats]:
    """Return cosine and sine that take ``pq``, which is not zero, to zero (algorithm 8.5.1)."""
    with np.errstate(over="ignore"):
        tau = (qq - pp) / (2.0 * pq)
        tangent = np.copysign(1.0, tau) / (np.abs(tau) + np.sqrt(1.0 + tau * tau))
    cosine = 1.0 / np.sqrt(1.0 + tangent * tangent)
    return cosine[:, None], (cosine * tangent)[:, None]


def _rotate(rows: Floats, p: Indices, q: Indices, c: Floats, s: Floats) -> None:
    one, other = rows[p], rows[q]
    rows[p] = c * one - s * other
    rows[q] = s * one + c * other
