"""Dropout in a map that must not change during a solve."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout_mask(like: Tensor, p: float = 0.5, *, training: bool = True) -> Tensor:
    """A dropout mask to give to a map as an input, so that it is the same in every call of a solve.

        mask = 1 / (1 - p) with probability 1 - p, else 0.

    ``nn.Dropout`` within a map draws anew at each call: the map has no fixed point, the solver stagnates, and the
    derivative is taken of another map than the one that was solved. Drawn before the solve and passed as an input, the
    mask belongs to the solve as any input does. The backward pass and double backward see the same mask, also after
    another use of the layer; ``torch.vmap(..., randomness="different")`` draws one for each lane. A new mask is drawn
    when this function is called again. Dropout of what goes into the layer or comes out of it needs none of this.

    A map with several dropouts takes a tuple or a dict of masks. A ``like`` of size 1 in some dimension makes a mask
    that is shared along it: one for all tokens, ``like=z[:, :1]``, as variational dropout has it.

    Args:
        like: A tensor of the shape, dtype and device of the mask; its values do not matter.
        p: Probability of a zero, in [0, 1].
        training: Without it the mask is ones; give ``self.training``.

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
