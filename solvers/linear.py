"""Matrix-free linear solvers, batched per sample."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers._batching import Layout
from solvers._convergence import ACTIVE, relative, rms_norm
from solvers._hyperparameters import Hyperparameters, require_positive_int
from solvers._small_systems import back_substitute, inverse_or_zero
from solvers._solution import Solution, Status
from solvers._solve import OnFailure, report_failure
from solvers._window import combine, dot, store

__all__ = ["GMRES", "LinearResult", "LinearSolver", "linear_solve"]


@dataclasses.dataclass
class LinearResult:
    """What a linear solver returns for the flat problem; fields as in :class:`solvers.Solution`.

    Attributes:
        x: (B, D); nan for a sample that ended NONFINITE before any progress.
        status: (B,) int8.
        residual: (B,) ``norm(b - A x) / norm(b)``, computed from x.
        num_steps: (B,) int64.
        history: (steps, B) residuals as the method estimates them while it runs.
    """

    x: Tensor
    status: Tensor
    residual: Tensor
    num_steps: Tensor
    history: Tensor


class LinearSolver(Hyperparameters, abc.ABC):
    """A method for ``A x = b`` given only products with A; a frozen dataclass with its own tolerances."""

    @abc.abstractmethod
    def run(self, matvec: Callable[[Tensor], Tensor], b: Tensor) -> LinearResult:
        """Solve ``matvec(x) = b`` for x; both (B, D), each row a system of its own."""


def linear_solve(
    matvec: Callable[[Any], Any],
    b: Any,
    solver: LinearSolver | None = None,
    *,
    batch_dims: int = 1,
    history: bool = False,
    on_failure: OnFailure = "warn",
) -> Solution:
    """Solve the linear systems ``matvec(x) = b``, one a sample. No gradients flow through the steps.

    Args:
        matvec: A linear map of something like ``b`` to something like ``b``, which does not mix samples.
        b: The right-hand sides: a tensor or a pytree of tensors.
        solver: A linear solver; ``GMRES()`` by default. It holds the tolerances.
        batch_dims: How many leading dimensions of ``b`` index independent systems; 0 is one system.
        history: Keep the residuals of every step.
        on_failure: "warn", "raise" a ConvergenceError that carries the solution, or "ignore".

    Returns:
        A :class:`solvers.Solution`; its residual is ``norm(b - A x) / norm(b)``.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
        TypeError, ValueError: ``b`` or what ``matvec`` returns is unfit.

    Example:
        >>> import torch
        >>> from solvers.linear import GMRES, linear_solve
        >>> a = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
        >>> linear_solve(lambda x: x @ a.T, torch.tensor([[4.0, 4.0]]), GMRES()).value
        tensor([[1.5000, 1.0000]])
    """
    layout = Layout(b, batch_dims)
    num_evals = 0

    def flat_matvec(x: Tensor) -> Tensor:
        nonlocal num_evals
        num_evals += 1
        output = matvec(layout.unpack(x))
        layout.check(output, "matvec")
        return layout.pack(output)

    with torch.no_grad():
        result = (solver or GMRES()).run(flat_matvec, layout.pack(b))
    solution = Solution(
        value=layout.unpack(result.x),
        status=layout.unpack_batch(result.status),
        residual=layout.unpack_batch(result.residual),
        num_steps=layout.unpack_batch(result.num_steps),
        num_evals=num_evals,
        history=layout.unpack_batch(result.history) if history else None,
    )
    report_failure(solution, on_failure, "The linear solve")
    return solution


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(LinearSolver):
    """Restarted GMRES: minimizes ``|b - A x|`` over the Krylov space of A and b, for any invertible A.

    A step costs one product with A and work with the basis that grows by one vector a step, up to ``restart`` of them.
    The true residual is computed once a cycle (one more product), so that the status and the residual do not rest on
    the recurrence. Orthogonalization is classical Gram-Schmidt applied twice, which is as accurate as Householder
    and two batched matrix products. (Differences from Saad and Schultz: that orthogonalization; a sample whose Krylov
    space is exhausted leaves the others running.)

    Args:
        max_steps: Most steps in all.
        restart: Steps after which the basis is dropped and rebuilt from the residual.
        rtol: A sample is done when ``norm(b - A x) <= atol + rtol * norm(b)`` in the root mean square norm.
        atol: Absolute tolerance.

    References:
        Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems",
        SIAM J. Sci. Stat. Comput. 7 (1986), algorithm 4.
    """

    max_steps: int = 100
    restart: int = 30
    rtol: float = 1e-5
    atol: float = 0.0

    def __post_init__(self) -> None:
        require_positive_int(self, "max_steps", self.max_steps)
        require_positive_int(self, "restart", self.restart)
        if not (self.rtol >= 0 and self.atol >= 0):
            raise ValueError(f"GMRES tolerances must be >= 0, got rtol={self.rtol!r}, atol={self.atol!r}.")

    def run(self, matvec: Callable[[Tensor], Tensor], b: Tensor) -> LinearResult:
        norm_b = rms_norm(b)  # (B,)
        tolerance = self.atol + self.rtol * norm_b
        x, r = torch.zeros_like(b), b
        error = norm_b
        status = torch.full_like(norm_b, ACTIVE, dtype=torch.int8)
        status = status.masked_fill(norm_b <= tolerance, Status.CONVERGED)
        status = status.masked_fill(~norm_b.isfinite(), Status.NONFINITE)
        num_steps = torch.zeros_like(norm_b, dtype=torch.int64)
        history: list[Tensor] = []
        while len(history) < self.max_steps and bool((status == ACTIVE).any()):
            active = status == ACTIVE
            # A finished sample joins the products with a zero vector and comes out with a zero correction.
            start = torch.where(active.unsqueeze(1), r, 0.0)
            correction, exhausted, steps = self._cycle(matvec, start, tolerance, norm_b, history)
            candidate = x + correction
            new_r = b - matvec(candidate)
            new_error = rms_norm(new_r)
            improved = active & (new_error < error)
            x = torch.where(improved.unsqueeze(1), candidate, x)
            r = torch.where(improved.unsqueeze(1), new_r, r)
            num_steps = num_steps + torch.where(active, steps, 0)
            # The later line wins.
            status = status.masked_fill(active & ~(new_error < 0.999 * error), Status.STAGNATED)
            status = status.masked_fill(active & exhausted, Status.BREAKDOWN)
            status = status.masked_fill(active & ~new_error.isfinite(), Status.NONFINITE)
            error = torch.where(improved, new_error, error)
            status = status.masked_fill(active & (error <= tolerance), Status.CONVERGED)
        status = status.masked_fill(status == ACTIVE, Status.MAX_STEPS)
        # A start of zero that nothing finite was found to improve on is no answer.
        lost = (status == Status.NONFINITE) & ~(error < norm_b)
        return LinearResult(
            x=x.masked_fill(lost.unsqueeze(1), math.nan),
            status=status,
            residual=relative(error, norm_b),
            num_steps=num_steps,
            history=torch.stack(history) if history else norm_b.new_zeros(0, norm_b.shape[0]),
        )

    def _cycle(
        self,
        matvec: Callable[[Tensor], Tensor],
        r: Tensor,
        tolerance: Tensor,
        norm_b: Tensor,
        history: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One Arnoldi cycle from the residual ``r`` (B, D); appends a residual estimate a step to ``history``.

        Returns:
            The correction of x (B, D); (B,) bool, which samples ran out of Krylov space short of the tolerance; (B,)
            int64, the steps that each sample took.
        """
        size = min(self.restart, self.max_steps - len(history))
        rounding = 20 * torch.finfo(r.dtype).eps
        to_rms = 1.0 / math.sqrt(max(r.shape[1], 1))
        beta = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # (B, 1)
        basis = store(None, 0, r * inverse_or_zero(beta, 0.0), size + 1)
        # The product of the Givens rotations so far, applied to every new column of the Hessenberg matrix at once.
        # It grows with the basis: few steps are the rule, and with thousands of samples the full square is large.
        rotation = _identities(r, min(size, 7) + 1)
        columns: list[Tensor] = []
        norm_a = torch.zeros_like(beta)  # the largest |A v| of a unit vector v so far
        running = beta.squeeze(1) > 0
        exhausted = torch.zeros_like(running)
        steps = torch.zeros_like(running, dtype=torch.int64)
        for j in range(size):
            if j + 1 == rotation.shape[1]:
                grown = _identities(r, min(size, 2 * j) + 1)
                grown[:, : j + 1, : j + 1] = rotation
                rotation = grown
            w = matvec(basis[:, j])
            norm_a = torch.maximum(norm_a, torch.linalg.vector_norm(w, dim=1, keepdim=True))
            used = basis[:, : j + 1]
            h = dot(used, w)  # (B, j + 1)
            w = w - combine(used, h)
            again = dot(used, w)
            w = w - combine(used, again)
            h = h + again
            below = torch.linalg.vector_norm(w, dim=1, keepdim=True)  # (B, 1)
            # w in the span of the basis to rounding: the Krylov space is exhausted.
            invariant = (below <= rounding * norm_a).squeeze(1)
            below = torch.where(invariant.unsqueeze(1), 0.0, below)

            rotated = dot(rotation[:, : j + 1, : j + 1], h)  # (B, j + 1)
            pivot = torch.hypot(rotated[:, j:], below)
            unit = inverse_or_zero(pivot, rounding * norm_a)
            # An unusable pivot: keep the rotation orthogonal, leave the unknown at 0.
            cos = torch.where(unit > 0, rotated[:, j:] * unit, 1.0)
            sin = below * unit
            upper, lower = rotation[:, j].clone(), rotation[:, j + 1].clone()
            rotation[:, j] = cos * upper + sin * lower
            rotation[:, j + 1] = cos * lower - sin * upper
            columns.append(torch.cat((rotated[:, :j], torch.where(unit > 0, pivot, 0.0)), dim=1))

            steps = steps + running
            estimate = (beta.squeeze(1) * rotation[:, j + 1, 0]).abs() * to_rms  # (B,)
            history.append(relative(estimate, norm_b))
            exhausted = exhausted | (running & invariant & (unit.squeeze(1) == 0))
            # A little below the tolerance, so that rounding in the true residual does not cost another cycle.
            running = running & (estimate > 0.9 * tolerance) & ~invariant
            if not bool(running.any()):
                break
            # A stopped sample continues with a zero vector, whose column and unknown are zero.
            basis = store(basis, j + 1, w * inverse_or_zero(below, 0.0) * running.unsqueeze(1), size + 1)

        n = len(columns)
        rhs = beta * rotation[:, :n, 0]  # (B, n)
        rows = []
        for i in range(n):
            right = [columns[k][:, i] for k in range(i + 1, n)]
            row = torch.stack(right, dim=1) if right else rhs[:, :0]
            rows.append((inverse_or_zero(columns[i][:, i : i + 1], 0.0), row, rhs[:, i : i + 1]))
        return combine(basis[:, :n], back_substitute(rows)), exhausted, steps


def _identities(like: Tensor, size: int) -> Tensor:
    """(B, size, size), an identity matrix for each row of ``like`` (B, D)."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1)
