"""Picard iteration."""

import dataclasses

from torch import Tensor

from solvers.methods.solver import FlatMapping, Solver, State
from solvers.problem.hyperparameters import require_damping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """Plain fixed-point iteration, ``z <- z + damping * (f(z) - z)``.

    The iteration converges linearly, at the rate of the contraction, wherever ``f`` contracts, and its steps are the
    cheapest of all. Prefer :class:`Anderson` when the rate is worse than about 0.5 or unknown. n steps are exactly n
    calls of ``f``, and the n-th call's result is returned.

    Args:
        damping: Step length in (0, 1]; 1 is the undamped iteration. Values less than 1 reduce oscillation (Jacobian
            eigenvalues near or below -1) and slow down everything else.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        require_damping(self, self.damping)

    def init(self, f: FlatMapping, z0: Tensor) -> State:
        return State(z=z0, fz=f(z0))

    def step(self, f: FlatMapping, state: State) -> State:
        z = state.fz if self.damping == 1.0 else state.z.lerp(state.fz, self.damping)
        return State(z=z, fz=f(z))

    @property
    def compiles(self) -> bool:
        return True

    def fixed_shape(self, state: State, room: int) -> State:
        return state
