"""The problem bank: maps with known fixed points or known behavior.

Each problem is a function of the dtype. It is created in float64 from a fixed seed and then converted, so that it is
the same problem in all dtypes.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class BankProblem:
    """A batch of fixed-point problems.

    Attributes:
        f: The map, (B, D) -> (B, D).
        z0: (B, D) the start.
        solution: (B, D) the fixed point to which the iteration from z0 leads.
    """

    f: Callable[[Tensor], Tensor]
    z0: Tensor
    solution: Tensor


def linear(dtype: torch.dtype, *, radius: float, batch: int = 64, size: int = 256) -> BankProblem:
    """``z A' + b`` with A symmetric of the given spectral radius and b normal."""
    generator = torch.Generator().manual_seed(0)
    a = _symmetric(size, generator) * radius
    b = _normal((batch, size), generator)
    solution = torch.linalg.solve(torch.eye(size, dtype=a.dtype) - a, b.T).T
    a, b = a.to(dtype), b.to(dtype)
    return BankProblem(lambda z: torch.addmm(b, z, a.T), torch.zeros_like(b), solution.to(dtype))


def nonnormal(dtype: torch.dtype) -> BankProblem:
    """``z J' + b`` with J a Jordan block of size 32 and eigenvalue 0.9: the residual grows before it shrinks."""
    j = 0.9 * torch.eye(32, dtype=torch.float64) + torch.diag(torch.ones(31, dtype=torch.float64), 1)
    b = _normal((4, 32), torch.Generator().manual_seed(0))
    solution = torch.linalg.solve(torch.eye(32, dtype=torch.float64) - j, b.T).T
    j, b = j.to(dtype), b.to(dtype)
    return BankProblem(lambda z: torch.addmm(b, z, j.T), torch.zeros_like(b), solution.to(dtype))


def rotation(dtype: torch.dtype) -> BankProblem:
    """0.95 times a plane rotation by 1 rad, plus b: a complex pair of eigenvalues."""
    r = 0.95 * torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]], dtype=torch.float64)
    b = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - r, b.T).T
    r, b = r.to(dtype), b.to(dtype)
    return BankProblem(lambda z: torch.addmm(b, z, r.T), torch.zeros_like(b), solution.to(dtype))


def planes(dtype: torch.dtype) -> BankProblem:
    """Seven plane rotations about the centers 1 to 14: the map does not contract, and Picard iteration cycles."""
    angles = math.pi / torch.tensor([2, 3, 4, 5, 6, 1.27, 1.73], dtype=torch.float64)
    center = torch.arange(1.0, 15.0, dtype=torch.float64).to(dtype)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def f(z: Tensor) -> Tensor:
        x, y = (z - center).view(-1, 7, 2).unbind(2)
        return center + torch.stack((cos * x - sin * y, sin * x + cos * y), dim=2).flatten(1)

    return BankProblem(f, center.new_zeros(1, 14), center.unsqueeze(0))


def cosine(dtype: torch.dtype) -> BankProblem:
    """``cos(z)``: the derivative at the solution is -0.67."""
    solution = torch.tensor([[0.7390851332151607]], dtype=dtype)
    return BankProblem(torch.cos, torch.ones(1, 1, dtype=dtype), solution)


def marginal_cosine(dtype: torch.dtype) -> BankProblem:
    """``cos(z) + pi / 2``: the derivative at the solution is -1, so Picard iteration hardly makes progress."""
    solution = torch.tensor([[math.pi / 2]], dtype=dtype)
    return BankProblem(lambda z: torch.cos(z) + math.pi / 2, torch.ones(1, 1, dtype=dtype), solution)


def tanh(dtype: torch.dtype) -> BankProblem:
    """``tanh(z W' + x)`` with |W| = 1.2: the map contracts only where the activation saturates."""
    generator = torch.Generator().manual_seed(0)
    w = _normal((256, 256), generator)
    w = 1.2 * w / torch.linalg.matrix_norm(w, 2)
    x = _normal((128, 256), generator)
    solution = _limit(lambda z: torch.tanh(torch.addmm(x, z, w.T)), torch.zeros_like(x), 300)
    w, x = w.to(dtype), x.to(dtype)
    return BankProblem(lambda z: torch.tanh(torch.addmm(x, z, w.T)), torch.zeros_like(x), solution.to(dtype))


