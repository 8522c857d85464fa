"""Systems of a few unknowns, one for each of possibly thousands of samples.

LAPACK's batched routines loop over the samples on the CPU and raise on a singular one; these are a few tensor
operations over the whole batch and leave an unknown at 0 where its pivot is unusable.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_or_zero(x: Tensor, threshold: float | Tensor) -> Tensor:
    """``1 / x`` where ``|x| > threshold``, else 0. The gradient is finite everywhere."""
    return torch.where(x.abs() > threshold, x, math.inf).reciprocal()


def eliminate(matrix: Tensor, rhs: Tensor, order: Sequence[int], threshold: float) -> Tensor:
    """Solve symmetric positive semi-definite systems by Gauss-Jordan elimination, pivoting in the given order.

    A pivot of at most ``threshold`` means that its unknown depends on the earlier ones; it is left at 0.

    Args:
        matrix: (B, n, n).
        rhs: (B, n).
        order: The unknowns, the first one to be a pivot first.
        threshold: Compared with the pivots as they come up.

    Returns:
        (B, n) solutions.
    """
    table = torch.cat((matrix, rhs.unsqueeze(2)), dim=2)  # (B, n, n + 1)
    others = 1 - torch.eye(len(order), dtype=rhs.dtype, device=rhs.device)  # row i: all but the i-th
    inverses = [rhs] * len(order)
    for i in order:
        pivot = table[:, i, i : i + 1]  # (B, 1)
        inverses[i] = torch.where(pivot > threshold, pivot, math.inf).reciprocal()
        factors = table[:, :, i] * (inverses[i] * others[i])  # (B, n)
        table = torch.baddbmm(table, factors.unsqueeze(2), table[:, i : i + 1], alpha=-1)
    return table[:, :, -1] * torch.cat(inverses, dim=1)


def back_substitute(rows: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Solve upper-triangular systems given by their rows, the first unknown's row first.

    Args:
        rows: For unknown i of n: the inverse of the pivot (B, 1), or 0 to leave the unknown at 0; the entries to the
            right of the pivot (B, n - i - 1); the right-hand side (B, 1).

    Returns:
        (B, n) solutions.
    """
    solution = rows[-1][1]  # (B, 0)
    for inverse, row, value in reversed(rows):
        x = inverse * (value - (row * solution).sum(dim=1, keepdim=True))
        solution = torch.cat((x, solution), dim=1)
    return solution
