"""Differentiation with the inverse Jacobian that the forward solve has estimated."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_structure

from implicit.autograd.problem import Problem
from implicit.autograd.torch_internals import transform_active
from implicit.backward.backward import Backward, SolveOptions
from implicit.backward.implicit import for_leaves, solve_implicitly, solve_under_transform
from solvers import Solution, Solver, Status
from solvers.linear import FlatMatvec, LinearResult, LinearSolver, Richardson
from solvers.problem.norms import relative, rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHINE(Backward):
    """Share the inverse estimate: the quasi-Newton matrix of the forward solve in the place of the adjoint's solution.

    With H the solver's estimate of the inverse of J - I, J = df/dz at the solution, and w the incoming gradient,

        u = -H' w,    gradient to each input or parameter t = (df/dt)' u.

    The exact u solves u = J' u + w. How far this one is from doing so, the residual norm(w - u + J' u) / norm(w), is
    computed with one vector-Jacobian product and told in ``solution.adjoint``. A sample whose residual is above
    ``max_residual`` goes to ``fallback``, a linear solver that starts from the estimate (from zero, if that is better);
    the samples that are good enough keep it, with the status UNTESTED, for it is approximate by choice.

        SHINE(max_residual=0.1)                                    exact where the estimate is poor
        SHINE(fallback=None)                                       the estimate, whatever it is worth
        SHINE(fallback=NeumannSeries(terms=3), max_residual=0.0)   the refined variant: three more products, always

    The bias is (I - J')^-1 times the residual. H is good in the directions of the solver's steps; for a w that has
    little to do with them u is near w, as in :class:`implicit.JFB`, and after a slowly converging solve it may be much
    worse. Costs one call of ``f`` with gradients, one product and those of the fallback; memory: the pairs of vectors
    in H, two a step of the solver up to its ``memory``. Use it where the solver is Broyden's, few steps are taken,
    and one product more than JFB is worth knowing the residual. The start gets no gradient.

    Derivatives of the first order by plain autograd, ``torch.func.grad`` and ``torch.func.vjp``: H belongs to one
    linear problem. ``vmap``, forward mode and higher orders are refused.

    Args:
        fallback: The linear solver for samples with a poor estimate; its relative tolerance counts from the estimate's
            residual. None keeps every estimate.
        max_residual: The largest residual of an estimate that is good enough.

    References:
        Ramzi, Mannel, Bai, Starck, Ciuciu and Moreau, "SHINE: SHaring the INverse Estimate from the forward pass for
        bi-level optimization and implicit models", ICLR (2022). (Differences: the paper judges an estimate by its norm
        beside that of w, and falls back to w.)
    """

    fallback: LinearSolver | None = Richardson()
    max_residual: float = 0.5

    def __post_init__(self) -> None:
        if not (self.fallback is None or isinstance(self.fallback, LinearSolver)):
            raise TypeError(
                "SHINE(fallback=...) must be a linear solver such as solvers.linear.GMRES(), or None, got "
                f"{self.fallback!r}."
            )
        if not self.max_residual >= 0:
            raise ValueError(f"SHINE(max_residual=...) must be >= 0, got {self.max_residual!r}.")

    def check(self, solver: Solver) -> None:
        if not solver.estimates_inverse:
            raise ValueError(
                f"{self!r} needs the estimate of the inverse Jacobian that a quasi-Newton solver makes, and {solver!r} "
                "makes none. Use Broyden, or the implicit backward mode."
            )

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        if options.compact or options.chunk_size is not None:
            option = "compact=True" if options.compact else "chunk_size"
            raise ValueError(
                f"{self!r} needs the estimate of the inverse Jacobian of all samples, and with {option} the solver "
                f"has not all of them to the end. Leave {option} out, or use the implicit backward mode."
            )
        fallback = None if self.fallback is None else for_leaves(self.fallback, tree_structure(z0))

        def estimate_after(solution: Solution) -> _Estimate:
            inverses, factors = [solution.state.inverse], [_factor(solution)]
            return _Estimate(shine=self, fallback=fallback, inverses=inverses, factors=factors)

        if not transform_active():
            return solve_implicitly(f, z0, args, options, estimate_after, _FirstOrderProblem)
        estimate = _Estimate(shine=self, fallback=fallback)
        solution = solve_under_transform(f, z0, args, options, estimate, _FirstOrderProblem)
        estimate.inverses.append(solution.state.inverse)
        estimate.factors.append(_factor(solution))
        return solution


def _factor(solution: Solution) -> Tensor | float:
    """What H is to be multiplied by: -1, or for a root the c (B, 1) of ``z - c F(z)``, because the operator is -F'."""
    return -1.0 if solution.scaling is None else solution.scaling.reshape(-1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Estimate(LinearSolver):
    """``x = -H' b``, corrected where it is poor. The lists hold H and its factor after the forward solve."""

    shine: SHINE
    fallback: LinearSolver | None
    inverses: list[Any] = dataclasses.field(default_factory=list)
    factors: list[Any] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        return repr(self.shine)

    def with_default_rtol(self, rtol: float) -> "_Estimate":
        if self.fallback is None:
            return self
        return dataclasses.replace(self, fallback=self.fallback.with_default_rtol(rtol))

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        (inverse,), (factor,) = self.inverses, self.factors
        norm_b = rms_norm(b)

        def residual_of(x: Tensor) -> tuple[Tensor, Tensor]:
            r = b - matvec(x)
            return r, relative(rms_norm(r), norm_b)

        x = factor * inverse.rmv(b)
        r, residual = residual_of(x)
        result = LinearResult(
            x=x,
            status=torch.full_like(norm_b, Status.UNTESTED, dtype=torch.int8),
            residual=residual,
            num_steps=torch.ones_like(norm_b, dtype=torch.int64),
            history=residual.unsqueeze(0),
        )
        # A nan compares false, so it is neither good nor a start.
        poor = ~(residual <= self.shine.max_residual)
        if self.fallback is None or not bool(poor.any()):
            return result
        start = torch.where((residual < 1).unsqueeze(1), x, 0.0)
        r = torch.where((residual < 1).unsqueeze(1), r, b)
        found = self.fallback.run(matvec, torch.where(poor.unsqueeze(1), r, 0.0))
        return result.continued(poor, found, start, relative(rms_norm(r), norm_b)).settled()


class _FirstOrderProblem(Problem):
    """A problem of which only the adjoint can be solved, once."""

    def adjoint(self, num_leaves: int) -> Problem:
        return dataclasses.replace(super().adjoint(num_leaves), adjoint_solver=_NoEstimate())

    def tangent(self, num_leaves: int) -> NoReturn:
        raise RuntimeError(_REFUSAL.format("a forward-mode derivative"))

    def batched(self, *_: Any) -> NoReturn:
        raise RuntimeError(_REFUSAL.format("torch.func.vmap"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _NoEstimate(LinearSolver):
    """Solves the adjoint of the adjoint problem, which would take H itself."""

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> NoReturn:
        raise RuntimeError(_REFUSAL.format("a second derivative"))


_REFUSAL = (
    "SHINE has an estimate of the inverse Jacobian for the gradient of one solve, and none for {}. Use the implicit "
    "backward mode."
)