def imlp(dtype: torch.dtype, *, rows: int = 2048) -> BankProblem:
    """``y + sn2(gelu(sn1(gelu(z))))``, the map of an iMLP with state 256, inner layer 512 and coefficient 0.9."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = _normal((512, 256), generator), _normal((256, 512), generator)
    w1, w2 = (0.9 * w / torch.linalg.matrix_norm(w, 2) for w in (w1, w2))
    y = _normal((rows, 256), generator)
    solution = _limit(lambda z: y + F.linear(F.gelu(F.linear(F.gelu(z), w1)), w2), y, 100)
    w1, w2, y = w1.to(dtype), w2.to(dtype), y.to(dtype)
    return BankProblem(lambda z: y + F.linear(F.gelu(F.linear(F.gelu(z), w1)), w2), y, solution.to(dtype))


def mixed(dtype: torch.dtype, *, batch: int = 64, size: int = 64) -> BankProblem:
    """``c_i A z + b_i`` with c_i from 0.1 to 0.99: easy and hard samples in one batch."""
    generator = torch.Generator().manual_seed(0)
    a = _symmetric(size, generator)
    c = torch.linspace(0.1, 0.99, batch, dtype=torch.float64).unsqueeze(1)
    b = _normal((batch, size), generator)
    eye = torch.eye(size, dtype=torch.float64)
    solution = torch.linalg.solve(eye - c.unsqueeze(2) * a, b.unsqueeze(2)).squeeze(2)
    a, b, c = a.to(dtype), b.to(dtype), c.to(dtype)
    return BankProblem(lambda z: c * (z @ a.T) + b, torch.zeros_like(b), solution.to(dtype))


def expansive(dtype: torch.dtype) -> BankProblem:
    """``2 z A' + b`` with A symmetric of radius 1 and no eigenvalue near 1/2: Picard iteration diverges."""
    generator = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(_symmetric(16, generator))
    values = torch.where((values - 0.5).abs() < 0.1, 0.7, values)
    a = 2 * vectors @ torch.diag(values) @ vectors.T
    b = _normal((4, 16), generator)
    solution = torch.linalg.solve(torch.eye(16, dtype=torch.float64) - a, b.T).T
    a, b = a.to(dtype), b.to(dtype)
    return BankProblem(lambda z: torch.addmm(b, z, a.T), torch.zeros_like(b), solution.to(dtype))


def conv(dtype: torch.dtype, *, batch: int = 16) -> BankProblem:
    """A residual block ``x + W2 relu(W1 relu(z))`` of convolutions of norm 0.95, on 16 x 16 images of 16 channels."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 16, 16, 16)
    x = _normal(shape, generator)
    w1, w2 = (_normal((16, 16, 3, 3), generator) for _ in range(2))
    w1, w2 = (0.95 * w / _conv_norm(w, shape[1:], generator) for w in (w1, w2))

    def block(z: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        h = F.conv2d(F.relu(z.view(shape)), w1, padding=1)
        return (x + F.conv2d(F.relu(h), w2, padding=1)).flatten(1)

    z0 = torch.zeros(batch, 16 * 16 * 16, dtype=torch.float64)
    solution = _limit(lambda z: block(z, x, w1, w2), z0, 200)
    x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    return BankProblem(lambda z: block(z, x, w1, w2), z0.to(dtype), solution.to(dtype))


def adjoint(dtype: torch.dtype, *, size: int = 10_000) -> BankProblem:
    """``A z + 0.1 z^2 = p`` with A tridiagonal (-1, 10, -1), as the map ``z + p - A z - 0.1 z^2``, which expands.

    Anderson converges on it and not on its adjoint (NLsolve.jl, issue 273); Newton-Krylov needs few products.
    """
    p = _normal((1, size), torch.Generator().manual_seed(0))

    def neighbors(z: Tensor) -> Tensor:
        return F.pad(z[:, 1:], (0, 1)) + F.pad(z[:, :-1], (1, 0))

    # The same equation, written as a contraction.
    solution = _limit(lambda z: (p + neighbors(z) - 0.1 * z * z) / 10, torch.zeros_like(p), 200)
    p = p.to(dtype)
    return BankProblem(lambda z: p + neighbors(z) - 9 * z - 0.1 * z * z, torch.zeros_like(p), solution.to(dtype))


def h_equation(dtype: torch.dtype) -> BankProblem:
    """Chandrasekhar's H-equation with 512 unknowns and c = 0.99 (Toth and Kelley 2015, section 4.1)."""
    n = 512
    mu = (torch.arange(1, n + 1, dtype=torch.float64) - 0.5) / n
    kernel = 0.99 / (2 * n) * mu.unsqueeze(1) / (mu.unsqueeze(1) + mu)
    z0 = torch.ones(1, n, dtype=torch.float64)
    solution = _limit(lambda z: 1 / (1 - z @ kernel.T), z0, 500)
    kernel = kernel.to(dtype)
    return BankProblem(lambda z: 1 / (1 - z @ kernel.T), z0.to(dtype), solution.to(dtype))


