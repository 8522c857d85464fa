"""What can be measured of a map near a point: eigenvalues of its Jacobian, transient growth, rounding, plain steps."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.diagnostics.spectral_radius import arnoldi
from solvers.problem.norms import relative, rms_norm

# Krylov vectors per sample, and the eigenvalues that are kept.
KRYLOV_STEPS, NUM_EIGENVALUES = 24, 6

# How far ahead transient growth is looked for, and how many vectors of the state's size plain iteration compares.
GROWTH_STEPS, WINDOW = 64, 16

# Rounding of at most this many units of the dtype is the dtype's own.
OWN_ROUNDING = 64

# A step relative to the size of the state that is larger than the grid of bfloat16.
COARSE = 0.01

FlatMapping = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The leading eigenvalues of the Jacobian of each sample.

    Attributes:
        eigenvalues: (B, k) complex, the largest first; NaN where there are fewer, or the Jacobian is not finite.
        residual: (B,) relative backward error of the largest.
        growth: (B,) the largest norm of a power of the Jacobian, as far as the Krylov space shows it: 1 or less for a
            normal Jacobian of radius 1 or less.
    """

    eigenvalues: Tensor
    residual: Tensor
    growth: Tensor

    @classmethod
    def unknown(cls, samples: int) -> "Spectrum":
        """That of samples without entries, or of no samples."""
        nan = torch.full((samples,), math.nan, dtype=torch.float64)
        return cls(nan.to(torch.complex128).unsqueeze(1), nan, nan)

    @property
    def radius(self) -> Tensor:
        """(B,) the absolute value of the largest."""
        return self.eigenvalues[:, 0].abs()


def leading_eigenvalues(f: FlatMapping, z: Tensor, generator: torch.Generator) -> Spectrum:
    """Estimate the leading eigenvalues of the Jacobian of each sample by Arnoldi's method.

    The products are vector-Jacobian products of plain autograd, or differences where f records no graph. Where the
    Krylov space is too small for the sample with the largest residual and scipy is installed, its restarted Arnoldi
    method (ARPACK) computes that sample's again.

    Args:
        f: The flat map, (B, D) to (B, D).
        z: (B, D) the point.
        generator: Source of the random start, on the CPU.
    """
    product, _ = _product(f, z)
    start = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    steps = min(KRYLOV_STEPS, z.shape[1])
    hessenberg, below = arnoldi(product, start, steps)
    finite = hessenberg.isfinite().all(dim=(1, 2))
    hessenberg = torch.where(finite[:, None, None], hessenberg, 0.0).cpu().double()
    values, vectors = torch.linalg.eig(hessenberg)
    order = (values.abs() * (1 + 1e-6 * (values.imag >= 0))).argsort(dim=1, descending=True)
    values = values.gather(1, order)[:, :NUM_EIGENVALUES]
    last = vectors[:, -1].gather(1, order[:, :1]).squeeze(1).abs()
    residual = relative(below.cpu().double() * last, values[:, 0].abs())
    growth = _largest_power(hessenberg)
    worst = int(residual.nan_to_num(0.0).argmax()) if len(residual) else 0
    if len(residual) and float(residual[worst]) > 1e-3:
        _refine(product, start, worst, values, residual)
    values = torch.where(finite.cpu()[:, None], values, complex(math.nan, math.nan))
    return Spectrum(values, residual.masked_fill(~finite.cpu(), math.nan), growth)


def dense_jacobian(f: FlatMapping, z: Tensor) -> Tensor:
    """Return the Jacobian of each sample, (B, D, D), by D products with it or its transpose."""
    product, transposed = _product(f, z)
    columns = []
    for entry in range(z.shape[1]):
        direction = torch.zeros_like(z)
        direction[:, entry] = 1.0
        columns.append(product(direction))
    return torch.stack(columns, dim=1 if transposed else 2)


