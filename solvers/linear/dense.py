"""A direct solver for systems of few unknowns, and the choice between it and a Krylov method."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from solvers._solution import Status
from solvers.linear.linear_solver import LinearResult, LinearSolver, require_tolerances, tolerance_of
from solvers.linear.operator import FlatMatvec
from solvers.linear.richardson import Richardson
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import FLOOR, relative, rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """The matrix, column by column from products with unit vectors, and its LU factorization.

    Exact up to rounding for any invertible A. Costs one product for each of the D unknowns of a sample, memory for D^2
    numbers a sample, and one more product for the true residual, on which the status rests; where that is above the
    tolerance, a step of iterative refinement and another product. A matrix that is singular, or so nearly that 32
    rounding errors in its entries change the solution by its size, gets the least-squares solution of least norm and,
    unless that solves the system, the status BREAKDOWN. A product that mixes samples ends as STAGNATED, because the
    matrices do not hold it.

    Args:
        max_unknowns: The most unknowns of a sample. More are refused, because of the memory for the matrices.
        rtol: A sample has converged when ``norm(b - A x) <= atol + rtol * norm(b)`` in the root mean square norm. None
            means what rounding allows: 32 eps of the size of the terms in ``b - A x``, or of b for a singular A.
        atol: Absolute tolerance.

    References:
        Higham, "Accuracy and stability of numerical algorithms", 2nd edition, SIAM (2002), chapters 7 and 12.
    """

    max_unknowns: int = 2048
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        require_positive_int(self, "max_unknowns", self.max_unknowns)
        require_tolerances(self, self.rtol, self.atol)

    def with_default_rtol(self, rtol: float) -> "Dense":
        return self  # whose default is what rounding allows

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        num_samples, size = b.shape
        if size > self.max_unknowns:
            raise ValueError(
                f"{self!r} forms a matrix of {size} x {size} for every sample. Use a solver that needs products alone, "
                "such as GMRES; if the leading dimensions index independent problems, say so with batch_dims; or raise "
                "max_unknowns."
            )
        norm_b = rms_norm(b)
        is_rounding = tolerance is None and self.rtol is None
        if tolerance is None:
            tolerance = tolerance_of(self.rtol, self.atol, norm_b)
        eps = torch.finfo(b.dtype).eps
        if not b.numel():
            zero = torch.zeros_like(norm_b)
            status = zero.to(torch.int8)  # CONVERGED
            return LinearResult(b, status, zero, zero.to(torch.int64), zero.new_zeros(0, num_samples))
        units = torch.eye(size, dtype=b.dtype, device=b.device)
        columns = [matvec(unit.expand_as(b).contiguous()) for unit in units]
        matrix = columns[0].unsqueeze(2) if size == 1 else torch.stack(columns, dim=2)  # (B, D, D)
        # A zero right-hand side has the solution zero, whatever the matrix; one that is not finite has none.
        solve, no_pivot = _factored(matrix)
        x = torch.zeros_like(b)
        r, error = b, norm_b
        finite = norm_b.isfinite() & matrix.isfinite().flatten(1).all(dim=1)
        correction = solve(b.unsqueeze(2)).squeeze(2)
        singular = finite & (no_pivot | (_sensitivity(matrix, correction, solve) * (FLOOR * eps) > 1))
        # In norms without squares, which may overflow.
        entry = matrix.flatten(1).abs().amax(dim=1)
        size_of_matrix = entry * torch.linalg.matrix_norm(matrix / torch.where(entry > 0, entry, 1.0).view(-1, 1, 1))
        inverse = torch.linalg.pinv(matrix[singular], rtol=FLOOR * eps) if bool(singular.any()) else None
        for _ in range(2):
            if inverse is not None:
                correction[singular] = (inverse @ r[singular].unsqueeze(2)).squeeze(2)
            candidate = torch.where((norm_b > 0).unsqueeze(1), x + correction, 0.0)
            new_r = b - matvec(candidate)
            new_error = rms_norm(new_r)
            improved = (new_error < error).unsqueeze(1)
            x, r = torch.where(improved, candidate, x), torch.where(improved, new_r, r)
            error = torch.where(improved.squeeze(1), new_error, error)
            terms = norm_b
            if is_rounding:
                terms = terms + (rms_norm(x) * size_of_matrix).masked_fill(singular, 0.0)
            floor = FLOOR * eps * terms
            met = (error <= torch.maximum(tolerance, floor.masked_fill(floor.isinf(), 0.0))) & norm_b.isfinite()
            if bool(met.all()):
                break
            correction = torch.where(met.unsqueeze(1), 0.0, solve(r.unsqueeze(2)).squeeze(2))
        status = torch.full_like(norm_b, Status.STAGNATED, dtype=torch.int8)
        status = status.masked_fill(singular, Status.BREAKDOWN)
        status = status.masked_fill(~finite, Status.NONFINITE).masked_fill(met, Status.CONVERGED)
        return LinearResult(
            x=x.masked_fill((~finite & ~met).unsqueeze(1), math.nan),
            status=status,
            residual=relative(error, norm_b),
            num_steps=torch.full_like(norm_b, size, dtype=torch.int64),
            history=relative(error, norm_b).unsqueeze(0),
            solver=self,
        )


def _factored(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The solution (B, D, k) as a function of right-hand sides (B, D, k); (B,) bool, which matrices lack a pivot."""
    if matrix.shape[1] == 1:
        return lambda b: b / matrix, (matrix == 0).flatten()
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    return lambda b: torch.linalg.lu_solve(lu, pivots, b), info > 0


