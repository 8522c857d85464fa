"""What Krylov methods share: cycles from the true residual until every system is done."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers._solution import ACTIVE, Status
from solvers.linear.linear_solver import LinearResult, LinearSolver, require_tolerances, tolerance_of
from solvers.linear.operator import FlatMatvec
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import relative, rms_norm


@dataclasses.dataclass(frozen=True)
class CycleLimits:
    """How far a cycle goes. Each sample has steps of its own, so that none is cut short by the cycles of others.

    Attributes:
        tolerance: (B,) the root mean square of the residual that is small enough.
        norm_b: (B,) that of the right-hand side.
        left: (B,) int64, how many steps a sample may take.
        most: The largest of these.
    """

    tolerance: Tensor
    norm_b: Tensor
    left: Tensor
    most: int

    def short(self, error: Tensor) -> Tensor:
        """(B,) bool: whether a residual as a method estimates it, ``error`` (B,), is too large.

        At a little below the tolerance, so that rounding in the true residual does not cost another cycle.
        """
        return error > 0.9 * self.tolerance

    def goes_on(self, error: Tensor, steps: Tensor) -> Tensor:
        """(B,) bool: whether a sample needs and has another step, after ``steps`` (B,) in this cycle."""
        return self.short(error) & (steps < self.left)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KrylovSolver(LinearSolver):
    """A method that runs in cycles, each from the residual ``b - A x`` computed anew.

    So the status and the residual do not rest on a recurrence, and rounding in one is mended by the next cycle.

    Args:
        max_steps: Most steps in all.
        rtol: A sample is done when ``norm(b - A x) <= atol + rtol * norm(b)`` in the root mean square norm. None means
            a tenth of the relative tolerance of the solve whose derivative is computed, and ``eps ** 0.75`` of the
            dtype in a linear solve by itself or after a solve without a relative tolerance.
        atol: Absolute tolerance.
        preconditioner: The product with an estimate of the inverse of A, of something like the state to something like
            the state.
    """

    max_steps: int = 100
    rtol: float | None = None
    atol: float = 0.0
    preconditioner: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        require_positive_int(self, "max_steps", self.max_steps)
        require_tolerances(self, self.rtol, self.atol)
        if not (self.preconditioner is None or callable(self.preconditioner)):
            raise TypeError(
                f"{type(self).__name__}(preconditioner=...) must be a function that multiplies by an estimate of the "
                f"inverse, or None, got {self.preconditioner!r}."
            )

    def preconditioned(self, r: Tensor) -> Tensor:
        """(B, D) the product of the preconditioner with ``r`` (B, D); r itself without one."""
        if self.preconditioner is None:
            return r
        product: Tensor = self.preconditioner(r)
        return product

    @abc.abstractmethod
    def cycle(
        self, matvec: FlatMatvec, r: Tensor, limits: CycleLimits, history: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce the residual ``r`` (B, D) as far as ``limits`` say; of zero rows nothing is asked.

        Appends a relative residual estimate (B,) a step to ``history``.

        Returns:
            The correction of x (B, D); (B,) bool, which samples broke down short of the tolerance; (B,) int64, the
            steps that each sample took.
        """

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        norm_b = rms_norm(b)  # (B,)
        if tolerance is None:
            tolerance = tolerance_of(self.rtol, self.atol, norm_b)
        x, r = torch.zeros_like(b), b
        error = norm_b
        status = torch.full_like(norm_b, ACTIVE, dtype=torch.int8)
        status = status.masked_fill(norm_b <= tolerance, Status.CONVERGED)
        status = status.masked_fill(~norm_b.isfinite(), Status.NONFINITE)
        num_steps = torch.zeros_like(norm_b, dtype=torch.int64)
        history: list[Tensor] = []
        while True:
            active = status == ACTIVE
            left = torch.where(active, self.max_steps - num_steps, 0)
            most = int(left.amax()) if len(b) else 0
            if not most:
                break
            # A finished sample joins the products with a zero vector and comes out with a zero correction.
            start = torch.where(active.unsqueeze(1), r, 0.0)
            limits = CycleLimits(tolerance, norm_b, left, most)
            correction, broken, steps = self.cycle(matvec, start, limits, history)
            candidate = x + correction
            new_r = b - matvec(candidate)
            new_error = rms_norm(new_r)
            improved = active & (new_error < error)
            x = torch.where(improved.unsqueeze(1), candidate, x)
            r = torch.where(improved.unsqueeze(1), new_r, r)
            num_steps = num_steps + torch.where(active, steps, 0)
            # The later line wins.
            status = status.masked_fill(active & ~(new_error < 0.999 * error), Status.STAGNATED)
            status = status.masked_fill(active & broken, Status.BREAKDOWN)
            status = status.masked_fill(active & ~new_error.isfinite(), Status.NONFINITE)
            error = torch.where(improved, new_error, error)
            status = status.masked_fill(active & (error <= tolerance), Status.CONVERGED)
            # A finished sample that is off again: the operator mixes samples.
            again = (status == Status.CONVERGED) & ~active & (new_error > 2 * tolerance)
            r, error = torch.where(again.unsqueeze(1), new_r, r), torch.where(again, new_error, error)
            status = status.masked_fill(again, ACTIVE)
            status = status.masked_fill((status == ACTIVE) & (num_steps >= self.max_steps), Status.MAX_STEPS)
        # A start of zero that nothing finite was found to improve on is no answer.
        lost = (status == Status.NONFINITE) & ~(error < norm_b)
        return LinearResult(
            x=x.masked_fill(lost.unsqueeze(1), math.nan),
            status=status,
            residual=relative(error, norm_b),
            num_steps=num_steps,
            history=torch.stack(history) if history else norm_b.new_zeros(0, norm_b.shape[0]),
        ).settled()
