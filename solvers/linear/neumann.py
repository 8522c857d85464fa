"""The truncated Neumann series."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from solvers._solution import Status
from solvers.linear.linear_solver import LinearResult, LinearSolver
from solvers.linear.operator import FlatMatvec
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import relative, rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeumannSeries(LinearSolver):
    """``sum_{i < terms} (I - A)^i b``, the Neumann series of ``A^-1 b``, cut off by choice.

    With A = I - J', as in the implicit backward pass, the terms are the powers of J': ``terms`` steps of Picard
    iteration on ``u = J' u + b`` from zero. Costs ``terms - 1`` products with A and no decision on the way. The error
    shrinks like |J|^terms, so that few terms do where the map contracts fast; it does not converge where it expands.
    The status is UNTESTED, so no warning; the residual is that of the sum without its last term, and is free.

    Args:
        terms: How many terms to sum. 1 returns ``b``.

    References:
        Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS
        (2020), section 4.
    """

    tested: ClassVar[bool] = False
    is_series: ClassVar[bool] = True

    terms: int = 10

    def __post_init__(self) -> None:
        require_positive_int(self, "terms", self.terms)

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        norm_b = rms_norm(b)
        term, total = b, b
        history = [relative(norm_b, norm_b)]
        for _ in range(self.terms - 1):
            term = term - matvec(term)
            total = total + term
            history.append(relative(rms_norm(term), norm_b))
        return LinearResult(
            x=total,
            status=torch.full_like(norm_b, Status.UNTESTED, dtype=torch.int8),
            residual=history[-1],
            num_steps=torch.full_like(norm_b, self.terms, dtype=torch.int64),
            history=torch.stack(history),
        )
