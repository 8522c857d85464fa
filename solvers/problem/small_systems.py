"""Triangular systems of a few unknowns, one for each sample, in batched tensor operations.

An unknown whose pivot is too small to divide by is set to 0.
"""

import math

import torch
from torch import Tensor


def inverse_or_zero(x: Tensor, threshold: float | Tensor) -> Tensor:
    """``1 / x`` where ``|x| > threshold``, else 0. The gradient is finite everywhere."""
    return torch.where(x.abs() > threshold, x, math.inf).reciprocal()


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