def _product(f: FlatMapping, z: Tensor) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Return the product with the transposed Jacobian, and True; that with the Jacobian where f records no graph."""
    with torch.enable_grad():
        argument = z.detach().requires_grad_()
        image, differentiable = argument, False
        with contextlib.suppress(RuntimeError, NotImplementedError):  # the map supports no autograd
            image = f(argument)
            torch.autograd.grad(image, argument, torch.zeros_like(image), retain_graph=True)
            differentiable = True
    if not differentiable:
        base, size = f(z), rms_norm(z) + rms_norm(f(z))
        eps = torch.finfo(z.dtype).eps

        def difference(v: Tensor) -> Tensor:
            length = relative(eps**0.5 * size, rms_norm(v)).unsqueeze(1)
            return (f(z + length * v) - base) / torch.where(length == 0, 1.0, length)

        return difference, False

    def product(v: Tensor) -> Tensor:
        found: Tensor = torch.autograd.grad(image, argument, v, retain_graph=True)[0]
        return found

    return product, True


def _largest_power(hessenberg: Tensor) -> Tensor:
    """(B, m, m) -> (B,) the largest spectral norm among the powers."""
    power = hessenberg
    largest: Tensor = torch.linalg.matrix_norm(hessenberg, 2)
    for _ in range(GROWTH_STEPS):
        power = (power @ hessenberg).clamp(-1e100, 1e100)
        largest = torch.maximum(largest, torch.linalg.matrix_norm(power, 2))
    return largest


def _refine(product: Callable[[Tensor], Tensor], start: Tensor, sample: int, values: Tensor, residual: Tensor) -> None:
    """Write the eigenvalues of one sample as scipy finds them, if it is there and does."""
    try:
        from scipy.sparse import linalg
    except ImportError:
        return
    size, count = start.shape[1], values.shape[1]
    if count >= size - 1:
        return

    def matvec(vector: Any) -> Any:
        whole = torch.zeros_like(start)
        whole[sample] = torch.as_tensor(vector.reshape(-1)).to(start)
        return product(whole)[sample].cpu().double().numpy()

    operator = linalg.LinearOperator((size, size), matvec=matvec, dtype="float64")
    tolerance = max(1e-6, 30 * torch.finfo(start.dtype).eps)
    v0 = start[sample].cpu().double().numpy()
    with contextlib.suppress(linalg.ArpackError):
        found = linalg.eigs(operator, k=count, v0=v0, maxiter=20, tol=tolerance, return_eigenvectors=False)
        exact = torch.as_tensor(found)
        order = (exact.abs() * (1 + 1e-6 * (exact.imag >= 0))).argsort(descending=True)
        values[sample, : len(exact)] = exact[order]
        residual[sample] = tolerance


def precision_floor(f: FlatMapping, z: Tensor, generator: torch.Generator) -> Tensor:
    """Measure the relative size of rounding in what f returns, (B,).

    Along a line through ``z``, a smooth map has negligible third differences at small steps; what is left of them is
    rounding. Rounding to a coarse grid, as in a lower precision, shows only at steps as large as the grid: there it is
    what does not shrink with the step as third differences do. Costs 29 calls of f.

    References:
        More and Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33 (2011), algorithm 3.1.
    """
    eps = torch.finfo(z.dtype).eps
    direction = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    size = torch.maximum(rms_norm(z), rms_norm(f(z)))
    unit = relative(size, rms_norm(direction)).unsqueeze(1) * direction
    steps = (eps**0.5, eps**0.5 / 4, COARSE, COARSE / 2)
    (fine, finer, coarse, half), medians = zip(*(_third_difference(f, z, step * unit) for step in steps), strict=True)
    fine = torch.minimum(fine, finer)  # a steep map has third differences at the first step
    # Between the points of a grid, the map does not change.
    grid = (half > 0.4 * coarse) & (medians[1] <= OWN_ROUNDING * eps)
    return torch.where(grid, torch.maximum(fine, half), fine).clamp_min(eps / 2)


def _third_difference(f: FlatMapping, z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) each: a rounding error that makes third differences as large as those of f, and their median; over f."""
    table = torch.stack([f(z + k * step) for k in range(-3, 4)])  # (7, B, D)
    differences = table.diff(n=3, dim=0).abs().transpose(0, 1).flatten(1)  # (B, 4 D)
    # The squares of the coefficients of a third difference sum to 20. Nine tenths of a normal distribution are within
    # 1.645 deviations; the largest tenth is left out, because a kink of the map raises a few entries.
    ninth = differences.kthvalue(math.ceil(0.9 * differences.shape[1]), dim=1).values
    size = rms_norm(table[3])
    return relative(ninth / (20**0.5 * 1.645), size), relative(differences.median(dim=1).values, size)


@dataclasses.dataclass(frozen=True)
class PlainSteps:
    """What plain iteration does with each sample.

    Attributes:
        finite: (B,) bool, whether all iterates were finite.
        ratio: (B,) how many times larger the change is in the last ``WINDOW`` steps than in those before them.
        returns: (B,) bool, whether the last steps lead back to where they came from rather than on.
        change: (B,) the last change relative to the state.
    """

    finite: Tensor
    ratio: Tensor
    returns: Tensor
    change: Tensor


def plain_steps(f: FlatMapping, z: Tensor, steps: int) -> PlainSteps:
    """Take ``steps`` plain steps, at least twice ``WINDOW``, and describe the last ones."""
    steps = max(steps, 2 * WINDOW + 1)
    changes, reference = [], z
    finite = torch.ones(len(z), dtype=torch.bool, device=z.device)
    for k in range(steps):
        if k == steps - WINDOW:
            reference = z
        image = f(z)
        # A state that overflows when it is squared has diverged as well.
        finite = finite & rms_norm(image).isfinite()
        image = torch.where(finite.unsqueeze(1), image, z)
        changes.append(rms_norm(image - z))
        z = image
    sizes = torch.stack(changes)  # (steps, B)
    late, before = sizes[-WINDOW:], sizes[-2 * WINDOW : -WINDOW]
    ratio = relative(late.amax(dim=0), before.amax(dim=0))
    returns = rms_norm(z - reference) <= 0.5 * late.sum(dim=0)
    return PlainSteps(
        finite=finite,
        ratio=ratio,
        returns=returns,
        change=relative(sizes[-1], rms_norm(z)),
    )
