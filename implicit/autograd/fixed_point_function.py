"""The one autograd.Function of the library: the fixed point of a map, as a function of the map's tensors.

By the implicit function theorem, at z = f(z, t):

    reverse mode:  u = (df/dz)' u + w,      the gradient to t is (df/dt)' u,
    forward mode:  dz = (df/dz) dz + (df/dt) dt.

Both are again fixed points, of linear maps whose tensors are explicit, so the same Function solves them and is
differentiated in turn: every order of derivative and every mixture of modes follows from this file.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from implicit.autograd.torch_internals import (
    backward_pass_keeps_graph,
    forward_mode_enabled,
    one_vector_at_a_time,
    transform_active,
    without_tangent,
)
from solvers import Solution, report_failure
from solvers.linear import LinearSolver, linear_solve
from solvers.linear.linear_solver import FLOOR
from solvers.problem import OnFailure
from solvers.problem.layout import Layout
from solvers.problem.norms import relative, rms_norm
from solvers.problem.replaced_tensors import with_tensors

Leaves = Sequence[Tensor]
Map = Callable[[Leaves, Leaves], list[Tensor]]
Report = Callable[[Solution], None] | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A fixed point ``z = map(z, tensors)`` and how it and its derivatives are solved for.

    Attributes:
        map: The map, on the leaves of the state and the list of tensors it depends on.
        solve: ``(map, z0, tensors, batch_dims) -> leaves of the fixed point``. Called without gradients.
        batch_dims: As in :func:`solvers.solve`.
        adjoint_solver: Solves the linear problems. If it holds tensors, they are the last of the list that the map
            depends on, see :func:`without_tensors`.
        num_solver_tensors: How many tensors these are.
        rtol: The relative tolerance of linear problems, for a solver whose own is None.
        on_failure: What to do when a linear problem fails.
        resolution: Relative rounding of products with the map's Jacobian where it is coarser than that of the linear
            algebra. A linear solve that stops at a residual below it has not failed.
        transformed: Whether the map was made explicit while a transform was tracing; then all its tensors are
            arguments, and it is differentiated by ``torch.func`` alone.
        report: Called with the Solution of the adjoint problem.
        what: What a linear problem is called in messages.
    """

    map: Map
    solve: Callable[[Map, Leaves, Leaves, int], list[Tensor]]
    batch_dims: int
    adjoint_solver: LinearSolver
    rtol: float | None
    on_failure: OnFailure
    resolution: float
    transformed: bool
    report: Report = None
    what: str = "The linear solve of the derivative"
    num_solver_tensors: int = 0

    def adjoint(self, num_leaves: int) -> "Problem":
        """``u = (df/dz)' u + w`` with the tensors (w, z, tensors of this problem)."""

        def adjoint_map(u: Leaves, tensors: Leaves) -> list[Tensor]:
            w, z, rest = _split(tensors, num_leaves, num_leaves)
            return [a + b for a, b in zip(self._pulled_back(z, rest, u), w, strict=True)]

        def solve(map_: Map, zero: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
            if map_ is not adjoint_map:  # under vmap
                return self._solve_affine(map_, zero, tensors, batch_dims, self.report)
            w, z, rest = _split(tensors, num_leaves, num_leaves)
            z = [leaf.detach().requires_grad_() for leaf in z]
            with torch.enable_grad():
                fz = self.map(z, rest)
            return self.solve_adjoint(fz, z, w, rest)

        return dataclasses.replace(self, map=adjoint_map, solve=solve, report=None)

    def _pulled_back(self, z: Leaves, tensors: Leaves, u: Leaves) -> Sequence[Tensor]:
        """``(df/dz)' u``, differentiable."""
        if self.transformed:
            _, pullback = torch.func.vjp(lambda *leaves: tuple(self.map(leaves, tensors)), *z)[:2]
            return cast(Sequence[Tensor], pullback(tuple(u)))
        # Not by torch.func, which refuses hooks on saved tensors.
        with torch.enable_grad():
            z = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in z]
            return _vjp(self.map(z, tensors), z, u, differentiable=True)

    def solve_adjoint(self, fz: Leaves, z: Leaves, w: Leaves, tensors: Leaves) -> list[Tensor]:
        """``u = (df/dz)' u + w``, with the graph of ``fz``, the map at z."""
        return self._solve_linear(lambda u: _vjp(fz, z, u), w, tensors, self.batch_dims, self.report)

    def solve_adjoint_by_transform(self, z: Leaves, tensors: Leaves, w: Leaves) -> list[Tensor]:
        """The same by ``torch.func``, which torch.compile traces; not differentiable."""
        _, pullback = torch.func.vjp(lambda *leaves: tuple(self.map(leaves, tensors)), *z)[:2]
        return self._solve_linear(lambda u: list(pullback(tuple(u))), w, tensors, self.batch_dims, self.report)

    def tangent(self, num_leaves: int) -> "Problem":
        """``v = (df/dz) v + t`` with the tensors (t, z, tensors of this problem)."""

        def tangent_map(v: Leaves, tensors: Leaves) -> list[Tensor]:
            t, z, rest = _split(tensors, num_leaves, num_leaves)
            return [a + b for a, b in zip(jvp(lambda *leaves: tuple(self.map(leaves, rest)), z, v), t, strict=True)]

        def solve(map_: Map, zero: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
            return self._solve_affine(map_, zero, tensors, batch_dims)

        return dataclasses.replace(self, map=tangent_map, solve=solve, report=None)

    def batched(self, in_dims: Sequence[int | None], randomness: str) -> "Problem":
        """This problem for every entry of one more leading dimension of the state, under torch.func.vmap."""

        def batched_map(z: Leaves, tensors: Leaves) -> list[Tensor]:
            mapped = torch.func.vmap(self.map, in_dims=(0, list(in_dims)), randomness=randomness)
            return mapped(list(z), list(tensors))

        return dataclasses.replace(self, map=batched_map, batch_dims=self.batch_dims + 1)

    def _solve_affine(
        self, map_: Map, zero: Leaves, tensors: Leaves, batch_dims: int, report: Report = None
    ) -> list[Tensor]:
        """The fixed point of an affine map, evaluated as it stands."""
        offset = map_(zero, tensors)

        def product(u: Leaves) -> list[Tensor]:
            return [a - b for a, b in zip(map_(u, tensors), offset, strict=True)]

        return self._solve_linear(product, offset, tensors, batch_dims, report)

    def _solve_linear(
        self, product: Callable[[Leaves], list[Tensor]], rhs: Leaves, tensors: Leaves, batch_dims: int, report: Report
    ) -> list[Tensor]:
        """Solve ``u - product(u) = rhs``."""
        solver = self.adjoint_solver
        if self.num_solver_tensors:
            supply = iter(tensors[-self.num_solver_tensors :])
            solver = with_tensors(solver, lambda _: next(supply))
        solution = linear_solve(
            lambda u: [a - b for a, b in zip(u, product(u), strict=True)],
            list(rhs),
            solver,
            rtol=self.rtol,
            batch_dims=batch_dims,
            on_failure="ignore",
        )
        if report is not None:
            report(solution)
        if solver.tested and bool(solution.failed.any()) and self._failed(solution, rhs, batch_dims):
            report_failure(solution, self.on_failure, self.what)
        return cast(list[Tensor], solution.value)

    def _failed(self, solution: Solution, rhs: Leaves, batch_dims: int) -> bool:
        """Whether a residual is above what rounding leaves: that of the products, and of ``u - product(u)``."""
        if solution.residual is None:
            return True
        layout = Layout(list(rhs), batch_dims)
        size = relative(rms_norm(layout.pack(solution.value)), rms_norm(layout.pack(list(rhs))))
        eps = torch.finfo(layout.dtype).eps
        floor = (FLOOR * eps * (1 + layout.unpack_batch(size))).clamp_max(eps**0.5)
        # A nan residual compares false, and stays a failure.
        excused = (solution.residual <= self.resolution) | (solution.residual <= floor)
        return bool((solution.failed & ~excused).any())


def without_tensors(solver: LinearSolver) -> tuple[LinearSolver, list[Tensor]]:
    """A linear solver with placeholders for the tensors that it holds, and these.

    A :class:`Problem` must hold no tensors: autograd saves them, and lets go of them after the backward pass.
    """
    tensors: list[Tensor] = []
    placeholder = torch.empty(0)

    def take_out(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return placeholder

    without = with_tensors(solver, take_out)
    return (without, tensors) if tensors else (solver, [])


def fixed_point_of(problem: Problem, start: Leaves, tensors: Leaves, captured: Leaves) -> list[Tensor]:
    """The leaves of the fixed point, differentiable in ``tensors`` and in ``captured``.

    Args:
        problem: The map and its solver.
        start: The leaves of z0; zeros for a linear problem. They get no gradient.
        tensors: What the map takes explicitly.
        captured: Leaf tensors that the map uses beyond those; empty while a transform is tracing.
    """
    sizes = (len(start), len(tensors))
    return list(_FixedPoint.apply(problem, sizes, *start, *tensors, *captured))


class _FixedPoint(torch.autograd.Function):
    """Takes a Problem, the numbers of start leaves and of tensors, and the start, tensors and captured, flat."""

    @staticmethod
    def forward(problem: Problem, sizes: tuple[int, int], *flat: Tensor) -> tuple[Tensor, ...]:
        start, tensors, _ = _split(flat, *sizes)
        return tuple(problem.solve(problem.map, start, tensors, problem.batch_dims))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, sizes, *flat = inputs
        saved = (*output, *flat[sizes[0] :])
        ctx.problem, ctx.sizes = problem, sizes
        ctx.save_for_backward(*saved)
        if transform_active():
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(ctx, *cotangents)
        if not (ctx.problem.transformed or backward_pass_keeps_graph()):
            ctx.problem = None  # f may close over tensors, of which autograd does not know
        return gradients

    @staticmethod
    @one_vector_at_a_time
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        problem, num_leaves = ctx.problem, ctx.sizes[0]
        z, tensors, captured = _split(ctx.saved_tensors, *ctx.sizes)
        # The tensors come with this mode's tangents on, which belong to the result and not to its derivation.
        z, tensors = ([without_tangent(t) for t in group] for group in (z, tensors))
        given = tangents[2 + num_leaves :]
        moving = [i for i, tangent in enumerate(given[: len(tensors)]) if tangent is not None]

        def of_moving(*some: Tensor) -> tuple[Tensor, ...]:
            return tuple(problem.map(z, _replaced(tensors, moving, some)))

        # PyTorch switches forward mode off in here, which would lose the tangents of an outer forward-mode transform.
        with forward_mode_enabled():
            t = jvp(of_moving, [tensors[i] for i in moving], [cast(Tensor, given[i]) for i in moving])
            zero = [torch.zeros_like(leaf) for leaf in z]
            return tuple(fixed_point_of(problem.tangent(num_leaves), zero, (*t, *z, *tensors), captured))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: Problem, sizes: tuple[int, int], *flat: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        start, tensors, captured = _split(flat, *sizes)
        start_dims, tensor_dims, _ = _split(in_dims[2:], *sizes)
        start = [
            leaf.expand(info.batch_size, *leaf.shape) if dim is None else leaf.movedim(dim, 0)
            for leaf, dim in zip(start, start_dims, strict=True)
        ]
        value = fixed_point_of(problem.batched(tensor_dims, info.randomness), start, tensors, captured)
        return tuple(value), (0,) * len(value)


@one_vector_at_a_time
def _backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    num_leaves = ctx.sizes[0]
    z, tensors, captured = _split(ctx.saved_tensors, *ctx.sizes)
    wanted = ctx.needs_input_grad[2 + num_leaves :]
    return (None, None, *[None] * num_leaves, *_pull_back(ctx.problem, z, tensors, captured, cotangents, wanted))


def _split(flat: Sequence[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return list(flat[:first]), list(flat[first : first + second]), list(flat[first + second :])


def _replaced(tensors: Leaves, positions: Sequence[int], values: Leaves) -> list[Tensor]:
    """``tensors`` with others at some positions."""
    every = list(tensors)
    for i, value in zip(positions, values, strict=True):
        every[i] = value
    return every


def jvp(f: Callable[..., tuple[Tensor, ...]], x: Leaves, v: Leaves) -> Sequence[Tensor]:
    """``f'(x) v`` by two reverse passes: PyTorch refuses forward mode inside forward mode."""
    value, pullback = torch.func.vjp(f, *x)[:2]
    _, push = torch.func.vjp(lambda *u: pullback(u), *[torch.zeros_like(leaf) for leaf in value])[:2]
    return cast(Sequence[Tensor], push(tuple(v)))


def _vjp(outputs: Leaves, inputs: Leaves, cotangents: Leaves, *, differentiable: bool = False) -> list[Tensor]:
    """Vector-Jacobian products with a graph that is kept for the next one; zeros where there is no dependence."""
    dependent = [(out, u) for out, u in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not dependent:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, us = zip(*dependent, strict=True)
    options: dict[str, bool] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(outs, list(inputs), us, create_graph=differentiable, **options))


def _pull_back(
    problem: Problem, z: Leaves, tensors: Leaves, captured: Leaves, w: Leaves, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """``(d map / d t)' u`` for each wanted t among ``tensors`` and ``captured``, differentiable if grad mode is on.

    u is the solution of the adjoint problem for w. Where nothing is differentiated further, one call of the map serves
    for that and for the product with u.
    """

    def adjoint_solution() -> Leaves:
        zero = [torch.zeros_like(leaf) for leaf in z]
        return fixed_point_of(problem.adjoint(len(z)), zero, (*w, *z, *tensors), captured)

    gradients: list[Tensor | None] = [None] * (len(tensors) + len(captured))
    some = [i for i in range(len(tensors)) if wanted[i] and tensors[i].is_floating_point()]
    others = [i for i in range(len(tensors), len(gradients)) if wanted[i]]
    if problem.transformed:

        def of_some(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(problem.map(z, _replaced(tensors, some, values)))

        _, pullback = torch.func.vjp(of_some, *[tensors[i] for i in some])[:2]
        found: Sequence[Tensor | None] = pullback(tuple(adjoint_solution()))
    else:
        # Copies cut the dependence of z on the tensors, so that what is left is the partial derivative.
        leaves = [t.detach().requires_grad_(i < len(z) or t.requires_grad) for i, t in enumerate((*z, *tensors))]
        with torch.enable_grad():
            outputs = problem.map(leaves[: len(z)], leaves[len(z) :])
        sources = [leaves[len(z) + i] for i in some] + [captured[i - len(tensors)] for i in others]
        u = (
            adjoint_solution()
            if torch.is_grad_enabled()
            else problem.solve_adjoint(outputs, leaves[: len(z)], w, tensors)
        )
        found = _gradients(outputs, sources, u, leaves, (*z, *tensors), captured)
    for i, gradient in zip((*some, *others), found, strict=True):
        gradients[i] = gradient
    return gradients


def _gradients(
    outputs: Leaves, sources: Leaves, cotangents: Leaves, copies: Leaves, originals: Leaves, captured: Leaves
) -> list[Tensor | None]:
    """Gradients of ``outputs``, which were computed from ``copies``, as functions of the ``originals``.

    With grad mode on, the gradients are computed with a graph on the copies, and that graph is attached to the
    originals, so that it can be differentiated again, and so on for every order.
    """
    differentiable = torch.is_grad_enabled()
    cotangents_copy = [u.detach().requires_grad_(differentiable) for u in cotangents]
    dependent = [(out, u) for out, u in zip(outputs, cotangents_copy, strict=True) if out.requires_grad]
    if not dependent or not sources:
        return [None] * len(sources)
    outs, us = zip(*dependent, strict=True)
    gradients = torch.autograd.grad(
        outs, list(sources), us, retain_graph=True, create_graph=differentiable, allow_unused=True
    )
    if not differentiable:
        return list(gradients)
    return _attach(gradients, (*copies, *cotangents_copy), (*originals, *cotangents), captured)


def _attach(
    outputs: Sequence[Tensor | None], copies: Leaves, originals: Leaves, captured: Leaves
) -> list[Tensor | None]:
    """``outputs``, whose graph ends in ``copies`` and ``captured``, as functions of ``originals`` and ``captured``."""
    present = [out for out in outputs if out is not None]
    if not present:
        return list(outputs)
    attached = iter(_Attach.apply(present, list(copies), len(captured), *originals, *captured))
    return [None if out is None else next(attached) for out in outputs]


class _Attach(torch.autograd.Function):
    """The identity on values computed from copies, with the gradient of the originals. Plain autograd only."""

    @staticmethod
    def forward(
        ctx: Any, outputs: list[Tensor], copies: list[Tensor], num_captured: int, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sizes = (len(copies), num_captured)
        ctx.save_for_backward(*sources, *copies, *outputs)
        ctx.set_materialize_grads(True)
        return tuple(out.detach() for out in outputs)

    @staticmethod
    @one_vector_at_a_time
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        num_copies, num_captured = ctx.sizes
        originals, captured, rest = _split(ctx.saved_tensors, num_copies, num_captured)
        copies, outputs, _ = _split(rest, num_copies, len(cotangents))
        wanted = ctx.needs_input_grad[3:]
        sources = [*copies, *captured]
        some = [i for i in range(len(sources)) if wanted[i] and sources[i].requires_grad]
        found = _gradients(outputs, [sources[i] for i in some], cotangents, copies, originals, captured)
        gradients: list[Tensor | None] = [None] * len(sources)
        for i, gradient in zip(some, found, strict=True):
            gradients[i] = gradient
        return (None, None, None, *gradients)
