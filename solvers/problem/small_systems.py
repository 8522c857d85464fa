"""Triangular systems of a few unknowns, one for each sample, in batched tensor operations.

An unknown whose pivot is too small to divide by is set to 0.
"""

import math

import torch
from torch import Tensor

# Unknowns up to which a compiled elimination is written out: the code grows with their third power.
MOST_UNROLLED = 10


def inverse_or_zero(x: Tensor, threshold: float | Tensor) -> Tensor:
    """``1 / x`` where ``|x| > threshold``, else 0. The gradient is finite everywhere."""
    return torch.where(x.abs() > threshold, x, math.inf).reciprocal()


def solve_positive_definite(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve ``matrix x = rhs`` for positive definite matrices (B, n, n) and right-hand sides (B, n, 1).

    What torch.compile traces of it, for few unknowns, is elimination in elementwise operations, which become part of
    the loop over the batch; a call of a library for each sample takes longer than the arithmetic.
    """
    n = matrix.shape[1]
    if torch.compiler.is_compiling() and n <= MOST_UNROLLED:
        return _eliminated(matrix, rhs)
    factor: Tensor = torch.linalg.cholesky_ex(matrix)[0]  # does not check its result, which would wait for the device
    if matrix.is_cuda:
        # What torch.cholesky_solve calls for batches waits for the device, and so no CUDA graph can hold it.
        halfway = torch.linalg.solve_triangular(factor, rhs, upper=False)
        solution: Tensor = torch.linalg.solve_triangular(factor.mT, halfway, upper=True)
    else:
        solution = torch.cholesky_solve(rhs, factor)
    return solution


def _eliminated(matrix: Tensor, rhs: Tensor) -> Tensor:
    """The same by Gaussian elimination, which needs no pivots here, on numbers (B,)."""
    n = matrix.shape[1]
    rows = [[matrix[:, i, j] for j in range(i, n)] for i in range(n)]  # the upper triangle
    x = list(rhs.squeeze(2).unbind(1))
    inverse = []
    for k in range(n):
        inverse.append(rows[k][0].reciprocal())
        for i in range(k + 1, n):
            factor = rows[k][i - k] * inverse[k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k][i - k :], strict=True)]
            x[i] = x[i] - factor * x[k]
    for k in reversed(range(n)):
        for j in range(k + 1, n):
            x[k] = x[k] - rows[k][j - k] * x[j]
        x[k] = x[k] * inverse[k]
    return torch.stack(x, dim=1).unsqueeze(2)


def back_substitute(rows: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Solve upper-triangular systems given by their rows, the first unknown's row first.

    Args:
        rows: For unknown i of n: the inverse of the pivot (B, 1), or 0 to set the unknown to 0; the entries to the
            right of the pivot (B, n - i - 1); the right-hand side (B, 1).

    Returns:
        (B, n) solutions.
    """
    solution = rows[-1][1]  # (B, 0)
    for inverse, row, value in reversed(rows):
        x = inverse * (value - (row * solution).sum(dim=1, keepdim=True))
        solution = torch.cat((x, solution), dim=1)
    return solution
