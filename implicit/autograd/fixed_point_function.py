"""The one autograd.Function of the library: the fixed point of a map, as a function of the map's tensors.

By the implicit function theorem, at z = f(z, t):

    reverse mode:  u = (df/dz)' u + w,      the gradient to t is (df/dt)' u,
    forward mode:  dz = (df/dz) dz + (df/dt) dt.

Both are again fixed points, of linear maps whose tensors are explicit, so the same Function solves them and is
differentiated in turn: every order of derivative and every mixture of modes follows from it.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from implicit.autograd.explicit_map import ExplicitMap
from implicit.autograd.problem import Leaves, Problem, jvp, split
from implicit.autograd.torch_internals import (
    backward_pass_keeps_graph,
    forward_mode_enabled,
    one_vector_at_a_time,
    transform_active,
    without_hooks,
    without_tangent,
)


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
        start, tensors, _ = split(flat, *sizes)
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
        z, tensors, captured = split(ctx.saved_tensors, *ctx.sizes)
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
        start, tensors, captured = split(flat, *sizes)
        start_dims, tensor_dims, _ = split(in_dims[2:], *sizes)
        start = [
            leaf.expand(info.batch_size, *leaf.shape) if dim is None else leaf.movedim(dim, 0)
            for leaf, dim in zip(start, start_dims, strict=True)
        ]
        value = fixed_point_of(problem.batched(tensor_dims, info.randomness), start, tensors, captured)
        return tuple(value), (0,) * len(value)


@one_vector_at_a_time
def _backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    num_leaves = ctx.sizes[0]
    z, tensors, captured = split(ctx.saved_tensors, *ctx.sizes)
    wanted = ctx.needs_input_grad[2 + num_leaves :]
    return (None, None, *[None] * num_leaves, *_pull_back(ctx.problem, z, tensors, captured, cotangents, wanted))


def _replaced(tensors: Leaves, positions: Sequence[int], values: Leaves) -> list[Tensor]:
    """``tensors`` with others at some positions."""
    every = list(tensors)
    for i, value in zip(positions, values, strict=True):
        every[i] = value
    return every


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
    some = [i for i in range(len(tensors)) if wanted[i] and (tensors[i].is_floating_point() or tensors[i].is_complex())]
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
        if isinstance(problem.map, ExplicitMap) and not any(output.requires_grad for output in outputs):
            raise RuntimeError(
                "There is no gradient, because what the map returned depends on no tensor that requires grad, not even "
                "on z: it runs under torch.no_grad() or torch.inference_mode(), or detaches its result. Take that out "
                "of the map; a solve records no graph anyway."
            )
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
    # What has been frozen since the forward pass needs none.
    needing = [source for source in sources if source.requires_grad]
    with without_hooks(captured):
        computed = torch.autograd.grad(
            outs, needing, us, retain_graph=True, create_graph=differentiable, allow_unused=True
        )
    supply = iter(computed)
    gradients = [next(supply) if source.requires_grad else None for source in sources]
    if not differentiable:
        return gradients
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
        originals, captured, rest = split(ctx.saved_tensors, num_copies, num_captured)
        copies, outputs, _ = split(rest, num_copies, len(cotangents))
        wanted = ctx.needs_input_grad[3:]
        sources = [*copies, *captured]
        some = [i for i in range(len(sources)) if wanted[i] and sources[i].requires_grad]
        found = _gradients(outputs, [sources[i] for i in some], cotangents, copies, originals, captured)
        gradients: list[Tensor | None] = [None] * len(sources)
        for i, gradient in zip(some, found, strict=True):
            gradients[i] = gradient
        return (None, None, None, *gradients)
