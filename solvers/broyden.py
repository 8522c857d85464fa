"""Broyden's method with a low-rank inverse Jacobian."""

import dataclasses

import torch
from torch import Tensor

from solvers._base import FlatMapping, Solver, State
from solvers._hyperparameters import require_damping, require_positive_int
from solvers._window import combine, dot, store


@dataclasses.dataclass
class LowRankInverse:
    """An estimate of the inverse Jacobian of ``g(z) = f(z) - z``: per sample ``H = -I + sum_i u_i v_i'``.

    Attributes:
        rank: How many pairs are in use.
        u: (B, m, D), None while the rank is 0.
        v: (B, m, D), None while the rank is 0.
    """

    rank: int = 0
    u: Tensor | None = None
    v: Tensor | None = None

    def mv(self, x: Tensor) -> Tensor:
        """``H x`` for x of shape (B, D)."""
        if self.u is None or self.v is None or self.rank == 0:
            return -x
        return combine(self.u[:, : self.rank], dot(self.v[:, : self.rank], x)) - x

    def rmv(self, x: Tensor) -> Tensor:
        """``H' x`` for x of shape (B, D): ``(rmv(x) * y).sum() == (x * mv(y)).sum()``."""
        if self.u is None or self.v is None or self.rank == 0:
            return -x
        return combine(self.v[:, : self.rank], dot(self.u[:, : self.rank], x)) - x


@dataclasses.dataclass
class BroydenState(State):
    """The iterate, the step that led away from it, and the inverse Jacobian.

    Attributes:
        direction: (B, D) ``-H g`` at ``z``, the next step before damping.
        inverse: The estimate ``H`` of the inverse Jacobian of ``f(z) - z``.
    """

    direction: Tensor
    inverse: LowRankInverse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's first ("good") method: a secant update of the inverse Jacobian in every step.

    With g = f(z) - z, s = dz, y = dg and H the estimate of the inverse Jacobian of g, started at -I,

        z <- z - damping * H g,    H <- H + (s - H y) s'H / (s'H y).

    The first step is a Picard step. Converges superlinearly near a regular solution, also where ``f`` does not
    contract. Costs one call of ``f`` a step and two vectors of the state's size a remembered update. Its inverse
    Jacobian estimate is kept in ``solution.state.inverse``.

    Args:
        memory: How many updates to keep; when they are used up the estimate starts again from -I. None keeps all:
            fewest calls of ``f``, most memory.
        damping: Step length in (0, 1]; 1 is the full step.

    References:
        Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19 (1965), eq. (4.5),
        in the inverse form of Sherman and Morrison.
        Kelley, "Solving nonlinear equations with Newton's method", SIAM (2003), chapter 4.
    """

    memory: int | None = None
    damping: float = 1.0

    def __post_init__(self) -> None:
        require_positive_int(self, "memory", self.memory, optional=True)
        require_damping(self, self.damping)

    def init(self, f: FlatMapping, z0: Tensor) -> BroydenState:
        fz = f(z0)
        return BroydenState(z=z0, fz=fz, direction=fz - z0, inverse=LowRankInverse())

    def step(self, f: FlatMapping, state: BroydenState) -> BroydenState:
        s = state.direction if self.damping == 1.0 else self.damping * state.direction
        z = state.z + s
        fz = f(z)
        g = fz - z
        inverse = state.inverse
        if self.memory is not None and inverse.rank == self.memory:
            inverse = LowRankInverse(0, inverse.u, inverse.v)
            return BroydenState(z=z, fz=fz, direction=g, inverse=inverse)
        p = inverse.mv(g)  # H g at the new point
        s_hy = s + self.damping * p if self.damping != 1.0 else s + p  # H y, because H g at the old point is -direction
        # An update with s'Hy near 0 would make the estimate singular; that sample goes without it.
        denominator = (s * s_hy).sum(dim=1, keepdim=True)
        usable = denominator.abs() > torch.finfo(s.dtype).eps * (s * s).sum(dim=1, keepdim=True)
        u = torch.where(usable, (s - s_hy) / torch.where(usable, denominator, 1.0), 0.0)
        v = inverse.rmv(s)
        capacity = self.memory if self.memory is not None else 2**62
        inverse = LowRankInverse(
            inverse.rank + 1,
            store(inverse.u, inverse.rank, u, capacity),
            store(inverse.v, inverse.rank, v, capacity),
        )
        direction = -(p + u * (v * g).sum(dim=1, keepdim=True))
        return BroydenState(z=z, fz=fz, direction=direction, inverse=inverse)
