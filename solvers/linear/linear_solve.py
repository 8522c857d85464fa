"""Linear solves of batches and pytrees."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers._failure import report_failure
from solvers._solution import Solution, Status
from solvers.linear.dense import AutoLinear
from solvers.linear.linear_solver import LinearResult, LinearSolver, default_rtol
from solvers.linear.names import get_linear_solver
from solvers.linear.operator import FlatMatvec, Operator, rescaled
from solvers.problem import OnFailure
from solvers.problem.autocast import AutocastMode, without_autocast
from solvers.problem.layout import Layout
from solvers.problem.norms import FLOOR, underflow


def linear_solve(
    matvec: Callable[[Any], Any],
    b: Any,
    solver: LinearSolver | str | None = None,
    *,
    rmatvec: Callable[[Any], Any] | None = None,
    rtol: float | None = None,
    rescale: bool = False,
    batch_dims: int = 1,
    history: bool = False,
    on_failure: OnFailure = "warn",
) -> Solution:
    """Solve the linear systems ``matvec(x) = b``, one a sample. No gradients flow through the steps.

    Args:
        matvec: A linear map of something like ``b`` to something like ``b``, which does not mix samples.
        b: The right-hand sides: a tensor or a pytree of tensors.
        solver: A linear solver, or its name; GMRES by default. It holds the tolerances.
        rmatvec: The product with the transpose, for solvers that need it; by default that is found by differentiating
            ``matvec``.
        rtol: The relative tolerance of a solver whose own is None, at least what rounding allows. None means
            ``eps ** 0.75``.
        rescale: Multiply each system by a number for which a step along ``b`` is about right, where the solver sums a
            series, which depends on the size and the sign of the operator. Costs one product.
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
    solver = get_linear_solver("gmres" if solver is None else solver)
    layout = Layout(b, batch_dims)
    autocast = AutocastMode.current(layout.device.type)
    num_evals = 0

    def flat(product: Callable[[Any], Any], name: str) -> FlatMatvec:
        def flat_product(x: Tensor) -> Tensor:
            nonlocal num_evals
            num_evals += 1
            with autocast.in_force():
                output = product(layout.unpack(x))
                layout.check(output, name)
            return layout.pack(output)

        return flat_product

    with torch.no_grad(), without_autocast(layout.device.type):
        flat_matvec, rhs = flat(matvec, "matvec"), layout.pack(b)
        if rmatvec is not None:
            flat_matvec = Operator(flat_matvec, flat(rmatvec, "rmatvec"))
        solver = solver.with_preconditioners(lambda preconditioner: flat(preconditioner, "preconditioner"))
        if rescale and solver.is_series:
            flat_matvec, rhs = rescaled(flat_matvec, rhs)
        least = FLOOR * torch.finfo(layout.dtype).eps
        default = default_rtol(layout.dtype) if rtol is None else max(rtol, least)
        unit = 1.0 if _has_absolute_tolerance(solver) else _unit(rhs)
        result = solver.with_default_rtol(default).run(flat_matvec, rhs / unit)
        if not isinstance(result, LinearResult) or result.x.shape != rhs.shape:
            got = f"x of {tuple(result.x.shape)}" if isinstance(result, LinearResult) else f"a {type(result).__name__}"
            raise TypeError(f"{solver!r}.run must return a LinearResult with x of {tuple(rhs.shape)}, got {got}.")
        x = result.x * unit
        overflown = (result.status == Status.CONVERGED) & ~x.isfinite().all(dim=1)
        status = result.status.masked_fill(overflown, Status.NONFINITE)
    solution = Solution(
        value=layout.unpack(x),
        status=layout.unpack_batch(status),
        residual=layout.unpack_batch(result.residual),
        num_steps=layout.unpack_batch(result.num_steps),
        num_evals=num_evals + result.num_compiled,
        history=layout.unpack_batch(result.history) if history else None,
        solver=result.solver or solver,
    )
    report_failure(solution, on_failure, "The linear solve")
    return solution


def _has_absolute_tolerance(solver: LinearSolver) -> bool:
    """Whether the solver, or one that it may choose, has a tolerance in the units of the right-hand side."""
    if isinstance(solver, AutoLinear):
        return _has_absolute_tolerance(solver.otherwise)
    return getattr(solver, "atol", 0.0) > 0


def _unit(b: Tensor) -> Tensor:
    """(B, 1) what to divide each system by so that squares of residuals neither vanish nor overflow: 1 but there."""
    norm: Tensor = torch.linalg.vector_norm(b, dim=1, keepdim=True)
    limits = torch.finfo(b.dtype)
    small = (norm / math.sqrt(underflow(b))).clamp(limits.tiny**0.75, 1.0)
    # A power of two, by which nothing is rounded.
    return torch.where(norm > limits.max**0.375, 2.0 ** int(0.75 * math.log2(limits.max)), small)
