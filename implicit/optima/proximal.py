"""Proximal operators, differentiable almost everywhere.

That of a convex g with a strength t is ``argmin over z of |z - x|^2 / 2 + t g(z)``; a step of proximal gradient descent
takes the step times the weight of g for t. A strength that is a negative number is a ValueError; where a tensor is
negative, the result is NaN, because a check would wait for the device.
"""

from torch import Tensor

from implicit.optima.projections import nonnegative, project_ball, project_box

Number = float | Tensor


def prox_l1(x: Tensor, strength: Number) -> Tensor:
    """Soft thresholding, the proximal operator of the sum of absolute values (the lasso).

    Args:
        x: Any shape.
        strength: t >= 0, a number or a tensor that is broadcast against x.

    Example:
        >>> import torch
        >>> from implicit.optima import prox_l1
        >>> prox_l1(torch.tensor([-2.0, 0.5, 3.0]), 1.0)
        tensor([-1.,  0.,  2.])
    """
    strength = nonnegative("prox_l1(strength=...)", strength)
    return x - project_box(x, -strength, strength)


def prox_elastic_net(x: Tensor, strength: Number, ridge: Number) -> Tensor:
    """The proximal operator of ``sum |z| + (ridge / 2) sum z^2``.

    Args:
        x: Any shape.
        strength: t >= 0, a number or a tensor that is broadcast against x.
        ridge: The weight of the squares beside that of the absolute values, >= 0; likewise.
    """
    strength = nonnegative("prox_elastic_net(strength=...)", strength)
    return prox_l1(x, strength) / (1 + strength * nonnegative("prox_elastic_net(ridge=...)", ridge))


def prox_squared_l2(x: Tensor, strength: Number) -> Tensor:
    """The proximal operator of ``sum z^2 / 2`` (a ridge).

    Args:
        x: Any shape.
        strength: t >= 0, a number or a tensor that is broadcast against x.
    """
    return x / (1 + nonnegative("prox_squared_l2(strength=...)", strength))


def prox_group_lasso(x: Tensor, strength: Number) -> Tensor:
    """Block soft thresholding, the proximal operator of the sum of Euclidean norms along the last dimension.

    Args:
        x: (..., D); each vector along the last dimension is a group.
        strength: t >= 0, a number or (...), one for each group.
    """
    strength = nonnegative("prox_group_lasso(strength=...)", strength)
    return x - project_ball(x, strength)  # Moreau's decomposition
