"""A solver that chooses the method for each sample by how fast it converges."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from solvers.linear import GMRES, LinearSolver
from solvers.methods.anderson import Anderson, AndersonState
from solvers.methods.broyden import Broyden, BroydenState
from solvers.methods.low_rank_inverse import LowRankInverse
from solvers.methods.newton_krylov import NewtonKrylov, NewtonKrylovState
from solvers.methods.solver import FlatMapping, Solver, State
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import relative, rms_norm

# The methods, in the order in which a sample comes to them.
PICARD, ANDERSON, BROYDEN, NEWTON = range(4)

# A sample whose residual falls more slowly than this in a plain step leaves Picard iteration: from there on Anderson
# acceleration needs fewer steps.
_FAST = 0.1
# Steps in which the best residual may fail to improve under Anderson and Broyden: on maps that expand, or are far from
# normal, they take long to get under way. Together they are less than the driver's patience.
_ANDERSON_PATIENCE = 15
_BROYDEN_PATIENCE = 30
# A step of Newton's method must reduce the residual to so much at least: it costs many calls.
_NEWTON_REDUCTION = 0.9
# A step to a residual this many times the size of the first image is taken back: a tenth of what the driver takes for
# divergence by default.
_GROWTH = 1e5
# A residual of so many units in the last place of f(z) is not worth another method.
_ROUNDING = 100.0
# Relative tolerance of a sample's first linear solve on Newton's method.
_FORCING = 0.5

_BROYDEN = Broyden()


@dataclasses.dataclass
class Trail(State):
    """Iterates of plain steps, the latest first, that have not been put into Anderson's window yet."""

    earlier: "Trail | None"
    length: int