def contractive_2x2(dtype: torch.dtype) -> BankProblem:
    """``M z + (I - M) 1`` with singular values 0.1 and 0.5 in different bases: the solution is all ones."""
    u = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    v = torch.tensor([[3.0, -4.0], [4.0, 3.0]], dtype=torch.float64) / 5
    m = u @ torch.diag(torch.tensor([0.1, 0.5], dtype=torch.float64)) @ v.T
    ones = torch.ones(1, 2, dtype=torch.float64)
    b = ones - ones @ m.T
    m, b = m.to(dtype), b.to(dtype)
    return BankProblem(
        lambda z: torch.addmm(b, z, m.T), torch.tensor([[2.0, 10.0]], dtype=dtype), torch.ones(1, 2, dtype=dtype)
    )


def alex(dtype: torch.dtype) -> BankProblem:
    """Two nearly equal components: the differences of an accelerated iteration are nearly dependent."""

    def f(z: Tensor) -> Tensor:
        first = torch.cos((z[:, 0] + z[:, 1]) / 2)
        return torch.stack((first, first + 1e-8 * torch.sin(z[:, 0] ** 2)), dim=1)

    z0 = torch.ones(1, 2, dtype=dtype)
    return BankProblem(f, z0, _limit(f, z0, 200))


BANK: dict[str, Callable[[torch.dtype], BankProblem]] = {
    "linear 0.5": lambda dtype: linear(dtype, radius=0.5),
    "linear 0.9": lambda dtype: linear(dtype, radius=0.9),
    "linear 0.99": lambda dtype: linear(dtype, radius=0.99),
    "nonnormal": nonnormal,
    "rotation": rotation,
    "planes": planes,
    "cos": cosine,
    "cos, marginal": marginal_cosine,
    "tanh": tanh,
    "imlp": imlp,
    "mixed": mixed,
    "expansive": expansive,
    "conv": conv,
    "adjoint": adjoint,
    "H-equation": h_equation,
    "contractive 2x2": contractive_2x2,
    "alex": alex,
}


def _symmetric(size: int, generator: torch.Generator) -> Tensor:
    """Return a random symmetric matrix (size, size) of spectral radius 1."""
    a = _normal((size, size), generator)
    a = a + a.T
    radius: Tensor = torch.linalg.eigvalsh(a).abs().max()
    return a / radius


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _conv_norm(weight: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Compute the operator norm of a convolution of images of ``shape`` with zero padding by power iteration."""
    image = _normal((1, *shape), generator)
    for _ in range(300):
        image = image / image.norm()
        image = F.conv_transpose2d(F.conv2d(image, weight, padding=1), weight, padding=1)
    norm: Tensor = image.norm().sqrt()
    return norm


def _limit(f: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        z = f(z)
    return z
