"""Projections onto convex sets, differentiable almost everywhere; each along the last dimension of a tensor."""

import torch
from torch import Tensor

Number = float | Tensor


def project_box(x: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    """The nearest point whose entries are between ``low`` and ``high``; ``low=0`` gives the nonnegative ones.

    Args:
        x: Any shape.
        low: A number, or a tensor that is broadcast against x; None is no bound.
        high: Likewise; at least ``low``.

    Example:
        >>> import torch
        >>> from implicit.optima import project_box
        >>> project_box(torch.tensor([-1.0, 0.5, 3.0]), 0.0, 1.0)
        tensor([0.0000, 0.5000, 1.0000])
    """
    _require_floating(x)
    # At a bound the derivative is that from outside.
    if low is not None:
        low = torch.as_tensor(low, dtype=x.dtype, device=x.device)
        x = torch.where(x <= low, low, x)
    if high is not None:
        high = torch.as_tensor(high, dtype=x.dtype, device=x.device)
        x = torch.where(x >= high, high, x)
    return x


def project_simplex(x: Tensor, total: Number = 1.0) -> Tensor:
    """The nearest point with nonnegative entries that sum to ``total``: ``max(x - threshold, 0)``.

    Args:
        x: (..., D).
        total: The sum, > 0: a number or (...).

    References:
        Held, Wolfe and Crowder, "Validation of subgradient optimization", Math. Programming 6 (1974).

    Example:
        >>> import torch
        >>> from implicit.optima import project_simplex
        >>> project_simplex(torch.tensor([0.9, 0.5, -2.0]))
        tensor([0.7000, 0.3000, 0.0000])
    """
    _require_floating(x)
    if x.dtype.itemsize == 2:  # whose sums overflow, and count to 2048 at most
        return project_simplex(x.float(), total).to(x.dtype)
    total = torch.as_tensor(total, dtype=x.dtype, device=x.device).unsqueeze(-1)
    # The projection does not depend on a common shift. After this one, the positive entries are within `total` of 0.
    x = x - x.detach().amax(dim=-1, keepdim=True)
    ordered = x.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    thresholds = (ordered.cumsum(dim=-1) - total) / count
    # The number of positive entries of the projection; the largest one always is.
    positive = (ordered > thresholds).sum(dim=-1, keepdim=True).clamp_min(1)
    return (x - thresholds.gather(-1, positive - 1)).clamp_min(0.0)


def project_ball(x: Tensor, radius: Number = 1.0) -> Tensor:
    """The nearest point of Euclidean norm at most ``radius``.

    Args:
        x: (..., D).
        radius: A number > 0 or (...).
    """
    _require_floating(x)
    radius = torch.as_tensor(radius, dtype=x.dtype, device=x.device).unsqueeze(-1)
    # Scaled by the largest entry, squares neither overflow nor vanish.
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, 1.0)
    square = scaled.square().sum(dim=-1, keepdim=True)
    outside = (square.sqrt() * largest > radius) | (radius == 0)
    # The root of a number that is never 0, whose gradient is finite.
    return torch.where(outside, scaled * (radius * torch.where(outside & (square > 0), square, 1.0).rsqrt()), x)


def project_l1_ball(x: Tensor, radius: Number = 1.0) -> Tensor:
    """The nearest point whose absolute entries sum to at most ``radius``.

    Args:
        x: (..., D).
        radius: A number > 0 or (...).

    References:
        Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient projections onto the l1-ball for learning in high
        dimensions", ICML (2008).
    """
    _require_floating(x)
    if x.dtype.itemsize == 2:
        return project_l1_ball(x.float(), radius).to(x.dtype)
    inside = x.abs().sum(dim=-1) <= torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    return torch.where(inside.unsqueeze(-1), x, x.sign() * project_simplex(x.abs(), radius))


def project_hyperplane(x: Tensor, normal: Tensor, offset: Number = 0.0) -> Tensor:
    """The nearest point with ``normal . z = offset``.

    Args:
        x: (..., D).
        normal: (..., D), not zero.
        offset: A number or (...).
    """
    way, excess = _beyond(x, normal, offset)
    return x - excess.unsqueeze(-1) * way


def project_halfspace(x: Tensor, normal: Tensor, offset: Number = 0.0) -> Tensor:
    """The nearest point with ``normal . z <= offset``.

    Args:
        x: (..., D).
        normal: (..., D), not zero.
        offset: A number or (...).
    """
    way, excess = _beyond(x, normal, offset)
    return x - excess.clamp_min(0.0).unsqueeze(-1) * way


def project_affine(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The nearest point with ``a z = b``.

    Args:
        x: (..., D).
        a: (..., M, D) of full rank M <= D.
        b: (..., M).
    """
    _require_floating(x)
    if x.dtype.itemsize == 2:
        return project_affine(x.float(), a.float(), b.float()).to(x.dtype)
    # Rows of a size of 1, and no product a a', whose condition number is the square of that of a.
    largest = a.detach().abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    rows, excess = a / largest, (a / largest) @ x.unsqueeze(-1) - b.unsqueeze(-1) / largest
    basis, triangle = torch.linalg.qr(rows.mT)
    correction: Tensor = basis @ torch.linalg.solve_triangular(triangle.mT, excess, upper=False)
    return x - correction.squeeze(-1)


def _beyond(x: Tensor, normal: Tensor, offset: Number) -> tuple[Tensor, Tensor]:
    """The normal (..., D) with entries of at most 1, and how many times it (...) the point is beyond the plane."""
    _require_floating(x)
    # Scaled by the largest entry, squares neither overflow nor vanish.
    largest = normal.detach().abs().amax(dim=-1, keepdim=True)
    way = normal / largest
    return way, ((way * x).sum(dim=-1) - offset / largest.squeeze(-1)) / way.square().sum(dim=-1)


def _require_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"projections need a floating-point tensor, got {x.dtype}; convert it, as by x.float().")
