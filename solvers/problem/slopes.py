"""The slope of a function along its own value, from one product with its Jacobian."""

import torch
from torch import Tensor

from solvers.problem.small_systems import inverse_or_zero


def direction_of(residual: Tensor) -> Tensor:
    """(B, D) -> (B, D) the direction of each row, of length 1; along the diagonal where the row is zero."""
    size = residual.abs().amax(dim=1, keepdim=True) if residual.shape[1] else residual
    direction = torch.where(size > 0, residual * inverse_or_zero(size, 0.0), 1.0)
    length: Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return direction / length


def slope_inverse(direction: Tensor, product: Tensor) -> Tensor:
    """(B, 1) the number c for which ``c * product`` is nearest to the unit vector ``direction`` (B, D).

    At least a tenth of ``1 / |product|`` in size; not finite where the product is zero or not finite.
    """
    size: Tensor = torch.linalg.vector_norm(product, dim=1, keepdim=True)
    cosine = (direction * (product / size)).sum(dim=1, keepdim=True)
    least = torch.where(cosine < 0, -0.1, 0.1).to(cosine)
    return torch.where(cosine.abs() < 0.1, least, cosine) / size
