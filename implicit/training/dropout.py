"""Dropout masks for maps, which must not change during a solve."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout_mask(like: Tensor, p: float = 0.5, *, training: bool = True) -> Tensor:
    """Draw a dropout mask to pass to a map as an input, so that it is the same in every call of a solve.

        mask = 1 / (1 - p) with probability 1 - p, else 0.

    Use it instead of ``nn.Dropout`` inside a map. ``nn.Dropout`` draws a new mask at each call, so the map has no fixed
    point, the solver stagnates, and the derivative belongs to another map than the one that was solved. A mask that is
    drawn before the solve is an input like any other: the backward pass and the double backward pass see the same mask,
    even if the layer was used again in between. Each call of this function draws a new mask. Dropout on the input or
    the output of a layer can stay ``nn.Dropout``.

    A map with several dropouts takes a tuple or dictionary of masks. If ``like`` has size 1 in some dimension, the mask
    is shared along it: ``like=z[:, :1]`` gives one mask for all tokens, as in variational dropout.
    ``torch.vmap(..., randomness="different")`` draws a mask for each lane.

    Args:
        like: A tensor with the shape, dtype and device of the mask; its values do not matter.
        p: Probability of a zero, in [0, 1].
        training: If False, the mask is all ones; pass ``self.training``.

    Returns:
        The mask, without gradient.

    References:
        Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NeurIPS
        (2016). Bai, Kolter and Koltun, "Deep equilibrium models", NeurIPS (2019), use it for their maps.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, dropout_mask
        >>> layer = FixedPointLayer(lambda z, x, mask: 0.5 * torch.tanh(mask * z) + x)
        >>> x = torch.ones(2, 3)
        >>> z = layer(x, dropout_mask(x, 0.1, training=layer.training))
    """
    return F.dropout(torch.ones_like(like, requires_grad=False), p, training)