@dataclasses.dataclass
class AutoState(State):
    """The method of each sample, how it fares, and what the methods remember.

    Attributes:
        method: (B,) int8, one of PICARD, ANDERSON, BROYDEN and NEWTON for each sample.
        error: (B,) root mean square of ``f(z) - z``.
        limit: (B,) the largest error that is not taken back.
        best: The iterate with the smallest relative residual of each sample.
        best_residual: (B,) that residual.
        idle: (B,) int64, steps in which it has not improved.
        forcing: (B,) relative tolerance of the next linear solve, for samples on Newton's method.
        trail: While there is no window, the iterates before this one.
        window: Anderson's state, of all samples since the start; None while all are on Picard iteration.
        broyden: Broyden's state, which means something for the samples on that method alone.
    """

    method: Tensor
    error: Tensor
    limit: Tensor
    best: State
    best_residual: Tensor
    idle: Tensor
    forcing: Tensor
    trail: Trail | None = None
    window: AndersonState | None = None
    broyden: BroydenState | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """Begins with the cheapest method and moves each sample to a stronger one when its own residuals ask for it.

    1. Picard iteration, while a step reduces the residual ten times at least. No other work is done.
    2. Anderson acceleration with a long window, which has the plain steps in it from the start.
    3. Broyden's method from where the sample is, when 15 steps have brought no progress.
    4. Newton's method, when another 30 have brought none; while a step takes a tenth off the residual. Then 3 again.

    Progress is a smaller relative residual than ever. A step that leads to inf or nan, or near to what counts as
    divergence, is taken back to the best iterate, and the sample moves on by one method.

    For maps of which little is known, and batches of easy and hard samples. A step is one call of ``f`` until a sample
    needs Newton's method, and as many more as that takes. Where the map is known to be fast, :class:`Picard` has less
    to do; if gradients are to flow through the steps, use :class:`Anderson`: they do not through these. Each step waits
    for the device once at least, also when their number is fixed.

    Args:
        memory: The most differences in Anderson's window, which grows by one a step: two vectors of the state's size
            each. It is never longer than the state has entries. Broyden's estimate, where it comes to that, has no
            limit.
        linear_solver: The solver of Newton's linear systems, as in :class:`NewtonKrylov`. The map must support forward
            mode differentiation to come this far.
    """

    differentiable: ClassVar[bool] = False

    memory: int = 50
    linear_solver: LinearSolver = GMRES(restart=40, max_steps=40)

    def __post_init__(self) -> None:
        require_positive_int(self, "memory", self.memory)
        NewtonKrylov(linear_solver=self.linear_solver)

    def init(self, f: FlatMapping, z0: Tensor) -> AutoState:
        z0 = z0.contiguous()  # forward mode refuses expanded tensors
        fz = f(z0)
        error, scale = rms_norm(fz - z0), rms_norm(fz)
        return AutoState(
            z=z0,
            fz=fz,
            method=torch.full_like(error, PICARD, dtype=torch.int8),
            error=error,
            limit=_GROWTH * (error + scale),
            best=State(z0, fz),
            best_residual=relative(error, scale),
            idle=torch.zeros_like(error, dtype=torch.int64),
            forcing=torch.zeros_like(error),
        )

    @torch.no_grad()
    def step(self, f: FlatMapping, state: AutoState) -> AutoState:
        if state.window is not None:
            return self._mixed_step(f, state, state.window)
        z = state.fz
        fz = f(z)
        error = rms_norm(fz - z)
        trail = Trail(state.z, state.fz, state.trail, 1 if state.trail is None else state.trail.length + 1)
        # One look at the host is all the work of a step in which every sample is fast.
        if trail.length < self.memory and bool((error <= _FAST * state.error).all()):
            return dataclasses.replace(state, z=z, fz=fz, error=error, trail=trail)
        last = State(state.z, state.fz)
        state = dataclasses.replace(
            state, best=last, best_residual=relative(state.error, rms_norm(last.fz)), trail=None
        )
        return self._judge(state, self._window_of(trail), z, fz, error)

    def _mixed_step(self, f: FlatMapping, state: AutoState, window: AndersonState) -> AutoState:
        """Every sample by its own method."""
        on = {method: state.method == method for method in (ANDERSON, BROYDEN, NEWTON)}
        needed = dict(zip(on, torch.stack([rows.any() for rows in on.values()]).tolist(), strict=True))
        z, broyden = state.fz, state.broyden
        if needed[ANDERSON]:
            z = torch.where(on[ANDERSON].unsqueeze(1), self._anderson(z).propose(window), z)
        if broyden is not None:
            z = torch.where(on[BROYDEN].unsqueeze(1), broyden.z + broyden.direction, z)
        if needed[NEWTON]:
            newton = NewtonKrylovState(state.z, state.fz, state.error, state.forcing)
            newton = NewtonKrylov(linear_solver=self.linear_solver).step_some(f, newton, on[NEWTON], z)
            z, fz, error = newton.z, newton.fz, newton.error
            state = dataclasses.replace(state, forcing=newton.forcing)
        else:
            fz = f(z)
            error = rms_norm(fz - z)
        if broyden is not None:
            # Of the others' rows it makes something meaningless, which is cleared before it is used.
            broyden = _BROYDEN.step(lambda _: fz, broyden) if needed[BROYDEN] else None
        return self._judge(dataclasses.replace(state, broyden=broyden), window, z, fz, error)

    def _judge(self, state: AutoState, window: AndersonState, z: Tensor, fz: Tensor, error: Tensor) -> AutoState:
        """The state at ``z``, with steps that led astray taken back and the methods for the next step."""
        method = state.method
        residual = relative(error, rms_norm(fz))
        settled = residual <= _ROUNDING * torch.finfo(error.dtype).eps
        # Also where the error is nan; a sample without any finite residual has no iterate to go back to.
        lost = ~(error <= state.limit) & state.best_residual.isfinite()
        improved = residual < state.best_residual
        idle = torch.where(improved, 0, state.idle + 1)
        slow = torch.where(
            (method == PICARD) | (method == NEWTON),
            error > torch.where(method == PICARD, _FAST, _NEWTON_REDUCTION) * state.error,
            idle >= torch.where(method == ANDERSON, _ANDERSON_PATIENCE, _BROYDEN_PATIENCE),
        )
        moves = lost | (slow & ~settled)
        method = torch.where(moves, torch.where(method == NEWTON, BROYDEN, method + 1), method)
        # The same image twice: the map is constant there, as it is made for a sample that is finished.
        method = torch.where((fz == state.fz).all(dim=1), PICARD, method)

        back, better = lost.unsqueeze(1), improved.unsqueeze(1)
        z, fz = torch.where(back, state.best.z, z), torch.where(back, state.best.fz, fz)
        error = torch.where(lost, rms_norm(state.best.fz - state.best.z), error)
        return AutoState(
            z=z,
            fz=fz,
            method=method,
            error=error,
            limit=state.limit,
            best=State(torch.where(better, z, state.best.z), torch.where(better, fz, state.best.fz)),
            best_residual=torch.where(improved, residual, state.best_residual),
            idle=torch.where(moves, 0, idle),
            forcing=torch.where(moves, _FORCING, state.forcing),
            window=self._anderson(z).absorb(window, z, fz),
            broyden=_join(state.broyden, z, fz, method == BROYDEN, moves),
        )

    def _anderson(self, z: Tensor) -> Anderson:
        # More differences than unknowns depend on each other, and old ones only blur the new.
        return Anderson(memory=max(1, min(self.memory, z.shape[1])), safeguard=False)

    def _window_of(self, trail: Trail) -> AndersonState:
        """Anderson's state after the iterates of a trail."""
        iterates = [trail]
        while iterates[-1].earlier is not None:
            iterates.append(iterates[-1].earlier)
        first = iterates.pop()
        anderson = self._anderson(first.z)
        window = anderson.init(lambda _: first.fz, first.z)
        for iterate in reversed(iterates):
            window = anderson.absorb(window, iterate.z, iterate.fz)
        return window


def _join(state: BroydenState | None, z: Tensor, fz: Tensor, rows: Tensor, new: Tensor) -> BroydenState | None:
    """Broyden's state with every sample at ``z`` (B, D), where of ``rows`` (B,) those that are ``new`` begin there.

    The estimate of one that begins is -I, which it is where all u are zero.
    """
    if state is None:
        return _BROYDEN.init(lambda _: fz, z) if bool(rows.any()) else None
    new = new.unsqueeze(1)
    g = fz - z
    inverse = state.inverse
    if inverse.u is not None and inverse.v is not None:
        u, v = (torch.where(new.unsqueeze(2), 0.0, block) for block in (inverse.u, inverse.v))
        inverse = LowRankInverse(inverse.rank, u, v)
    direction = torch.where(new, g, state.direction)
    return BroydenState(
        z=z, fz=fz, direction=direction, inverse=inverse, recent=torch.linalg.vector_norm(g, dim=1, keepdim=True)
    )
