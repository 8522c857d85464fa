"""A fixed-point problem whose map's tensors are explicit, and the linear problems of its derivatives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from solvers import Solution, compiled_adjoint_solver, report_failure
from solvers.linear import LinearSolver, linear_solve
from solvers.problem import FlatMap, Layout, OnFailure, mixing_advice, relative, rms_norm, with_tensors
from solvers.problem.norms import FLOOR

Leaves = Sequence[Tensor]
Product = Callable[[Leaves], list[Tensor]]
Map = Callable[[Leaves, Leaves], list[Tensor]]
Report = Callable[[Solution], None] | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A fixed point ``z = map(z, tensors)``, or a root, and how it and its derivatives are solved for.

    A root is a z with ``map(z, tensors) = 0``. In what follows it has ``u = (df/dz)' u + w`` replaced by
    ``0 = (df/dz)' u + w``, which differs in the linear system alone, and so on for the other equations.

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
        root: Whether it is a root.
        traced: For a solve that is compiled: gives the map at the leaves of a state and a list of tensors as the linear
            solver compiles it, see :meth:`ExplicitMap.traced`.
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
    root: bool = False
    traced: Callable[[Leaves, Leaves], tuple[Any, ...] | None] | None = None

    def adjoint(self, num_leaves: int) -> "Problem":
        """``u = (df/dz)' u + w`` with the tensors (w, z, tensors of this problem)."""

        def adjoint_map(u: Leaves, tensors: Leaves) -> list[Tensor]:
            w, z, rest = split(tensors, num_leaves, num_leaves)
            return [a + b for a, b in zip(self._pulled_back(z, rest, u), w, strict=True)]

        def solve(map_: Map, zero: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
            if map_ is not adjoint_map:  # under vmap
                return self._solve_affine(map_, zero, tensors, batch_dims, self.report)
            w, z, rest = split(tensors, num_leaves, num_leaves)
            z = [leaf.detach().requires_grad_() for leaf in z]
            with torch.enable_grad():
                fz = self.map(z, rest)
            return self.solve_adjoint(fz, z, w, rest)

        return dataclasses.replace(self, map=adjoint_map, solve=solve, report=None, traced=None)

    def _pulled_back(self, z: Leaves, tensors: Leaves, u: Leaves) -> Sequence[Tensor]:
        """``(df/dz)' u``, differentiable."""
        if self.transformed:
            _, pullback = torch.func.vjp(lambda *leaves: tuple(self.map(leaves, tensors)), *z)[:2]
            return cast(Sequence[Tensor], pullback(tuple(u)))
        # Not by torch.func, which refuses hooks on saved tensors.
        with torch.enable_grad():
            z = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in z]
            return vjp(self.map(z, tensors), z, u, differentiable=True)

    def solve_adjoint(self, fz: Leaves, z: Leaves, w: Leaves, tensors: Leaves) -> list[Tensor]:
        """``u = (df/dz)' u + w``, with the graph of ``fz``, the map at z."""
        solver = self._solver(tensors)
        traced = None if self.traced is None else self.traced(z, tensors)
        if traced is not None:
            solver = compiled_adjoint_solver(solver, *traced, batch_dims=self.batch_dims)
        return self._solve_linear(
            lambda u: vjp(fz, z, u), w, solver, self.batch_dims, self.report, lambda v: jvp_of_graph(fz, z, v)
        )

    def solve_adjoint_by_transform(self, z: Leaves, tensors: Leaves, w: Leaves) -> list[Tensor]:
        """The same by ``torch.func``, which torch.compile traces; not differentiable."""
        _, pullback = torch.func.vjp(lambda *leaves: tuple(self.map(leaves, tensors)), *z)[:2]
        return self._solve_linear(
            lambda u: list(pullback(tuple(u))), w, self._solver(tensors), self.batch_dims, self.report
        )

    def tangent(self, num_leaves: int) -> "Problem":
        """``v = (df/dz) v + t`` with the tensors (t, z, tensors of this problem)."""

        def tangent_map(v: Leaves, tensors: Leaves) -> list[Tensor]:
            t, z, rest = split(tensors, num_leaves, num_leaves)
            return [a + b for a, b in zip(jvp(lambda *leaves: tuple(self.map(leaves, rest)), z, v), t, strict=True)]

        def solve(map_: Map, zero: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
            return self._solve_affine(map_, zero, tensors, batch_dims)

        return dataclasses.replace(self, map=tangent_map, solve=solve, report=None, traced=None)

    def batched(self, in_dims: Sequence[int | None], randomness: str) -> "Problem":
        """This problem for every entry of one more leading dimension of the state, under torch.func.vmap."""

        def batched_map(z: Leaves, tensors: Leaves) -> list[Tensor]:
            mapped = torch.func.vmap(self.map, in_dims=(0, list(in_dims)), randomness=randomness)
            return mapped(list(z), list(tensors))

        solve = self.solve.mapped(in_dims) if isinstance(self.solve, OneAtATime) else self.solve
        return dataclasses.replace(self, map=batched_map, solve=solve, batch_dims=self.batch_dims + 1, traced=None)

    def _solve_affine(
        self, map_: Map, zero: Leaves, tensors: Leaves, batch_dims: int, report: Report = None
    ) -> list[Tensor]:
        """The fixed point of an affine map, evaluated as it stands."""
        offset = map_(zero, tensors)

        def product(u: Leaves) -> list[Tensor]:
            return [a - b for a, b in zip(map_(u, tensors), offset, strict=True)]

        return self._solve_linear(product, offset, self._solver(tensors), batch_dims, report)

    def _solver(self, tensors: Leaves) -> LinearSolver:
        """The linear solver, with its tensors, which are the last of those that the map depends on."""
        if not self.num_solver_tensors:
            return self.adjoint_solver
        supply = iter(tensors[-self.num_solver_tensors :])
        return with_tensors(self.adjoint_solver, lambda _: next(supply))

    def _solve_linear(
        self,
        product: Product,
        rhs: Leaves,
        solver: LinearSolver,
        batch_dims: int,
        report: Report,
        transposed: Product | None = None,
    ) -> list[Tensor]:
        """Solve ``u - product(u) = rhs``, or ``-product(u) = rhs`` for a root."""

        def operator(product: Product, u: Leaves) -> list[Tensor]:
            return [-b for b in product(u)] if self.root else [a - b for a, b in zip(u, product(u), strict=True)]

        matvec = functools.partial(operator, product)
        solution = linear_solve(
            matvec,
            list(rhs),
            solver,
            rmatvec=None if transposed is None else functools.partial(operator, transposed),
            rtol=None if self.rtol is None else max(self.rtol, self.resolution),
            rescale=self.root,
            batch_dims=batch_dims,
            on_failure="ignore",
        )
        if report is not None:
            report(solution)
        if solver.tested and bool(solution.failed.any()) and self._failed(solution, rhs, batch_dims):
            advice = functools.partial(_advice, matvec, list(rhs), batch_dims)
            report_failure(solution, self.on_failure, self.what, advice=advice)
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


@dataclasses.dataclass(frozen=True)
class OneAtATime:
    """Solves by code that takes no batch: under torch.func.vmap it is called for one entry after the other.

    Attributes:
        of_tensors: ``tensors -> leaves of the solution``.
    """

    of_tensors: Callable[[Leaves], list[Tensor]]

    def __call__(self, map_: Map, z0: Leaves, tensors: Leaves, batch_dims: int) -> list[Tensor]:
        return self.of_tensors(tensors)

    def mapped(self, in_dims: Sequence[int | None]) -> "OneAtATime":
        """The same for every entry of one more dimension of the tensors, which is the first of the solution's."""

        def of_tensors(tensors: Leaves) -> list[Tensor]:
            size = next(tensor.shape[dim] for tensor, dim in zip(tensors, in_dims, strict=True) if dim is not None)
            rows = [
                self.of_tensors(
                    [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)]
                )
                for i in range(size)
            ]
            return [torch.stack(column) for column in zip(*rows, strict=True)]

        return OneAtATime(of_tensors)


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


