"""Batch normalization of a linear layer's output, folded into the layer's weight and bias."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fold_batch_norm(norm: nn.BatchNorm1d, weight: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weight and bias of one linear layer that computes ``norm(F.linear(x, weight))``.

    Given ``x``, the statistics are those of ``x``, gradients flow through them, and the running statistics are updated.
    Without it, they are the running statistics. The layer that is returned has them as constants.

    Args:
        norm: The batch normalization: running statistics, learned scale and shift.
        weight: (out, in) the weight of the linear layer. A bias would be removed by the normalization.
        x: (rows, in) the input of the linear layer, in training mode.

    Raises:
        ValueError: ``x`` has fewer than two rows, so that there are no statistics to take.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    mean, var = norm.running_mean, norm.running_var
    if x is not None:
        if len(x) < 2:
            raise ValueError(f"BatchNorm in training mode needs two rows or more to take statistics of, got {len(x)}.")
        output = F.linear(x, weight).to(mean.dtype)
        var, mean = torch.var_mean(output, dim=0, correction=0)
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (len(x) / (len(x) - 1)), norm.momentum)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return weight * scale.unsqueeze(1), norm.bias - mean * scale
