"""Differentiation by the implicit function theorem."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_structure, tree_unflatten

from implicit.autograd.constant_weights import ConstantWeights, constant_weights
from implicit.autograd.explicit_map import ExplicitMap, FirstCall, make_explicit, make_explicit_under_transform
from implicit.autograd.fixed_point_function import fixed_point_of
from implicit.autograd.problem import Leaves, Map, Problem, without_tensors
from implicit.autograd.torch_internals import cached_weights, copy_of_cache, current_loans, transform_active
from implicit.backward.backward import Backward, SolveOptions
from solvers import Solution
from solvers.linear import LinearSolver, Richardson, get_linear_solver
from solvers.problem import Layout


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
        linear_solver: The solver of the linear system, or its name: "gmres", "cg" where J is known to be symmetric,
            "dense", or "auto", which is dense for samples of at most 32 unknowns; see
            :func:`solvers.linear.get_linear_solver`. ``solution.adjoint.solver`` says which one it was. If its ``rtol``
            is None, it is a tenth of that of the forward solve, so that derivatives are as accurate as the solution.

    References:
        Bai, Kolter and Koltun, "Deep equilibrium models", NeurIPS (2019), theorem 1.
    """

    linear_solver: LinearSolver | str = Richardson()

    def __post_init__(self) -> None:
        if not isinstance(self.linear_solver, (LinearSolver, str)):
            raise TypeError(
                "Implicit(linear_solver=...) must be a linear solver such as solvers.linear.GMRES(), or its name, got "
                f"{self.linear_solver!r}."
            )
        object.__setattr__(self, "linear_solver", get_linear_solver(self.linear_solver))

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        linear_solver = for_leaves(get_linear_solver(self.linear_solver), tree_structure(z0))
        if transform_active():
            return solve_under_transform(f, z0, args, options, linear_solver)
        if torch.compiler.is_compiling():
            return solve_while_compiling(f, z0, args, options, linear_solver)
        return solve_implicitly(f, z0, args, options, lambda _: linear_solver)


def for_leaves(linear_solver: LinearSolver, spec: TreeSpec) -> LinearSolver:
    """The same for a state that is given as the list of its leaves, which preconditioners are not written for."""
    return linear_solver.with_preconditioners(
        lambda preconditioner: lambda leaves: tree_leaves(preconditioner(tree_unflatten(leaves, spec)))
    )


def for_matrices(linear_solver: LinearSolver, layout: Callable[[], Layout]) -> LinearSolver:
    """The same for a state that is given as one matrix (B, D), in a list, of a layout that is known when it solves."""

    def of_matrices(preconditioner: Callable[[Any], Any]) -> Callable[[list[Tensor]], list[Tensor]]:
        def of_matrix(flat: Tensor) -> Tensor:
            if flat.dim() > 2:  # mapped by vmap
                return torch.func.vmap(of_matrix)(flat)
            return layout().pack(preconditioner(layout().unpack(flat)))

        return lambda leaves: [of_matrix(leaves[0])]

    return linear_solver.with_preconditioners(of_matrices)


def solve_implicitly(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    options: SolveOptions,
    linear_solver_after: Callable[[Solution], LinearSolver],
    problem_type: type[Problem] = Problem,
) -> Solution:
    """The solution, whose value gets its gradient from an adjoint problem.

    Args:
        f: The map, and so on.
        z0: The start.
        args: Further arguments of ``f``.
        options: Those of the solve.
        linear_solver_after: The solver of the adjoint problem, which may depend on the solution.
        problem_type: What the derivatives are solved by.
    """
    loans, weights = current_loans(), ConstantWeights(cached_weights())
    first_call = FirstCall(f, weights, loans)
    with torch.no_grad(), weights.in_force():
        solution = options.solve(first_call, tree_map_only(Tensor, torch.Tensor.detach, z0), args)
    explicit, tensors = make_explicit(f, z0, args, weights.values, loans)
    linear_solver, solver_tensors = without_tensors(linear_solver_after(solution))
    report = Report()
    problem = problem_of(
        explicit,
        options,
        linear_solver,
        problem_type,
        solve=lambda map_, z, tensors, batch_dims: [leaf.detach() for leaf in z],  # the solution, which is known
        num_solver_tensors=len(solver_tensors),
        transformed=False,
        report=report,
        traced=explicit.traced if options.compile and not options.root else None,
    )
    z, spec = tree_flatten(solution.value)
    value = fixed_point_of(problem, z, [*tensors, *solver_tensors], first_call.captured or [])
    return report.to(dataclasses.replace(solution, value=tree_unflatten(value, spec)))


