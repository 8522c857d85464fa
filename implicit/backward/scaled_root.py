"""A root as a fixed point, for backward modes that differentiate steps of a map."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from implicit.autograd.problem import jvp
from solvers.problem import Layout, inner, inverse_or_zero


def as_fixed_point(
    f: Callable[..., Any], value: Any, z0: Any, args: tuple[Any, ...], batch_dims: int
) -> Callable[..., Any]:
    """The map ``z - c f(z)``, with a number c for each sample that makes it flat at ``value`` along the way from z0.

    Args:
        f: The function whose root is ``value``.
        value: The root.
        z0: The start.
        args: Further arguments of ``f``.
        batch_dims: How many leading dimensions index samples.
    """
    value, z0, args = (tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, t) for t in (value, z0, args))
    layout = Layout(value, batch_dims)
    way = layout.pack(value) - layout.pack(z0)  # (B, D)
    way = torch.where((way != 0).any(dim=1, keepdim=True), way, 1.0)
    leaves, spec = tree_flatten(value)

    def of_leaves(*z: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_flatten(f(tree_unflatten(list(z), spec), *args))[0])

    image = layout.pack(tree_unflatten(list(jvp(of_leaves, leaves, tree_flatten(layout.unpack(way))[0])), spec))
    c = inner(way, image) * inverse_or_zero(inner(image, image), 0.0)
    c = torch.where(c != 0, c, 1.0)
    scaling = layout.unpack(c.expand_as(way).contiguous())

    def map_(z: Any, *args: Any) -> Any:
        return tree_map(lambda x, c, fx: x - (c * fx).to(x.dtype), z, scaling, f(z, *args))

    return map_