def _sensitivity(matrix: Tensor, x: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """(B,) the relative change of ``x`` (B, D) by relative changes of the matrix's entries, over their size.

    Skeel's condition number, which does not depend on the units of equations and unknowns, as far as changes of one
    sign in each row, in a few patterns, show it.
    """
    if matrix.shape[1] == 1:
        return torch.ones_like(x[:, 0])
    terms, size = (matrix.abs() @ x.abs().unsqueeze(2)).squeeze(2), x.abs().amax(dim=1)
    row = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    signs = torch.sin(torch.stack([a * row * row for a in (1.0, 7.0, 40.0)], dim=1)).sign()  # (D, 3)
    change = solve(signs * terms.unsqueeze(2)).flatten(1).abs().amax(dim=1)  # squares may overflow
    return torch.where(size > 0, change / size, 0.0).nan_to_num(math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoLinear(LinearSolver):
    """:class:`Dense` for systems of few unknowns, and ``otherwise`` for larger ones; the result says which.

    Dense where a sample has at most ``max_unknowns`` and the matrices of all samples together have at most 2^25 entries
    (256 MiB in float64).

    Args:
        max_unknowns: The most unknowns for which the matrix is formed.
        otherwise: The solver of larger systems.
    """

    most_entries: ClassVar[int] = 2**25

    max_unknowns: int = 32
    otherwise: LinearSolver = Richardson()  # noqa: RUF009

    def __post_init__(self) -> None:
        require_positive_int(self, "max_unknowns", self.max_unknowns)
        if not isinstance(self.otherwise, LinearSolver):
            raise TypeError(f"AutoLinear(otherwise=...) must be a linear solver, got {self.otherwise!r}.")

    def with_default_rtol(self, rtol: float) -> "AutoLinear":
        return dataclasses.replace(self, otherwise=self.otherwise.with_default_rtol(rtol))

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        size = b.shape[1]
        is_small = size <= self.max_unknowns and b.numel() * size <= self.most_entries
        solver: LinearSolver = Dense() if is_small else self.otherwise
        result = solver.run(matvec, b, tolerance)
        return result if result.solver is not None else dataclasses.replace(result, solver=solver)
