"""Newton's method with dense matrices, for reference solutions of small problems."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def entries(state: Any) -> Tensor:
    """(B, n) all entries of a state."""
    return torch.cat([leaf.flatten(1) for leaf in tree_leaves(state)], dim=1)


def newton_step(f: Callable[[Any], Any], state: Any) -> Any:
    """A step of Newton's method on ``z - f(z) = 0``, the shortest one where I - J is singular."""
    leaves, spec = tree_flatten(state)

    def flat(z: Tensor) -> Tensor:
        parts = z.split([leaf[0].numel() for leaf in leaves], dim=1)
        like = [part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)]
        return entries(f(tree_unflatten(like, spec)))

    z = entries(state)
    n = z.shape[1]
    columns = [torch.func.jvp(flat, (z,), (row.expand_as(z),))[1] for row in torch.eye(n, dtype=z.dtype)]
    system = torch.eye(n, dtype=z.dtype) - torch.stack(columns, dim=2)
    step = torch.linalg.lstsq(system, (flat(z) - z).unsqueeze(2), rcond=1e-11, driver="gelsd").solution.squeeze(2)
    parts = (z + step).split([leaf[0].numel() for leaf in leaves], dim=1)
    return tree_unflatten([part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)], spec)
