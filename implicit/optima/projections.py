"""Projections onto convex sets, differentiable almost everywhere; each along the last dimension of a tensor.

The shapes, and what is given as a Python number, are checked. The values of tensors are not, because a check would wait
for the device: where they describe an empty set, or not one set, the result is NaN.
"""

import math

import torch
from torch import Tensor

from solvers.problem import as_float

Number = float | Tensor


def project_box(x: Tensor, low: Number | None = None, high: Number | None = None) -> Tensor:
    """The nearest point whose entries are between ``low`` and ``high``; ``low=0`` gives the nonnegative ones.

    Args:
        x: Any shape.
        low: A number, or a tensor that is broadcast against x; None is no bound.
        high: Likewise; at least ``low``. Where tensors say otherwise, the result is NaN.

    Raises:
        ValueError: Both are numbers and ``low`` is larger than ``high``, or a number is NaN.

    Example:
        >>> import torch
        >>> from implicit.optima import project_box
        >>> project_box(torch.tensor([-1.0, 0.5, 3.0]), 0.0, 1.0)
        tensor([0.0000, 0.5000, 1.0000])
    """
    _require_floating(x)
    least, most = as_float(-math.inf if low is None else low), as_float(math.inf if high is None else high)
    if least is not None and most is not None and not least <= most:
        raise ValueError(f"project_box needs numbers low <= high, got low={low!r} and high={high!r}.")
    if least is None or most is None:  # tensors, which may describe no box
        low, high = -math.inf if low is None else low, math.inf if high is None else high
    low = low if low is None else torch.as_tensor(low, dtype=x.dtype, device=x.device)
    high = high if high is None else torch.as_tensor(high, dtype=x.dtype, device=x.device)
    limit = high  # that x is compared with; with NaN nothing compares
    if low is not None and high is not None and (least is None or most is None):
        limit, high = (torch.where(low <= high, high, empty) for empty in (-math.inf, math.nan))
    # At a bound the derivative is that from outside.
    if low is not None:
        x = torch.where(x <= low, low, x)
    if high is not None and limit is not None:
        x = torch.where(x >= limit, high, x)
    return x


