"""Differentiation by the implicit function theorem."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_unflatten

from implicit.autograd.compiled import with_adjoint
from implicit.autograd.explicit_map import ExplicitMap, transform_active
from implicit.autograd.fixed_point_function import Leaves, Map, Problem, fixed_point_of
from implicit.backward.backward import Backward, SolveOptions
from solvers import Solution
from solvers.linear import LinearSolver, Richardson


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit(Backward):
    """The exact gradient of the fixed point, whatever solver found it.

    With J = df/dz at the solution and w the incoming gradient,

        u = J' u + w,    gradient to each input or parameter t = (df/dt)' u.

    The linear system is solved with products J' u alone; nothing of the forward iteration is kept, so memory does not
    depend on the number of steps. Costs one call of ``f`` with gradients, one vector-Jacobian product a step of the
    linear solver, and one more for the last line. Exact as far as the forward solve has converged and the linear one is
    solved: the error of the gradient is of the order of both residuals. The start gets no gradient.

    Every order of derivative, ``torch.func`` transforms and forward mode are supported; under a transform, tensors
    that ``f`` depends on must be its arguments, or parameters of ``f`` where it is a module.

    ``Implicit(linear_solver=NeumannSeries(terms=k))``, or "neumann" by name, is the truncated series u = sum_{i < k}
    J'^i w: cheaper and biased, by J'^k u, which is small where the map contracts fast. It needs k - 1 products.

    Args:
        linear_solver: The solver of the linear system, with its own tolerances.

    References:
        Bai, Kolter and Koltun, "Deep equilibrium models", NeurIPS (2019), theorem 1.
    """

    linear_solver: LinearSolver = Richardson()

    def __post_init__(self) -> None:
        if not isinstance(self.linear_solver, LinearSolver):
            raise TypeError(
                "Implicit(linear_solver=...) must be a linear solver such as solvers.linear.GMRES(), got "
                f"{self.linear_solver!r}."
            )

    def solve(
        self,
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...],
        options: SolveOptions,
        problem_type: type[Problem] = Problem,
    ) -> Solution:
        if torch.compiler.is_compiling() and not transform_active():
            return self._solve_while_compiling(f, z0, args, options)
        start, spec = tree_flatten(z0)
        explicit = ExplicitMap(f, z0, args)
        found: list[Solution] = []

        def forward(map_: Map, z0: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
            def tree_map(z: list[Tensor]) -> list[Tensor]:
                return map_(z, tensors)

            solution = options.for_leaves(spec, batch_dims).solve(first.before(tree_map), list(z0))
            found.append(solution)
            return list(solution.value)

        first = _FirstCall()
        captured: list[Tensor] = []
        transformed = transform_active()
        if transformed:
            explicit.refuse_captured(start)
        else:
            first.output, captured = explicit.first_call(start)
        report = _Report()
        problem = self._problem(problem_type, explicit, forward, options, report, transformed=transformed)
        value = fixed_point_of(problem, start, explicit.tensors, captured)
        return report.to(dataclasses.replace(found.pop(), value=tree_unflatten(value, spec)))

    def _solve_while_compiling(
        self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions
    ) -> Solution:
        """See :mod:`implicit.autograd.compiled`. A backward pass that is in the graph reports nothing."""
        explicit = ExplicitMap(f, z0, args, explicit_weights=False)
        with parametrize.cached():
            f(z0, *args)  # computes the parametrized weights, with gradients; the compiler removes what is not used
            with torch.no_grad():
                solution = options.solve(f, z0, args)
            z, spec = tree_flatten(solution.value)
            image = explicit(z, explicit.tensors)
            report = _Report() if self.linear_solver.tested else None
            problem = self._problem(Problem, explicit, lambda *_: z, options, report, transformed=False)
            if report is None:
                value = with_adjoint(problem, image, z, explicit.tensors)
                return dataclasses.replace(solution, value=tree_unflatten(value, spec))
            weights = dict(parametrize._cache)
        from implicit.autograd import outside_graphs

        value = outside_graphs.with_eager_adjoint(problem, image, z, explicit.tensors, weights)
        return report.to(dataclasses.replace(solution, value=tree_unflatten(value, spec)))

    def _problem(
        self,
        problem_type: type[Problem],
        explicit: ExplicitMap,
        solve: Callable[[Map, Leaves, Leaves, int], list[Tensor]],
        options: SolveOptions,
        report: "_Report | None",
        *,
        transformed: bool,
    ) -> Problem:
        return problem_type(
            map=explicit,
            solve=solve,
            batch_dims=options.batch_dims,
            adjoint_solver=self.linear_solver,
            on_failure=options.on_failure,
            resolution=explicit.resolution,
            transformed=transformed,
            report=report,
        )


class _Report:
    """Puts the solution of the adjoint problem on the solution that it belongs to, if that is still there."""

    _solution: "weakref.ref[Solution] | None" = None

    def to(self, solution: Solution) -> Solution:
        """Report to this solution from now on."""
        # The graph of the solution's value holds this object: a strong reference would be a cycle through it.
        self._solution = weakref.ref(solution)
        return solution

    def __call__(self, adjoint: Solution) -> None:
        solution = None if self._solution is None else self._solution()
        if solution is not None:
            solution.adjoint = adjoint


class _FirstCall:
    """The map at the start, computed already when its tensors were searched for, handed to the solver once."""

    output: list[Tensor] | None = None

    def before(self, f: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[list[Tensor]], list[Tensor]]:
        def once(z: list[Tensor]) -> list[Tensor]:
            output, self.output = self.output, None
            return f(z) if output is None else output

        return once
