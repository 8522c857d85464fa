"""Trust-region steps for samples of few unknowns, whose Jacobian is formed column by column."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from solvers.methods.descent import Point
from solvers.problem.small_systems import inverse_or_zero

# Newton's iterations for the damping that belongs to a radius. Two or three come to within a few percent.
_SECULAR_STEPS = 8
# The actual reduction of |g|^2 must be at least this part of the promised one.
_SUFFICIENT = 1e-4
# A step that promises to reduce |g|^2 by a smaller part is not worth a call of f.
_WORTHWHILE = 1e-4
# From this ratio of actual and promised reduction on, a longer step is tried; and from the other on, no correction is.
_GOOD, _EXACT = 0.25, 0.9
# Corrections of one step, and the longest one in units of the step.
_MOST_CORRECTIONS, _LONGEST_CORRECTION = 3, 0.75
_MOST_RADII = 60


@dataclasses.dataclass(frozen=True)
class DenseModel:
    """The linear model ``g - A s`` of the residual g at z + s, and its steps of limited length.

    The length of a step is ``|d s|``, where d is the length of each column of A, so that it does not depend on the
    units of the single unknowns. A may be singular: directions that it maps to rounding errors are left out.

    Attributes:
        a: (B, D, D) the matrix.
        g: (B, D) the residual at s = 0.
        u: (B, D, D) the left singular vectors of ``A diag(1 / d)``, as columns.
        sigma: (B, D) its singular values; those at the level of rounding errors are zero.
        v: (B, D, D) its right singular vectors, as rows.
        scale: (B, D) d.
        projected: (B, D) ``u' g``.
    """

    a: Tensor
    g: Tensor
    u: Tensor
    sigma: Tensor
    v: Tensor
    scale: Tensor
    projected: Tensor

    @classmethod
    def of(cls, a: Tensor, g: Tensor) -> "DenseModel":
        """The model for A (B, D, D) and g (B, D). Where a sample has NaN or infinity, its steps are zero."""
        finite = a.isfinite().flatten(1).all(dim=1) & g.isfinite().all(dim=1)  # (B,)
        a, g = torch.where(finite[:, None, None], a, 0.0), torch.where(finite[:, None], g, 0.0)
        scale = torch.linalg.vector_norm(a, dim=1)
        u, sigma, v = torch.linalg.svd(a * inverse_or_zero(scale, 0.0).unsqueeze(1))
        rounding = 4 * a.shape[1] * torch.finfo(a.dtype).eps
        sigma = torch.where(sigma > rounding * sigma[:, :1], sigma, 0.0)
        return cls(a, g, u, sigma, v, scale, _times(u.mT, g))

    def length(self, s: Tensor) -> Tensor:
        """(B,) the length of a step (B, D)."""
        length: Tensor = torch.linalg.vector_norm(self.scale * s, dim=1)
        return length

    def newton_length(self) -> Tensor:
        """(B,) the length of the shortest step to the minimum of ``|g - A s|``."""
        length: Tensor = torch.linalg.vector_norm(self.projected * inverse_or_zero(self.sigma, 0.0), dim=1)
        return length

    def step(self, radius: Tensor) -> "Step":
        """The step that minimizes ``|g - A s|`` among those of length ``radius`` (B,) at most."""
        load = self.sigma * self.projected  # (B, D)
        damping = torch.zeros_like(radius)
        for _ in range(_SECULAR_STEPS):
            inverse = inverse_or_zero(self.sigma**2 + damping.unsqueeze(1), 0.0)
            length = torch.linalg.vector_norm(load * inverse, dim=1)
            unit = load * inverse * inverse_or_zero(length, 0.0).unsqueeze(1)
            slope = (unit**2 * inverse).sum(dim=1)  # of -log(length)
            excess = length / radius - 1
            damping = damping + torch.where(excess > 0, excess * inverse_or_zero(slope, 0.0), 0.0)
        coefficients = load * inverse_or_zero(self.sigma**2 + damping.unsqueeze(1), 0.0)
        length = torch.linalg.vector_norm(coefficients, dim=1)
        coefficients = coefficients * torch.where(length > radius, radius / length, 1.0).unsqueeze(1)
        image = self.sigma * coefficients
        reduction = ((2 * self.projected - image) * image).sum(dim=1)
        s = self._unscaled(coefficients)
        return Step(s, self.length(s), reduction, self.g - _times(self.a, s), damping)

    def correction(self, residual: Tensor, damping: Tensor) -> Tensor:
        """(B, D) the c that minimizes ``|residual - A c|^2 + damping |d c|^2``."""
        projected = _times(self.u.mT, residual)
        return self._unscaled(self.sigma * projected * inverse_or_zero(self.sigma**2 + damping.unsqueeze(1), 0.0))

    def _unscaled(self, coefficients: Tensor) -> Tensor:
        """(B, D) the step with these coefficients of the right singular vectors."""
        return _times(self.v.mT, coefficients) * inverse_or_zero(self.scale, 0.0)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a :class:`DenseModel`.

    Attributes:
        s: (B, D) the step.
        length: (B,) its length.
        reduction: (B,) by how much it reduces ``|g - A s|^2``.
        target: (B, D) ``g - A s``.
        damping: (B,) the Levenberg-Marquardt parameter that gives this length.
    """

    s: Tensor
    length: Tensor
    reduction: Tensor
    target: Tensor
    damping: Tensor