def split(flat: Sequence[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    """The first so many, the second so many, and the rest."""
    return list(flat[:first]), list(flat[first : first + second]), list(flat[first + second :])


def jvp(f: Callable[..., tuple[Tensor, ...]], x: Leaves, v: Leaves) -> Sequence[Tensor]:
    """``f'(x) v`` by two reverse passes: PyTorch refuses forward mode inside forward mode."""
    value, pullback = torch.func.vjp(f, *x)[:2]
    _, push = torch.func.vjp(lambda *u: pullback(u), *[torch.zeros_like(leaf) for leaf in value])[:2]
    return cast(Sequence[Tensor], push(tuple(v)))


def jvp_of_graph(outputs: Leaves, inputs: Leaves, v: Leaves) -> list[Tensor]:
    """Jacobian-vector products with a graph that is kept, by differentiating its vector-Jacobian product."""
    with torch.enable_grad():
        u = [torch.zeros_like(leaf, requires_grad=True) for leaf in outputs]
        pulled = vjp(outputs, inputs, u, differentiable=True)
    return vjp(pulled, u, v)


def _advice(matvec: Callable[[Leaves], list[Tensor]], rhs: list[Tensor], batch_dims: int) -> str:
    """What may be wrong with a linear problem that was not solved, as far as a few products tell."""
    layout = Layout(rhs, batch_dims)
    product = FlatMap(lambda v: matvec(tree_leaves(v)), (), layout)
    product.called = "The map"
    return mixing_advice(product, layout.pack(rhs), layout.batch_shape)


def vjp(outputs: Leaves, inputs: Leaves, cotangents: Leaves, *, differentiable: bool = False) -> list[Tensor]:
    """Vector-Jacobian products with a graph that is kept for the next one; zeros where there is no dependence."""
    dependent = [(out, u) for out, u in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not dependent:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outs, us = zip(*dependent, strict=True)
    options: dict[str, bool] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(outs, list(inputs), us, create_graph=differentiable, **options))
