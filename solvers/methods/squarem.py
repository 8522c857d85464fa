"""Squared extrapolation (SQUAREM)."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from solvers.methods.solver import FlatMapping, Solver, State, replaced
from solvers.problem.norms import inner
from solvers.problem.small_systems import inverse_or_zero

# Longer steps would reach the driver's limit for divergence before they can be taken back.
_LONGEST = 1e4
# An extrapolation is taken back if it multiplies the residual by more than this. The bound is loose on purpose: after a
# good long step the residual is often larger, and smaller than ever one cycle later.
_TOLERATED_GROWTH = 1e3


@dataclasses.dataclass
class SquaremState(State):
    """The position of the iteration in its cycle of three calls.

    Attributes:
        kept: (B, D) in phase 1 the iterate that the cycle began at; in phase 2 the image before the extrapolation.
        square: (B, 1) in phase 2 the sum of squares of ``f(z) - z`` before the extrapolation.
        phase: A Python int: 0 at the beginning of a cycle, 1 a plain step later, 2 at the extrapolated point.
    """

    kept: Tensor
    square: Tensor
    phase: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squarem(Solver):
    """SQUAREM: every third step extrapolates as far as the change between two plain steps suggests.

    With r = f(z) - z and v = (f(f(z)) - f(z)) - r, one cycle is

        y = z - 2 alpha r + alpha^2 v,    z <- f(y),

    where alpha = -1 gives y = f(f(z)). A step is one call of ``f``, a cycle is three steps, and the memory is three
    vectors of the state's size. The method was made for monotone, slowly converging maps such as
    expectation-maximization. Use it for these, and for states so large that :class:`Anderson`'s window does not fit;
    elsewhere :class:`Anderson` needs fewer calls.

    Each sample has its own alpha, and continues from f(f(z)) if y turns out much worse. (The paper requires
    |alpha| >= 1, which suits monotone maps; the shorter steps allowed here damp oscillations.)

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
            length = self._step_length(r, v)
            # y as in the class's docstring, written so that alpha = -1 is exactly the plain step.
            z = state.fz - (1 - length) * torch.add((1 + length) * v, r, alpha=2)
            return SquaremState(z=z, fz=f(z), kept=state.fz, square=inner(g, g), phase=2)
        # A NaN is not accepted either.
        accepted = inner(g, g) <= _TOLERATED_GROWTH**2 * state.square
        z = torch.where(accepted, state.fz, state.kept)
        return SquaremState(z=z, fz=f(z), kept=z, square=state.square)

    def restarted(self, state: SquaremState, rows: Tensor, z: Tensor, fz: Tensor) -> SquaremState:
        """These samples take a plain step next, in whatever phase the others are, and then join their cycle."""
        # In phase 1 a cycle that begins and stands at z has r = 0, hence alpha = -1. In phase 2 the extrapolation is
        # either accepted at z or taken back to kept, and both lead to fz.
        state = super().restarted(state, rows, z, fz)
        return dataclasses.replace(state, kept=replaced(state.kept, rows, z if state.phase == 1 else fz))

    def _step_length(self, r: Tensor, v: Tensor) -> Tensor:
        """-alpha (B, 1), positive; 1 where the differences vanish or determine no positive length."""
        tiny = torch.finfo(r.dtype).tiny
        if self.scheme == "S1":
            length = -inner(r, v) * inverse_or_zero(inner(v, v), tiny)
        elif self.scheme == "S2":
            length = -inner(r, r) * inverse_or_zero(inner(r, v), tiny)
        else:
            length = inner(r, r) * inverse_or_zero(inner(v, v), tiny)
        length = torch.where(length > 0, length, 1.0)
        return (length.sqrt() if self.scheme == "S3" else length).clamp_max(_LONGEST)
