"""Points of an iteration with their residuals, and the search for a smaller one along a line."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from solvers.methods.root_map import RootMap
from solvers.methods.solver import FlatMapping
from solvers.problem.norms import rms_norm

# Armijo's constant: a step must reduce the residual by this part of its length at least.
SUFFICIENT = 1e-4
# The shortest length that is tried; a shorter one could not reduce the residual by more than this part.
_SHORTEST = 1e-4


@dataclasses.dataclass(frozen=True)
class Point:
    """Iterates with their images and residuals.

    Attributes:
        z: (B, D) the iterates.
        fz: (B, D) the map there.
        g: (B, D) ``f(z) - z``.
        error: (B,) its root mean square.
    """

    z: Tensor
    fz: Tensor
    g: Tensor
    error: Tensor

    @classmethod
    def at(cls, f: FlatMapping, z: Tensor) -> "Point":
        """The point ``z`` (B, D), by one call of ``f``."""
        if isinstance(f, RootMap) and f.scaling is not None:
            # Where F is small, z - (z - c F) would leave few digits of it.
            return cls.displaced(z, -f.scaling * f.residual(z))
        fz = f(z)
        return cls(z, fz, fz - z, rms_norm(fz - z))

    @classmethod
    def displaced(cls, z: Tensor, g: Tensor) -> "Point":
        """The point ``z`` (B, D), from which the map leads to ``z + g``."""
        return cls(z, z + g, g, rms_norm(g))

    def where(self, rows: Tensor, other: "Point") -> "Point":
        """The samples ``rows`` (B,) of this point, and the others of another."""
        chosen = rows.unsqueeze(1)
        return Point(
            z=torch.where(chosen, self.z, other.z),
            fz=torch.where(chosen, self.fz, other.fz),
            g=torch.where(chosen, self.g, other.g),
            error=torch.where(rows, self.error, other.error),
        )


def backtrack(
    point_at: Callable[[Tensor], Point], start: Point, s: Tensor, full: Point, rows: Tensor
) -> tuple[Point, Tensor]:
    """The first of ever shorter steps along a direction that reduces the residual enough.

    Args:
        point_at: Gives the point at iterates (B, D).
        start: Where the samples are.
        s: (B, D) the step whose full length reduces the residual too little.
        full: The point at its end.
        rows: (B,) which samples take a step.

    Returns:
        The end, which is the start for samples that are not in ``rows`` or found nothing; (B,) bool, which samples
        found a step.
    """
    length = torch.ones_like(start.error)
    best, trial, remaining = start, full, rows
    while True:
        length = torch.where(remaining, length * _reduction(length, start.error, trial.error), length)
        remaining = remaining & (length >= _SHORTEST)
        if not bool(remaining.any()):
            break
        trial = point_at(torch.where(remaining.unsqueeze(1), start.z + length.unsqueeze(1) * s, start.z))
        accepted = remaining & (trial.error <= (1 - SUFFICIENT * length) * start.error)
        best = trial.where(accepted, best)
        remaining = remaining & ~accepted
    return best, rows & (length >= _SHORTEST)


def _reduction(length: Tensor, start: Tensor, trial: Tensor) -> Tensor:
    """(B,) what to multiply the length of a rejected step by.

    To the minimum of the parabola through the squared residuals at the start and the trial, whose slope at the start is
    that of a Newton step, -2 |g|^2: between a tenth and a half, and a tenth where the trial is not finite.
    """
    ratio = (trial / start) ** 2
    factor = length / (ratio - 1 + 2 * length)
    return torch.where(ratio.isfinite(), factor.clamp(0.1, 0.5), 0.1)
