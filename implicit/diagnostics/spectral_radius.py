"""The spectral radius of a map's Jacobian."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.autograd.constant_weights import constant_weights
from solvers.problem.flat_map import FlatMap
from solvers.problem.hyperparameters import checked_int
from solvers.problem.layout import Layout
from solvers.problem.small_systems import inverse_or_zero
from solvers.problem.window import combine, dot, store


@dataclasses.dataclass(frozen=True)
class SpectralRadius:
    """The largest eigenvalue of the Jacobian of each sample, as estimated by :func:`spectral_radius`.

    Attributes:
        value: (B,) the absolute value of the eigenvalue.
        eigenvalue: (B,) the eigenvalue, complex; of a conjugate pair, the one with positive imaginary part.
        residual: (B,) the relative backward error: the eigenvalue is exact for some matrix that differs from the
            Jacobian by ``residual * value`` in the spectral norm. If the Jacobian is normal, it has an eigenvalue
            within this distance.
    """

    value: Tensor
    eigenvalue: Tensor
    residual: Tensor


@torch.no_grad()
def spectral_radius(
    f: Callable[..., Any],
    z: Any,
    *inputs: Any,
    steps: int = 20,
    generator: torch.Generator | None = None,
    batch_dims: int = 1,
) -> SpectralRadius:
    """Estimate the spectral radius of df/dz for each sample, which says how fast plain iteration converges near ``z``.

    Picard iteration converges near a fixed point if the radius is below 1; its error then shrinks by that factor per
    step in the limit. The eigenvalue says more. Near -1 or below, damping helps. For a complex pair, the iterates
    spiral, and Anderson acceleration and Broyden's method do well. Near +1, the problem is nearly singular and its
    gradient is large.

    The estimate is Arnoldi's: the largest eigenvalue of the transposed Jacobian, which has the same eigenvalues,
    restricted to the Krylov space of a random vector and ``steps`` products. It converges faster than power iteration,
    and it also finds complex pairs, for which power iteration does not converge. It is exact, up to rounding, once
    there are as many steps as entries in a sample. If ``residual`` is not small, take more steps. The cost is one call
    of f, ``steps`` vector-Jacobian products, and the memory of as many states.

    Args:
        f: The map, as in :func:`implicit.fixed_point`; it must not mix samples.
        z: The point at which the Jacobian is taken, usually the fixed point.
        *inputs: Passed to ``f`` after the state.
        steps: Number of vector-Jacobian products.
        generator: Source of the random vector; by default PyTorch's own generator.
        batch_dims: As in :func:`solvers.solve`.

    Returns:
        The :class:`SpectralRadius`, without gradient. It is NaN for samples whose Jacobian is not finite.

    Raises:
        TypeError, ValueError: The state, an option or the result of ``f`` is invalid.

    References:
        Saad, "Numerical methods for large eigenvalue problems", revised edition, SIAM (2011), algorithm 6.1.

    Example:
        >>> import torch
        >>> from implicit.diagnostics import spectral_radius
        >>> rotation = torch.tensor([[0.0, -0.9], [0.9, 0.0]])
        >>> spectral_radius(lambda z: z @ rotation, torch.zeros(1, 2)).value
        tensor([0.9000])
    """
    steps = checked_int("steps", steps)
    layout = Layout(z, batch_dims)
    flat = layout.pack(z)  # (B, D)
    with constant_weights():
        _, pullback = torch.func.vjp(FlatMap(f, inputs, layout), flat)[:2]
    start = torch.randn(flat.shape, generator=generator, dtype=flat.dtype, device=flat.device)
    hessenberg, below = arnoldi(lambda u: pullback(u)[0], start, min(steps, flat.shape[1]))
    finite = hessenberg.isfinite().all(dim=(1, 2))
    values, vectors = torch.linalg.eig(torch.where(finite[:, None, None], hessenberg, 0.0))
    # The absolute values of a conjugate pair may differ by rounding; prefer the one with positive imaginary part.
    largest = (values.abs() * (1 + 1e-6 * (values.imag >= 0))).argmax(dim=1)  # (B,)
    eigenvalue = values.gather(1, largest[:, None]).squeeze(1)
    last = vectors[:, -1].gather(1, largest[:, None]).squeeze(1).abs()
    radius = eigenvalue.abs()
    residual = torch.where(below == 0, 0.0, below * last / radius)
    found = SpectralRadius(*(x.masked_fill(~finite, torch.nan) for x in (radius, eigenvalue, residual)))
    return SpectralRadius(*(layout.unpack_batch(x) for x in (found.value, found.eigenvalue, found.residual)))


def arnoldi(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the Hessenberg matrices (B, m, m) of the Krylov spaces from ``start`` (B, D), and the entries (B,) below.

    When the Krylov space of a sample is exhausted, zeros fill its matrix, which only adds zero eigenvalues.
    """
    rounding = 20 * torch.finfo(start.dtype).eps
    norm = torch.linalg.vector_norm(start, dim=1, keepdim=True)
    basis = store(None, 0, start * inverse_or_zero(norm, 0.0), steps)
    hessenberg = start.new_zeros(len(start), steps + 1, steps)
    for j in range(steps):
        w = matvec(basis[:, j])
        size = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        used = basis[:, : j + 1]
        for _ in range(2):  # classical Gram-Schmidt, twice, is as accurate as Householder reflections
            h = dot(used, w)  # (B, j + 1)
            w = w - combine(used, h)
            hessenberg[:, : j + 1, j] += h
        below = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        below = torch.where(below <= rounding * size, 0.0, below)
        hessenberg[:, j + 1, j] = below.squeeze(1)
        if j + 1 < steps:
            basis = store(basis, j + 1, w * inverse_or_zero(below, 0.0), steps)
    return hessenberg[:, :-1], hessenberg[:, -1, -1]