def descend(
    point_at: Callable[[Tensor], Point], start: Point, model: DenseModel, radius: Tensor, rows: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """A step to a smaller residual within a trust region, from the largest radius that gives one.

    A radius that fails is reduced; one that does well at once is doubled, while that helps. A step whose end is off the
    linear model's target is corrected with the same matrix, which keeps it near a curved valley.

    Args:
        point_at: Gives the point at iterates (B, D).
        start: Where the samples are.
        model: The linear model of ``f(z) - z`` there.
        radius: (B,) the first radius to try.
        rows: (B,) which samples take a step.

    Returns:
        The end, which is the start for samples that are not in ``rows`` or found nothing; the radius for the next step,
        infinite where none was needed; (B,) bool, which samples found a step.
    """
    size = start.z.shape[1]
    full = model.newton_length()
    trial_radius = torch.minimum(radius, full)
    least = _WORTHWHILE * model.g.square().sum(dim=1)
    best = start
    found, shrunk = torch.zeros_like(rows), torch.zeros_like(rows)
    for _ in range(_MOST_RADII):
        step = model.step(trial_radius)
        rows = rows & (step.reduction > least)
        if not bool(rows.any()):
            break
        trial = _corrected(point_at, start, model, step, rows)
        ratio = size * (start.error**2 - trial.error**2) * inverse_or_zero(step.reduction, 0.0)
        good = rows & (ratio > _SUFFICIENT) & (trial.error < best.error)
        best = trial.where(good, best)
        radius = torch.where(good, torch.where(trial_radius < full, trial_radius, torch.inf), radius)
        grows = good & (ratio > _GOOD) & (trial_radius < full) & ~shrunk
        shrinks = rows & ~good & ~found
        found, shrunk = found | good, shrunk | shrinks
        factor = torch.where(trial.error.isfinite(), 0.25, 0.1).to(step.length)
        shorter = factor * torch.minimum(trial_radius, step.length)
        trial_radius = torch.where(grows, torch.minimum(2 * trial_radius, full), trial_radius)
        trial_radius = torch.where(shrinks, shorter, trial_radius)
        rows = grows | shrinks
        if not bool(rows.any()):
            break
    return best, radius, found


def _corrected(point_at: Callable[[Tensor], Point], start: Point, model: DenseModel, step: Step, rows: Tensor) -> Point:
    """The point of smallest residual among the end of the step and its corrections; for samples ``rows`` (B,)."""
    size = start.z.shape[1]
    best = point_at(torch.where(rows.unsqueeze(1), start.z + step.s, start.z))
    latest = best
    rows = rows & best.error.isfinite()
    for _ in range(_MOST_CORRECTIONS):
        rows = rows & (size * (start.error**2 - best.error**2) < _EXACT * step.reduction)
        correction = model.correction(latest.g - step.target, step.damping)
        rows = rows & (model.length(correction) < _LONGEST_CORRECTION * step.length)
        if not bool(rows.any()):
            break
        latest = point_at(torch.where(rows.unsqueeze(1), latest.z + correction, latest.z))
        # Go on only where a correction halves the residual.
        halved = rows & (latest.error < 0.5 * best.error)
        best = latest.where(rows & (latest.error < best.error), best)
        rows = halved
    return best


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(B, D, D), (B, D) -> (B, D) products."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)
