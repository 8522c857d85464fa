"""Small maps whose residual is easily misread: a solver must not report CONVERGED on them unless that is true.

On some the iterates run away, so that ``norm(f(z) - z) / norm(f(z))`` becomes small without any fixed point. On others
the iteration converges, but towards zero, from far away, after growing first, or at the border of the map's domain.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class StatusMap:
    """A batch of float64 fixed-point problems and what is true of them.

    Attributes:
        f: The map, (B, D) to (B, D).
        z0: (B, D) the start.
        solutions: The fixed points, each of shape (B, D) or (1, D); none where the map has no fixed point.
        contracts: Whether plain iteration from ``z0`` converges to the first of the solutions.
        rtol: A relative tolerance at which this is seen.
        atol: An absolute tolerance; None for the default of :func:`solvers.solve`.
    """

    f: Callable[[Tensor], Tensor]
    z0: Tensor
    solutions: tuple[Tensor, ...] = ()
    contracts: bool = False
    rtol: float = 1e-5
    atol: float | None = None

    def error(self, value: Tensor) -> Tensor:
        """(B,) the distance of ``value`` from the nearest solution, relative to that solution.

        A solution at zero has no size of its own; there the distance is relative to the start.
        """
        errors = [torch.full_like(value[:, 0], math.inf)]
        for solution in self.solutions:
            size = torch.linalg.vector_norm(solution.expand_as(value), dim=1)
            size = torch.where(size > 0, size, torch.linalg.vector_norm(self.z0, dim=1))
            errors.append(torch.linalg.vector_norm(value - solution, dim=1) / size)
        return torch.stack(errors).amin(dim=0)


def _rows(*entries: list[float] | float) -> Tensor:
    """(B, D) float64, one sample from each argument."""
    rows = [entry if isinstance(entry, list) else [entry] for entry in entries]
    return torch.tensor(rows, dtype=torch.float64)


def _limit(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    for _ in range(5000):
        z = f(z)
    return z


def _contraction(f: Callable[[Tensor], Tensor], z0: Tensor, *others: Tensor, rtol: float = 1e-5) -> StatusMap:
    """A map on which plain iteration converges, with its solution from many steps, and other fixed points."""
    return StatusMap(f, z0, (_limit(f, z0), *others), contracts=True, rtol=rtol)


def _rotated(blocks: list[list[float]], shift: list[float]) -> tuple[Tensor, Tensor]:
    """The matrix and the vector in another orthonormal basis."""
    generator = torch.Generator().manual_seed(0)
    a, b = _rows(*blocks), _rows(shift)
    q = torch.linalg.qr(torch.randn(a.shape, dtype=a.dtype, generator=generator))[0]
    return q @ a @ q.T, b @ q.T


def singular_affine() -> StatusMap:
    """``A z + b`` where A has the eigenvalues 1, 0.5 and -0.3, and b is outside the range of I - A."""
    a, b = _rotated([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, -0.3]], [1.0, 1.0, 1.0])
    return StatusMap(lambda z: z @ a.T + b, _rows([0.0, 0.0, 0.0], [3.0, -1.0, 2.0]))


def jordan_affine() -> StatusMap:
    """The same with a Jordan block to the eigenvalue 1: plain iterates run away quadratically."""
    a, b = _rotated([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]], [0.0, 1.0, 1.0])
    return StatusMap(lambda z: z @ a.T + b, _rows([0.0, 0.0, 0.0], [3.0, -1.0, 2.0]))


def pre_norm() -> StatusMap:
    """A transformer block with the normalization before its branches, plus an injected input x, on 6 tokens of size 16.

        h = z + A(LN(z)),    f(z) = h + W2 relu(W1 LN(h)) + x

    where A is attention with one head. The branches are bounded, whatever z is, and smaller than x, so that f(z) - z
    cannot vanish.
    """
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    query, key, value, output = (normal(16, 16) / 8 for _ in range(4))
    w1, w2 = normal(32, 16) / 8, normal(16, 32) / 12
    x = 3 * normal(2, 6, 16)

    def f(z: Tensor) -> Tensor:
        h = z.view(2, 6, 16)
        n = F.layer_norm(h, (16,))
        scores = (n @ query) @ (n @ key).mT / 4
        h = h + torch.softmax(scores, dim=2) @ n @ value @ output
        h = h + F.relu(F.layer_norm(h, (16,)) @ w1.T) @ w2.T + x
        return h.flatten(1)

    return StatusMap(f, torch.zeros(2, 96, dtype=torch.float64))


def late() -> StatusMap:
    """``2 tanh(z)`` from 1e-8: the residual grows by 2e8 on the way from the fixed point 0, which repels, to 1.915."""
    solution = _limit(lambda z: 2 * torch.tanh(z), _rows(1.0))
    zero = torch.zeros_like(solution)
    return StatusMap(lambda z: 2 * torch.tanh(z), _rows(1e-8), (solution, zero, -solution), contracts=True, atol=0.0)


def afar() -> StatusMap:
    """``sin(z) / 2 + z / 4 + 1`` from 1e2 to 1e6 times its solution."""
    return _contraction(
        lambda z: torch.sin(z) / 2 + z / 4 + 1, _rows([1e2, 2e2], [1e3, -1e3], [1e4, 0.0], [1e5, 1e4], [1e6, -1e6])
    )


def linear_afar() -> StatusMap:
    """``A z + b`` with a symmetric A of radius 0.9, from 1e2 to 1e6 times its solution."""
    a, b = _rotated([[0.9, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, -0.8]], [0.1, 1.0, 1.0])
    return _contraction(lambda z: z @ a.T + b, _rows([1e2, 1e2, -1e2], [1e4, 2e4, 3e4], [-1e6, 1e6, 1e6]))


def units(unit: float) -> StatusMap:
    """``cos`` and a slow contraction in other units: ``unit * f(z / unit)``."""
    rate = _rows([0.3, 0.3], [0.95, 0.8])
    z0 = unit * _rows([1.0, 0.0], [0.5, 2.0])
    return _contraction(lambda z: unit * rate * torch.cos(z / unit) + 0.5 * unit, z0)


STATUS_MAPS: dict[str, Callable[[], StatusMap]] = {
    "shift": lambda: StatusMap(lambda z: z + 1, _rows([1.0, 0.4], [0.0, 0.0], [-7.0, 3.0])),
    "shift from 1e5": lambda: StatusMap(lambda z: z + 1, _rows(1e5)),
    "creep": lambda: StatusMap(lambda z: torch.sqrt(z * z + 1), _rows(0.0, 3.0)),
    "wave": lambda: StatusMap(lambda z: z + 1 + torch.sin(z) / 2, _rows(1.0, -20.0)),
    "slow escape": lambda: StatusMap(lambda z: z + 1 / (1 + z * z), _rows(0.0, 1.0)),
    "shift beside a contraction": lambda: StatusMap(
        lambda z: torch.cat((z[:, :1] + 1, z[:, 1:] / 2), dim=1), _rows([0.0, 1.0], [1.0, 1e6])
    ),
    "singular affine": singular_affine,
    "jordan affine": jordan_affine,
    "pre-norm": pre_norm,
    "through zero, quadratic": lambda: StatusMap(
        lambda z: 0.9 * z + 0.05 * z * z, _rows(1.0, -1.0), (_rows(0.0), _rows(2.0)), contracts=True
    ),
    "through zero, linear": lambda: StatusMap(lambda z: 0.9 * z, _rows(1.0, -1e5), (_rows(0.0),), contracts=True),
    "through zero, shifted": lambda: StatusMap(
        lambda z: 0.9 * z - 1e-3, _rows(10.0, 1.0), (_rows(-0.01),), contracts=True
    ),
    "afar": afar,
    "linear, afar": linear_afar,
    "late": late,
    "faint": lambda: StatusMap(lambda z: 0.99 * z + 1e-7, _rows(0.0, 1e-6), (_rows(1e-5),), contracts=True, rtol=1e-12),
    "domain of a logarithm": lambda: _contraction(lambda z: z - torch.log(z) / 2, _rows(9.0, 4.0, 100.0, 0.3)),
    "domain of a logarithm, slow": lambda: _contraction(
        lambda z: 2 + torch.log(z), _rows(20.0, 0.5, 1e4), _rows(0.158594339563039)
    ),
    "domain of a square root": lambda: _contraction(lambda z: 1 + torch.sqrt(z), _rows(9.0, 0.0, 1e4)),
    "domain of a square root, near zero": lambda: _contraction(
        lambda z: 0.5 * torch.sqrt(z) - 0.05, _rows(4.0, 0.1, 100.0), _rows(0.0145898033750315)
    ),
    "division": lambda: _contraction(lambda z: 1 / (1 + z), _rows(5.0, 0.0, 1e3), _rows(-1.618033988749895)),
    "division, far": lambda: _contraction(lambda z: (z + 2 / z) / 2, _rows(100.0, 0.01), _rows(-math.sqrt(2))),
    "small unit": functools.partial(units, 1e-8),
    "large unit": functools.partial(units, 1e8),
}