def solve_under_transform(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    options: SolveOptions,
    linear_solver: LinearSolver,
    problem_type: type[Problem] = Problem,
    *,
    constant: bool = False,
) -> Solution:
    """The same under a ``torch.func`` transform or forward mode: the solve belongs to the Function, which unwraps it.

    Args:
        f: The map, and so on.
        z0: The start.
        args: Further arguments of ``f``.
        options: Those of the solve.
        linear_solver: The solver of linear problems.
        problem_type: What the derivatives are solved by.
        constant: Take no derivative.
    """
    # Before torch.func.vmap adds its dimensions to the state and to batch_dims.
    Layout(z0, options.batch_dims)
    start, spec = tree_flatten(z0)
    explicit, tensors = make_explicit_under_transform(f, z0, args)
    if constant:
        start, tensors = [leaf.detach() for leaf in start], [tensor.detach() for tensor in tensors]
    found: list[Solution] = []

    def forward(map_: Map, z0: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
        def map_of_leaves(z: list[Tensor]) -> list[Tensor]:
            return map_(z, tensors)

        found.append(options.for_leaves(spec, batch_dims).solve(map_of_leaves, list(z0)))
        return list(found[0].value)

    report = Report()
    problem = problem_of(
        explicit,
        options,
        linear_solver,
        problem_type,
        solve=forward,
        transformed=True,
        report=report,
    )
    value = fixed_point_of(problem, start, tensors, [])
    return report.to(dataclasses.replace(found.pop(), value=tree_unflatten(value, spec)))


def solve_while_compiling(
    f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions, linear_solver: LinearSolver
) -> Solution:
    """The same as ``torch.compile`` traces it. A backward pass that is in the graph reports nothing."""
    from implicit.autograd import compiled  # which loads PyTorch's compiler

    explicit, tensors = make_explicit(f, z0, args)
    with constant_weights():
        f(z0, *args)  # computes the parametrized weights, with gradients; the compiler removes what is not used
        with torch.no_grad():
            solution = options.solve(f, z0, args)
        z, spec = tree_flatten(solution.value)
        image = explicit(z, tensors)
        report = Report() if linear_solver.tested else None
        problem = problem_of(
            explicit,
            options,
            linear_solver,
            solve=lambda *_: z,
            transformed=False,
            report=report,
        )
        if report is None:
            value = compiled.with_adjoint(problem, image, z, tensors)
            return dataclasses.replace(solution, value=tree_unflatten(value, spec))
        weights = copy_of_cache()
    value = compiled.with_eager_adjoint(problem, image, z, tensors, weights)
    return report.to(dataclasses.replace(solution, value=tree_unflatten(value, spec)))


def problem_of(
    explicit: ExplicitMap,
    options: SolveOptions,
    linear_solver: LinearSolver,
    problem_type: type[Problem] = Problem,
    **fields: Any,
) -> Problem:
    """The problem whose derivatives are solved for as ``options`` say; ``fields`` are the others of ``Problem``."""
    return problem_type(
        map=explicit,
        batch_dims=options.batch_dims,
        adjoint_solver=linear_solver,
        rtol=options.linear_rtol,
        on_failure=options.on_failure,
        what=options.named("The linear solve of the derivative"),
        resolution=explicit.resolution,
        root=options.root,
        **fields,
    )


class Report:
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
