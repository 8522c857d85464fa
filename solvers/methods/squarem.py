"""Squared extrapolation (SQUAREM)."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from solvers.methods.solver import FlatMapping, Solver, State
from solvers.problem.norms import inner
from solvers.problem.small_systems import inverse_or_zero

# Longer steps would reach the driver's limit for divergence before they can be taken back.
_LONGEST = 1e4
# An extrapolation that makes the residual so many times larger is taken back. Far from monotone: after a good long step
# the residual is often larger, and smaller than ever a cycle later.
_TOLERATED_GROWTH = 1e3


@dataclasses.dataclass
class SquaremState(State):
    """Where the iteration is in its cycle of three calls.

    Attributes:
        kept: (B, D) in phase 1 the iterate that the cycle began at; in phase 2 the image before the extrapolation.
        square: (B, 1) in phase 2 the sum of squares of ``f(z) - z`` before the extrapolation.
        phase: On the host: 0 at the beginning of a cycle, 1 a plain step later, 2 at the extrapolated point.
    """

    kept: Tensor
    square: Tensor
    phase: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squarem(Solver):
    """SQUAREM: extrapolates as far as the change from one plain step to the next suggests, every third step.

    With r = f(z) - z and v = (f(f(z)) - f(z)) - r, one cycle is

        y = z - 2 alpha r + alpha^2 v,    z <- f(y),

    where alpha = -1 gives y = f(f(z)). A step is one call of ``f``, a cycle three steps, and the memory three vectors
    of the state's size. For states so large that :class:`Anderson`'s window does not fit, and made for monotone, slowly
    converging maps such as expectation-maximization; elsewhere :class:`Anderson` needs fewer calls.

    Each sample has its own alpha, and goes on from f(f(z)) where y is no good. (The paper has |alpha| >= 1, which suits
    monotone maps; shorter steps, allowed here, settle those that oscillate.)

    Args:
        scheme: How alpha is fitted: "S1" is r'v / v'v, "S2" is r'r / r'v, "S3" is -|r| / |v|.

    References:
        Varadhan and Roland, "Simple and globally convergent methods for accelerating the convergence of any EM
        algorithm", Scandinavian Journal of Statistics 35 (2008).
    """

    scheme: Literal["S1", "S2", "S3"] = "S3"

    def __post_init__(self) -> None:
        if self.scheme not in ("S1", "S2", "S3"):
            raise ValueError(f'Squarem(scheme=...) must be "S1", "S2" or "S3", got {self.scheme!r}.')

    def init(self, f: FlatMapping, z0: Tensor) -> SquaremState:
        return SquaremState(z=z0, fz=f(z0), kept=z0, square=inner(z0, z0))

    def step(self, f: FlatMapping, state: SquaremState) -> SquaremState:
        if state.phase == 0:
            return SquaremState(z=state.fz, fz=f(state.fz), kept=state.z, square=state.square, phase=1)
        g = state.fz - state.z
        if state.phase == 1:
            r = state.z - state.kept
            v = g - r
            alpha = self._step_length(r, v)
            z = state.kept - 2 * alpha * r + alpha * alpha * v
            return SquaremState(z=z, fz=f(z), kept=state.fz, square=inner(g, g), phase=2)
        # Not accepted also where it is nan.
        accepted = inner(g, g) <= _TOLERATED_GROWTH**2 * state.square
        z = torch.where(accepted, state.fz, state.kept)
        return SquaremState(z=z, fz=f(z), kept=z, square=state.square)

    def _step_length(self, r: Tensor, v: Tensor) -> Tensor:
        """alpha (B, 1), negative; -1 where the differences vanish or do not tell."""
        tiny = torch.finfo(r.dtype).tiny
        if self.scheme == "S1":
            length = -inner(r, v) * inverse_or_zero(inner(v, v), tiny)
        elif self.scheme == "S2":
            length = -inner(r, r) * inverse_or_zero(inner(r, v), tiny)
        else:
            square = inner(r, r) * inverse_or_zero(inner(v, v), tiny)
            length = torch.where(square > 0, square, 1.0).sqrt()
        return -torch.where(length > 0, length, 1.0).clamp_max(_LONGEST)
