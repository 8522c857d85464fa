"""Differentiation by the implicit function theorem."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from implicit._explicit_map import ExplicitMap, transform_active
from implicit._fixed_point_function import Leaves, Map, Problem, fixed_point_of
from implicit.backward._base import Backward, SolveOptions
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
        start, spec = tree_flatten(z0)
        explicit = ExplicitMap(f, z0, args)
        found: list[Solution] = []
        reported: list[weakref.ref[Solution]] = []

        def forward(map_: Map, z0: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
            def tree_map(z: list[Tensor]) -> list[Tensor]:
                return map_(z, tensors)

            solution = options.for_leaves(spec, batch_dims).solve(first.before(tree_map), list(z0))
            found.append(solution)
            return list(solution.value)

        def report(adjoint: Solution) -> None:
            # The graph of the solution's value holds this function: a strong reference would be a cycle through it.
            solution = reported[0]() if reported else None
            if solution is not None:
                solution.adjoint = adjoint

        transformed = transform_active()
        first = _FirstCall()
        captured: list[Tensor] = []
        if transformed:
            explicit.refuse_captured(start)
        else:
            first.output, captured = explicit.first_call(start)
        problem = problem_type(
            map=explicit,
            solve=forward,
            batch_dims=options.batch_dims,
            adjoint_solver=self.linear_solver,
            on_failure=options.on_failure,
            resolution=explicit.resolution,
            transformed=transformed,
            report=report,
        )
        value = fixed_point_of(problem, start, explicit.tensors, captured)
        solution = dataclasses.replace(found.pop(), value=tree_unflatten(value, spec))
        reported.append(weakref.ref(solution))
        return solution


class _FirstCall:
    """The map at the start, computed already when its tensors were searched for, handed to the solver once."""

    output: list[Tensor] | None = None

    def before(self, f: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[list[Tensor]], list[Tensor]]:
        def once(z: list[Tensor]) -> list[Tensor]:
            output, self.output = self.output, None
            return f(z) if output is None else output

        return once
