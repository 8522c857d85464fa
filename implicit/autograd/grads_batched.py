"""``torch.autograd.grad(..., is_grads_batched=True)`` through a Function that makes decisions.

It hands tensors with a hidden dimension to the backward pass, those of the ``vmap`` that was before torch.func, for
which no Function can have a rule. So do ``torch.autograd.functional.jacobian(vectorize=True)`` and gradcheck's
``check_batched_grad``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Derivative = Callable[..., tuple[Tensor | None, ...]]


def one_by_one(derivative: Derivative) -> Derivative:
    """``derivative(ctx, *tensors)``, of tensors with a hidden dimension for one index after the other."""

    @functools.wraps(derivative)
    def wrapped(ctx: Any, *tensors: Any) -> tuple[Tensor | None, ...]:
        if not any(_has_hidden_dimension(x) for x in tensors):
            return derivative(ctx, *tensors)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        # A tensor without the dimension gets it, in the size that is given.
        size = max(len(torch._remove_batch_dim(x, level, 1, 0)) for x in tensors if isinstance(x, Tensor))
        every = [torch._remove_batch_dim(x, level, size, 0) if isinstance(x, Tensor) else x for x in tensors]
        results = [derivative(ctx, *(x[i] if isinstance(x, Tensor) else x for x in every)) for i in range(size)]
        return tuple(
            None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
            for column in zip(*results, strict=True)
        )

    return wrapped


def _has_hidden_dimension(x: Any) -> bool:
    return isinstance(x, Tensor) and torch._C._dispatch_keys(x).has("Batched")
