"""Richardson iteration, with another method for the systems on which it is slow."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from solvers._solution import Status
from solvers.linear.gmres import GMRES
from solvers.linear.linear_solver import LinearResult, LinearSolver, require_tolerances, tolerance_of
from solvers.linear.operator import FlatMatvec
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import FLOOR, relative, rms_norm

# The largest rate of a fast step.
MAX_RATE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Richardson(LinearSolver):
    """``x <- x + r, r <- r - A r`` from x = 0, r = b, as long as each step shrinks the residual r fast.

    With A = I - J', as in the implicit backward pass, r runs through the terms of the Neumann series of a contraction.
    A step is one product with A and three passes over vectors, and the residual needs no other product: where the map
    contracts fast nothing is cheaper. (The residual does not see rounding in the products.) A system whose residual
    shrinks by less than ``max_rate`` in some step goes over to ``otherwise``, from where it is. What is returned is one
    step ahead of the reported residual.

    Args:
        max_steps: Most steps in all, before ``otherwise``.
        rtol: A sample is done when ``norm(b - A x) <= atol + rtol * norm(b)`` in the root mean square norm. None means
            a tenth of the relative tolerance of the solve whose derivative is computed, and ``eps ** 0.75`` of the
            dtype in a linear solve by itself or after a solve without a relative tolerance. It also holds
            for ``otherwise``, whatever its own tolerances.
        atol: Absolute tolerance.
        max_rate: A step is fast when the residual's norm after it is at most this many times that before. None means
            0.5, near which a Krylov method begins to save enough products to pay for its own work; and 0.8 where the
            steps are compiled, which makes them cheaper. Then what is left after ``max_steps`` counts as slow too.
        otherwise: The linear solver for the slow systems.

    References:
        Saad, "Iterative methods for sparse linear systems", SIAM (2003), section 4.2.1.
    """

    is_series: ClassVar[bool] = True

    max_steps: int = 100
    rtol: float | None = None
    atol: float = 0.0
    max_rate: float | None = None
    otherwise: LinearSolver = GMRES()  # noqa: RUF009

    def __post_init__(self) -> None:
        require_positive_int(self, "max_steps", self.max_steps)
        require_tolerances(self, self.rtol, self.atol)
        if self.max_rate is not None and not 0 <= self.max_rate < 1:
            raise ValueError(f"Richardson(max_rate=...) must be in [0, 1), got {self.max_rate!r}.")
        if not isinstance(self.otherwise, LinearSolver):
            raise TypeError(f"Richardson(otherwise=...) must be a linear solver, got {self.otherwise!r}.")

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        norm_b = rms_norm(b)  # (B,), as everything here but x and r
        if tolerance is None:
            tolerance = tolerance_of(self.rtol, self.atol, norm_b)
        done = self.series(matvec, b, tolerance)
        x, r, error, slow = done.x, done.r, done.error, done.slow
        # Rounding in x, which the recurrence does not see.
        error = torch.maximum(error, torch.finfo(x.dtype).eps * rms_norm(x))
        met = (error <= tolerance) & error.isfinite()
        slow = slow & ~met
        status = torch.where(done.running, Status.MAX_STEPS, Status.STAGNATED)
        # One step ahead where that was fast: it needs no product.
        result = LinearResult(
            x=torch.where(slow.unsqueeze(1), x, x + r),
            status=status.masked_fill(met, Status.CONVERGED).to(torch.int8),
            residual=relative(error, norm_b),
            num_steps=done.num_steps,
            history=done.history,
            num_compiled=done.num_compiled,
        )
        if not bool(slow.any()):
            return result.settled()
        found = self.otherwise.run(matvec, torch.where(slow.unsqueeze(1), r, 0.0), tolerance)
        result = result.continued(slow, found, result.x, result.residual)
        # What was summed up before no longer tells the residuals if the operator mixes samples.
        true = rms_norm(b - matvec(result.x))
        rounding = FLOOR * torch.finfo(x.dtype).eps * (norm_b + rms_norm(result.x))
        off = (result.status == Status.CONVERGED) & (true > 2 * tolerance + rounding)
        result.status = result.status.masked_fill(off, Status.STAGNATED)
        result.residual = torch.where(off, relative(true, norm_b), result.residual)
        return result.settled()

    def series(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor) -> "Series":
        """The steps, until all samples have met their tolerances (B,) or are slow."""
        x, r, error = torch.zeros_like(b), b, rms_norm(b)
        slow = ~error.isfinite()
        running = (error > tolerance) & ~slow
        num_steps = torch.zeros_like(error, dtype=torch.int64)
        max_rate = MAX_RATE if self.max_rate is None else self.max_rate
        norm_b = error
        history: list[Tensor] = []
        all_running = len(b) > 0 and bool(running.all())
        while len(history) < self.max_steps and (all_running or bool(running.any())):
            next_r = r - matvec(r if all_running else torch.where(running.unsqueeze(1), r, 0.0))
            next_error = rms_norm(next_r)
            # A nan compares false: that step is not fast, and not taken.
            fast = next_error <= max_rate * error
            goes_on = fast & (next_error > tolerance)
            num_steps = num_steps + running
            all_running = all_running and bool(goes_on.all())
            if all_running:
                x, r, error = x + r, next_r, next_error
            else:
                taken = running & (next_error < error)
                # A sample that is done takes no step. If that of others changes its residual, the operator mixes them.
                done = (running | slow) < next_error.isfinite()
                x = torch.where(taken.unsqueeze(1), x + r, x)
                r = torch.where((taken | done).unsqueeze(1), next_r, r)
                error = torch.where(taken | done, next_error, error)
                slow = slow | (running & ~fast)
                running = (running & goes_on) | (done & (next_error > 2 * tolerance))
            history.append(relative(error, norm_b))
        shown = torch.stack(history) if history else norm_b.new_zeros(0, norm_b.shape[0])
        return Series(x, r, error, running, slow, num_steps, shown)


@dataclasses.dataclass
class Series:
    """Where the steps have led.

    Attributes:
        x: (B, D).
        r: (B, D) the residual ``b - A x``.
        error: (B,) its root mean square.
        running: (B,) bool, the samples that are still at it.
        slow: (B,) bool, those that are too slow.
        num_steps: (B,) int64.
        history: (steps, B).
        num_compiled: How many products were computed in compiled code.
    """

    x: Tensor
    r: Tensor
    error: Tensor
    running: Tensor
    slow: Tensor
    num_steps: Tensor
    history: Tensor
    num_compiled: int = 0
