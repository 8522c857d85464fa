"""What ``torch.compile`` traces, or leaves out of its graphs. Imported while it traces: it loads PyTorch's compiler.

The implicit mode, to the first order in reverse mode: ``torch.compile`` traces no Function that has a jvp, decides on
the host or changes anything global. So the solve is plain code without gradients, and one call of the map at the
solution z takes the gradient to all that the map depends on. What is left between the two is ``w -> u = (df/dz)' u +
w``, a Function of its own, and where its linear solver tests convergence it stays outside of the graph.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.autograd.problem import Leaves, Problem
from implicit.autograd.torch_internals import Cache, reading_from_cache


def with_adjoint(problem: Problem, image: Leaves, z: Leaves, tensors: Leaves) -> list[Tensor]:
    """The fixed point z, whose gradient is solved for and handed to its ``image`` under the map."""
    return list(_WithAdjoint.apply(problem, len(z), *image, *z, *tensors))


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="The linear solver of the implicit backward mode tests convergence on the host. For one graph take one that "
    "does not, such as Implicit(linear_solver=NeumannSeries(terms=n)).",
)
def with_eager_adjoint(problem: Problem, image: Leaves, z: Leaves, tensors: Leaves, weights: Cache) -> list[Tensor]:
    """The same for a backward pass that is not traced; ``weights`` is PyTorch's cache of them from the solve."""
    constant = {key: None if weight is None else weight.detach() for key, weight in weights.items()}

    def map_(z: Leaves, tensors: Leaves) -> list[Tensor]:
        with reading_from_cache(constant):
            return problem.map(z, tensors)

    return with_adjoint(dataclasses.replace(problem, map=map_), image, z, tensors)


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, num_leaves: int, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.problem, ctx.num_leaves, ctx.num_inputs = problem, num_leaves, len(flat)
        ctx.save_for_backward(*flat[num_leaves:])
        return tuple(leaf.view_as(leaf) for leaf in flat[num_leaves : 2 * num_leaves])

    @staticmethod
    def backward(ctx: Any, *w: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "A compiled implicit layer has no second derivative. Call it outside torch.compile, which itself "
                "refuses double backward."
            )
        z, tensors = ctx.saved_tensors[: ctx.num_leaves], ctx.saved_tensors[ctx.num_leaves :]
        u = ctx.problem.solve_adjoint_by_transform(z, tensors, w)
        return (None, None, *u, *[None] * (ctx.num_inputs - ctx.num_leaves))


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="Checkpointed repeats its steps by torch.utils.checkpoint, which is not traced here. For one graph use "
    "Unrolled(), which has the same gradients; the compiler then chooses what to compute again.",
)
def run_outside_graph(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in eager mode."""
    return function(*args)
