"""Batch normalization of a linear layer's output, folded into the layer's weight and bias."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fold_batch_norm(norm: nn.BatchNorm1d, weight: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weight and bias of the one linear layer that does what ``norm(F.linear(x, weight))`` does.

    The statistics are those of ``x``, differentiated, and the running ones are advanced; or, without it, the running
    ones. Either way they are constants of what is done with the result.

    Args:
        norm: Holds the statistics, and the scale and shift that are learned.
        weight: (out, in) the layer's; it needs no bias, which the normalization would remove.
        x: (rows, in) the layer's input, for training mode.

    Raises:
        ValueError: There is a single row to take statistics of.
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