def project_simplex(x: Tensor, total: Number = 1.0) -> Tensor:
    """The nearest point with nonnegative entries that sum to ``total``: ``max(x - threshold, 0)``.

    Args:
        x: (..., D).
        total: The sum, >= 0: a number or (...). Where a tensor is negative, the result is NaN.

    Raises:
        ValueError: ``total`` is a number and not >= 0, or x has no entries along its last dimension.

    References:
        Held, Wolfe and Crowder, "Validation of subgradient optimization", Math. Programming 6 (1974).

    Example:
        >>> import torch
        >>> from implicit.optima import project_simplex
        >>> project_simplex(torch.tensor([0.9, 0.5, -2.0]))
        tensor([0.7000, 0.3000, 0.0000])
    """
    _require_vectors(x)
    if x.dtype.itemsize == 2:  # whose sums overflow, and count to 2048 at most
        return project_simplex(x.float(), total).to(x.dtype)
    total = nonnegative("project_simplex(total=...)", total)
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
        radius: A number >= 0 or (...). Where a tensor is negative, the result is NaN.

    Raises:
        ValueError: ``radius`` is a number and not >= 0, or x has no entries along its last dimension.
    """
    _require_vectors(x)
    radius = nonnegative("project_ball(radius=...)", radius)
    radius = torch.as_tensor(radius, dtype=x.dtype, device=x.device).unsqueeze(-1)
    # Scaled by the largest entry, squares neither overflow nor vanish.
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, 1.0)
    square = scaled.square().sum(dim=-1, keepdim=True)
    outside = ~(square.sqrt() * largest <= radius) | (radius == 0)  # also where a norm is NaN, as of an infinite x
    # The root of a number that is never 0, whose gradient is finite.
    scale = torch.where(outside, radius, 1.0) * torch.where(outside & (square != 0), square, 1.0).rsqrt()
    return torch.where(outside, scaled * scale, x)


def project_l1_ball(x: Tensor, radius: Number = 1.0) -> Tensor:
    """The nearest point whose absolute entries sum to at most ``radius``.

    Args:
        x: (..., D).
        radius: A number >= 0 or (...). Where a tensor is negative, the result is NaN.

    Raises:
        ValueError: ``radius`` is a number and not >= 0, or x has no entries along its last dimension.

    References:
        Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient projections onto the l1-ball for learning in high
        dimensions", ICML (2008).
    """
    _require_vectors(x)
    if x.dtype.itemsize == 2:
        return project_l1_ball(x.float(), radius).to(x.dtype)
    radius = nonnegative("project_l1_ball(radius=...)", radius)
    inside = x.abs().sum(dim=-1) <= torch.as_tensor(radius, dtype=x.dtype, device=x.device)
    return torch.where(inside.unsqueeze(-1), x, x.sign() * project_simplex(x.abs(), radius))


def project_hyperplane(x: Tensor, normal: Tensor, offset: Number = 0.0) -> Tensor:
    """The nearest point with ``normal . z = offset``.

    Args:
        x: (..., D).
        normal: (..., D), not zero; where it is, the result is NaN.
        offset: A number or (...).

    Raises:
        ValueError: The last dimensions of x and ``normal`` differ, or have no entries.
    """
    way, excess = _beyond(x, normal, offset)
    return x - excess.unsqueeze(-1) * way


def project_halfspace(x: Tensor, normal: Tensor, offset: Number = 0.0) -> Tensor:
    """The nearest point with ``normal . z <= offset``.

    Args:
        x: (..., D).
        normal: (..., D), not zero; where it is, the result is NaN.
        offset: A number or (...).

    Raises:
        ValueError: The last dimensions of x and ``normal`` differ, or have no entries.
    """
    way, excess = _beyond(x, normal, offset)
    return x - excess.clamp_min(0.0).unsqueeze(-1) * way


def project_affine(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The nearest point with ``a z = b``.

    Args:
        x: (..., D).
        a: (..., M, D) of full rank M <= D. Where a row depends on those above it, the result is NaN, also if some
            point satisfies all equations.
        b: (..., M).

    Raises:
        ValueError: The shapes do not fit together, or there are more equations than unknowns.
    """
    _require_vectors(x)
    if a.dim() < 2 or not a.shape[-2] <= a.shape[-1] == x.shape[-1] or b.shape[-1:] != a.shape[-2:-1]:
        raise ValueError(
            f"project_affine needs x (..., D), a (..., M, D) and b (..., M) with M <= D, got {tuple(x.shape)}, "
            f"{tuple(a.shape)} and {tuple(b.shape)}. Of more equations than unknowns, leave out those that follow from "
            "the others."
        )
    if x.dtype.itemsize == 2:
        return project_affine(x.float(), a.float(), b.float()).to(x.dtype)
    # Rows of a size of 1, and no product a a', whose condition number is the square of that of a.
    largest = a.detach().abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    rows, excess = a / largest, (a / largest) @ x.unsqueeze(-1) - b.unsqueeze(-1) / largest
    basis, triangle = torch.linalg.qr(rows.mT)
    # What is left of a row that depends on those above it is rounding, for which the system has a plausible solution.
    left = triangle.diagonal(dim1=-2, dim2=-1).abs().unsqueeze(-2)
    rounding = 16 * math.sqrt(max(1.0, x.shape[-1] / 4096)) * torch.finfo(x.dtype).eps
    dependent = left <= rounding * torch.linalg.vector_norm(rows.detach(), dim=-1).unsqueeze(-2)
    triangle = torch.where(dependent, math.nan, triangle)
    correction: Tensor = basis @ torch.linalg.solve_triangular(triangle.mT, excess, upper=False)
    return x - correction.squeeze(-1)


def _beyond(x: Tensor, normal: Tensor, offset: Number) -> tuple[Tensor, Tensor]:
    """The normal (..., D) with entries of at most 1, and how many times it (...) the point is beyond the plane."""
    _require_vectors(x)
    if normal.shape[-1:] != x.shape[-1:]:
        raise ValueError(
            f"The normal needs the last dimension of x, got {tuple(normal.shape)} for x of {tuple(x.shape)}."
        )
    # Scaled by the largest entry, squares neither overflow nor vanish.
    largest = normal.detach().abs().amax(dim=-1, keepdim=True)
    way = normal / largest
    return way, ((way * x).sum(dim=-1) - offset / largest.squeeze(-1)) / way.square().sum(dim=-1)


def nonnegative(name: str, value: Number) -> Number:
    """``value``, NaN where it is a tensor and negative; if it is a number, a ValueError that begins with ``name``."""
    if isinstance(value, Tensor):
        return torch.where(value >= 0, value, math.nan)
    number = as_float(value)
    if number is not None and not number >= 0:
        raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
    return value


def _require_vectors(x: Tensor) -> None:
    _require_floating(x)
    if not x.dim() or not x.shape[-1]:
        raise ValueError(
            f"The vectors along the last dimension of x are projected, and need an entry; got x of {tuple(x.shape)}. "
            "For single numbers, write x.unsqueeze(-1)."
        )


def _require_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"projections need a floating-point tensor, got {x.dtype}; convert it, as by x.float().")
