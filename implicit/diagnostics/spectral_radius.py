"""The spectral radius of a map's Jacobian."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.autograd.constant_weights import constant_weights
from solvers.problem.flat_map import FlatMap
from solvers.problem.layout import Layout
from solvers.problem.small_systems import inverse_or_zero
from solvers.problem.window import combine, dot, store


@dataclasses.dataclass(frozen=True)
class SpectralRadius:
    """The largest eigenvalue of the Jacobian of each sample, as :func:`spectral_radius` estimates it.

    Attributes:
        value: (B,) its absolute value.
        eigenvalue: (B,) complex; of a pair the one with the positive imaginary part.
        residual: (B,) how far it is from being one: exact for a matrix that differs from the Jacobian by
            ``residual * value`` in the spectral norm. So far, at most, is an eigenvalue if the Jacobian is normal.
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
    """The spectral radius of df/dz, for each sample: whether and how fast plain iteration converges near ``z``.

    Picard iteration converges near a fixed point if the radius is below 1, and its error shrinks by that factor a step
    in the end. The eigenvalue says more: near -1 or beyond, damping
    helps; a complex pair spirals, where Anderson acceleration and Broyden's method do well; near +1 the problem is
    nearly singular, its gradient large.

    The method is Arnoldi's: ``steps`` products with the transposed Jacobian, which has the same eigenvalues, span a
    Krylov space from a random start, and the largest eigenvalue of the Jacobian's section in it is returned. It
    converges faster than power iteration, the last vector of the same space, and finds complex pairs, on which that
    one does not converge at all. It is exact, to rounding, after as many steps as a sample has entries. ``residual``
    tells how far it got; where that is not small, take more steps. Costs one call of f, ``steps`` vector-Jacobian
    products, and as many states in memory.

    Args:
        f: The map, as of :func:`implicit.fixed_point`: it must not mix samples.
        z: Where the Jacobian is taken, usually the fixed point.
        *inputs: Handed to ``f`` after the state.
        steps: Vector-Jacobian products.
        generator: Source of the random start; by default PyTorch's own.
        batch_dims: As in :func:`solvers.solve`.

    Returns:
        The :class:`SpectralRadius`, without gradient; nan for a sample whose Jacobian is not finite.

    Raises:
        TypeError, ValueError: The state, an option or what ``f`` returns is unfit.

    References:
        Saad, "Numerical methods for large eigenvalue problems", revised edition, SIAM (2011), algorithm 6.1.

    Example:
        >>> import torch
        >>> from implicit.diagnostics import spectral_radius
        >>> rotation = torch.tensor([[0.0, -0.9], [0.9, 0.0]])
        >>> spectral_radius(lambda z: z @ rotation, torch.zeros(1, 2)).value
        tensor([0.9000])
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    layout = Layout(z, batch_dims)
    flat = layout.pack(z)  # (B, D)
    with constant_weights():
        _, pullback = torch.func.vjp(FlatMap(f, inputs, layout), flat)[:2]
    start = torch.randn(flat.shape, generator=generator, dtype=flat.dtype, device=flat.device)
    hessenberg, below = _arnoldi(lambda u: pullback(u)[0], start, min(steps, flat.shape[1]))
    finite = hessenberg.isfinite().all(dim=(1, 2))
    values, vectors = torch.linalg.eig(torch.where(finite[:, None, None], hessenberg, 0.0))
    # Of a pair, whose absolute values may differ by rounding, the one above the real axis.
    largest = (values.abs() * (1 + 1e-6 * (values.imag >= 0))).argmax(dim=1)  # (B,)
    eigenvalue = values.gather(1, largest[:, None]).squeeze(1)
    last = vectors[:, -1].gather(1, largest[:, None]).squeeze(1).abs()
    radius = eigenvalue.abs()
    residual = torch.where(below == 0, 0.0, below * last / radius)
    found = SpectralRadius(*(x.masked_fill(~finite, torch.nan) for x in (radius, eigenvalue, residual)))
    return SpectralRadius(*(layout.unpack_batch(x) for x in (found.value, found.eigenvalue, found.residual)))


def _arnoldi(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The sections (B, m, m) of a matrix in its Krylov spaces from ``start`` (B, D), and the norms (B,) of the rest.

    A sample whose Krylov space is exhausted goes on with zeros, which add zero eigenvalues.
    """
    rounding = 20 * torch.finfo(start.dtype).eps
    norm = torch.linalg.vector_norm(start, dim=1, keepdim=True)
    basis = store(None, 0, start * inverse_or_zero(norm, 0.0), steps)
    hessenberg = start.new_zeros(len(start), steps + 1, steps)
    for j in range(steps):
        w = matvec(basis[:, j])
        size = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        used = basis[:, : j + 1]
        for _ in range(2):  # classical Gram-Schmidt, twice, as accurate as Householder
            h = dot(used, w)  # (B, j + 1)
            w = w - combine(used, h)
            hessenberg[:, : j + 1, j] += h
        below = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        below = torch.where(below <= rounding * size, 0.0, below)
        hessenberg[:, j + 1, j] = below.squeeze(1)
        if j + 1 < steps:
            basis = store(basis, j + 1, w * inverse_or_zero(below, 0.0), steps)
    return hessenberg[:, :-1], hessenberg[:, -1, -1]
