"""A solver that chooses the method for each sample by how fast it converges."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from solvers.linear import GMRES, LinearSolver
from solvers.methods.anderson import Anderson, AndersonState
from solvers.methods.broyden import Broyden, BroydenState
from solvers.methods.newton_krylov import FEW_UNKNOWNS, NewtonKrylov, NewtonKrylovState
from solvers.methods.solver import FlatMapping, Solver, State, replaced
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import relative, rms_norm

# The methods, in the order in which a sample comes to them; after the last it goes on with ANDERSON.
FAST, ANDERSON, PICARD, BROYDEN, NEWTON = range(5)

# A sample whose residual falls more slowly than this in one of the first plain steps goes on to Anderson acceleration,
# which from there on needs fewer steps.
_FAST = 0.1
# With few unknowns, growth of the residual by this in the first plain steps leads to Newton's method at once.
_EXPLOSION = 100.0
# A method must reduce the smallest residual to this part of it within its patience. Together the patiences are less
# than the driver's. That of PICARD doubles at every return.
_PROGRESS, _PLAIN_PROGRESS, _FASTER, _FALLS = 0.9, 0.5, 0.999, 3
# Anderson's window is forgotten where the residual is so many times the smallest one after this many steps or more
# without progress.
_WILD, _WILD_STEPS = 2.0, 3
# On its nth visit, plain iteration hands the sample back to Anderson acceleration after reducing the residual to the
# nth power of this.
_PLAIN_REDUCTION = 0.1
# A step to a residual this many times the size of the first image and its residual is taken back.
_GROWTH = 1e5
# An accelerated step that reduces the iterate to this part of its size leads to a fixed point at zero. Where the
# residual grows, that point repels, and the sample takes plain steps away from it, this many at most.
_COLLAPSE, _LONGEST_GROWTH = 1e-3, 34
# A relative residual of this many units in the last place is not worth another method.
_ROUNDING = 100.0

_BROYDEN = Broyden()


@dataclasses.dataclass
class Trail(State):
    """Iterates of plain steps, the latest first, that have not been put into Anderson's window yet."""

    earlier: "Trail | None"
    length: int


@dataclasses.dataclass
class AutoState(State):
    """The method of each sample, its progress, and what the methods remember.

    Attributes:
        method: (B,) int8, one of FAST, ANDERSON, PICARD, BROYDEN and NEWTON for each sample.
        error: (B,) root mean square of ``f(z) - z``.
        limit: (B,) the largest error that is not taken back.
        best: The iterate of the smallest error of each sample.
        best_error: (B,) that error.
        mark: (B,) the error at the last progress.
        idle: (B,) int64, steps since then.
        measure: (B,) relative residual.
        ratio: (B,) what part of the one before it that was.
        falls: (B,) int64, for how many steps in a row error and relative residual have fallen.
        half: (B,) the error when it was last halved, or when the sample was last fresh.
        age: (B,) int64, steps since then.
        expands: (B,) bool, whether the last of the first plain steps made the error larger.
        wild: (B,) bool, whether Anderson's window has been forgotten since the best iterate.
        target: (B,) the error at which plain iteration hands the sample back to Anderson acceleration.
        visits: (B,) int64, how often a sample has returned to plain iteration.
        grown: (B,) int64, how many plain steps it has taken away from a fixed point at zero.
        grew: (B,) bool, whether the error grew in the last step.
        fresh: (B,) bool, samples whose next step is the first one of a method that remembers nothing of them.
        newton: Newton's state, which is meaningful only for the samples on that method.
        trail: While there is no window, the iterates before this one.
        window: Anderson's state, of all samples since they were last fresh; None while all samples are fast.
        broyden: Broyden's state, which is meaningful only for the samples on that method.
    """

    method: Tensor
    error: Tensor
    limit: Tensor
    best: State
    best_error: Tensor
    mark: Tensor
    idle: Tensor
    measure: Tensor
    ratio: Tensor
    falls: Tensor
    half: Tensor
    age: Tensor
    expands: Tensor
    wild: Tensor
    target: Tensor
    visits: Tensor
    grown: Tensor
    grew: Tensor
    fresh: Tensor
    newton: NewtonKrylovState
    trail: Trail | None = None
    window: AndersonState | None = None
    broyden: BroydenState | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """Begins with the cheapest method and moves each sample to another one when its own residuals ask for it.

    1. Picard iteration, while every step reduces the residual at least ten times. No other work is done.
    2. Anderson acceleration with a long window, which has the plain steps in it from the start. Where the residual
       is larger than before for several steps, it begins again at the best iterate with an empty window.
    3. Picard iteration again, when 15 steps have brought no progress. Once it has reduced the residual tenfold (the
       next time a hundredfold, and so on), Anderson acceleration gets another chance with a new window.
    4. Broyden's method, when 6 plain steps (the next time 12, and so on) have brought no progress.
    5. Newton's method, when another 15 have brought none; while it makes progress within 3 steps. Then 2 again.

    Progress is a residual that is a tenth smaller than before, in the absolute sense: iterates that run away have small
    relative ones. Each method starts at the best iterate so far. A step that leads to infinity or NaN, or far beyond
    the residual of the start, is taken back to that iterate, and the sample goes on with the next method.

    For maps of which little is known, and batches of easy and hard samples. A step is one call of ``f`` until a sample
    needs Newton's method, and as many more as that takes. Where the map is known to be fast, :class:`Picard` has less
    to do. If gradients are to flow through the steps, use :class:`Anderson`: they do not flow through these. Each step
    waits for the device once, also when their number is fixed, and more often while a sample is on Newton's method.

    Args:
        memory: The most differences in Anderson's window, which grows by one per step: two vectors of the state's size
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
        return self._begin(z0, f(z0))

    def _begin(self, z0: Tensor, fz: Tensor) -> AutoState:
        """The state of samples that begin at ``z0`` (B, D)."""
        error = rms_norm(fz - z0)
        count = torch.zeros_like(error, dtype=torch.int64)
        best_error = torch.where(error.isfinite(), error, torch.inf)
        return AutoState(
            z=z0,
            fz=fz,
            method=torch.full_like(error, FAST, dtype=torch.int8),
            error=error,
            limit=_GROWTH * (error + rms_norm(fz)),
            best=State(z0, fz),
            best_error=best_error,
            mark=best_error,
            idle=count,
            measure=relative(error, rms_norm(fz)),
            ratio=torch.full_like(error, torch.inf),
            falls=count,
            half=best_error,
            age=count,
            expands=torch.zeros_like(error, dtype=torch.bool),
            wild=torch.zeros_like(error, dtype=torch.bool),
            target=torch.zeros_like(error),
            visits=count,
            grown=count,
            grew=torch.zeros_like(error, dtype=torch.bool),
            fresh=torch.zeros_like(error, dtype=torch.bool),
            newton=self._newton.begin(z0, fz),
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
        best_error = torch.where(state.error.isfinite(), state.error, torch.inf)
        state = dataclasses.replace(
            state, best=State(state.z, state.fz), best_error=best_error, mark=best_error, trail=None
        )
        return self._judge(state, self._window_of(trail), z, fz, error, torch.zeros_like(state.fresh))

    def restarted(self, state: AutoState, rows: Tensor, z: Tensor, fz: Tensor) -> AutoState:
        begun = self._begin(z, fz)
        if state.window is None:
            # From here on every sample has its own method. The trail would be of no use to those that restart.
            state = dataclasses.replace(state, trail=None, window=self._anderson(z).init(lambda _: state.fz, state.z))
        replacements = {
            field.name: replaced(getattr(state, field.name), rows, new)
            for field in dataclasses.fields(begun)
            if isinstance(new := getattr(begun, field.name), Tensor)
        }
        state = dataclasses.replace(state, **replacements)
        best = State(replaced(state.best.z, rows, z), replaced(state.best.fz, rows, fz))
        return dataclasses.replace(state, best=best, fresh=state.fresh | rows)

    def _mixed_step(self, f: FlatMapping, state: AutoState, window: AndersonState) -> AutoState:
        """A step of every sample by its own method."""
        on = {method: state.method == method for method in (ANDERSON, BROYDEN, NEWTON)}
        news = torch.stack([state.fresh.any(), *(rows.any() for rows in on.values())])
        fresh, *needed = news.tolist()
        needs = dict(zip(on, needed, strict=True))
        z, fz, anderson, newton = state.z, state.fz, self._anderson(state.z), state.newton
        broyden = state.broyden if needs[BROYDEN] else None
        if fresh:
            window = anderson.restarted(window, state.fresh, z, fz)
            newton = self._newton.restarted(newton, state.fresh, z, fz)
            if broyden is not None:
                broyden = _BROYDEN.restarted(broyden, state.fresh, z, fz)
        if broyden is None and needs[BROYDEN]:
            broyden = _BROYDEN.init(lambda _: state.fz, z)

        z = state.fz
        growing = torch.zeros_like(state.fresh)
        if needs[ANDERSON]:
            proposal = anderson.propose(window)
            growing = (state.grown > 0) | (rms_norm(proposal) <= _COLLAPSE * rms_norm(state.best.z))
            growing = growing & on[ANDERSON] & state.grew & (state.grown < _LONGEST_GROWTH)
            z = torch.where((on[ANDERSON] & ~growing).unsqueeze(1), proposal, z)
        if broyden is not None:
            z = torch.where(on[BROYDEN].unsqueeze(1), broyden.z + broyden.direction, z)
        if needs[NEWTON]:
            newton = dataclasses.replace(newton, z=state.z, fz=state.fz, error=state.error)
            newton = self._newton.step_some(f, newton, on[NEWTON], z)
            z, fz, error = newton.z, newton.fz, newton.error
        else:
            fz = f(z)
            error = rms_norm(fz - z)
        if broyden is not None:
            # What it makes of the other samples is meaningless, and cleared before it is used.
            broyden = _BROYDEN.step(lambda _: fz, broyden)
        state = dataclasses.replace(state, newton=newton, broyden=broyden)
        return self._judge(state, window, z, fz, error, growing)

    def _judge(
        self, state: AutoState, window: AndersonState, z: Tensor, fz: Tensor, error: Tensor, growing: Tensor
    ) -> AutoState:
        """The state at ``z``, with steps that led astray taken back and the methods for the next step."""
        method, scale = state.method, rms_norm(fz)
        # The same image twice: the map is constant there, as it is made for a sample that is finished.
        constant = (fz == state.fz).all(dim=1)
        limit = torch.where(growing, torch.maximum(state.limit, _GROWTH * (error + scale)), state.limit)
        # Also where the error is NaN; a sample without any finite residual has no iterate to go back to.
        lost = ~(error <= limit) & state.best_error.isfinite()
        better = (error < state.best_error) | (growing & ~lost)
        plain = method == PICARD
        measure = relative(error, scale)
        ratio = relative(measure, state.measure)
        falls = torch.where(ratio < 1, state.falls + 1, 0)
        # On the way of plain iteration to a solution the iterates may grow, and their residuals with them. Then the
        # relative ones fall faster and faster, unlike those of iterates that run away.
        faster = (ratio < _FASTER * state.ratio) & (falls >= _FALLS) & (measure < state.mark)
        progress = ((measure <= _PLAIN_PROGRESS * state.mark) & (error < state.error)) | faster
        progress = torch.where(plain, progress, error <= _PROGRESS * state.mark) | (growing & ~lost)
        halved = (error <= 0.5 * state.half) | (growing & ~lost)
        mark = torch.where(progress, torch.where(plain, measure, error), state.mark)
        idle = torch.where(progress, 0, state.idle + 1)

        patience = torch.zeros_like(idle)
        for each, steps in _patience(z.shape[1]).items():
            patience = torch.where(method == each, steps, patience)
        patience = torch.where(plain, patience << (state.visits - 1).clamp(0, 20), patience)
        slow = torch.where(method == FAST, error > _FAST * state.error, idle >= patience)
        slow = slow & (error > _ROUNDING * torch.finfo(error.dtype).eps * scale)
        recovered = plain & (measure <= state.target) & (falls >= _FALLS) & ~lost
        better = better | recovered
        # An extrapolation from differences that no longer fit: they are forgotten, unless that has not helped before.
        expands = torch.where(method == FAST, error > state.error, state.expands)
        learning = state.age < torch.where(expands, min(z.shape[1], self.memory) + 2, _WILD_STEPS)
        wild = (method == ANDERSON) & ~learning & (error > _WILD * state.best_error) & ~growing
        slow = (slow & ~recovered) | (wild & state.wild) | (plain & (error > _EXPLOSION * state.best_error))
        moves = lost | slow
        best = State(
            torch.where(better.unsqueeze(1), z, state.best.z), torch.where(better.unsqueeze(1), fz, state.best.fz)
        )
        best_error = torch.where(better, error, state.best_error)
        # Nothing has been learned but that plain steps lead astray.
        explodes = (method == FAST) & (lost | (error > _EXPLOSION * state.error) & (z.shape[1] <= FEW_UNKNOWNS))
        # From the first plain steps to the window of the same steps a sample goes on where it is.
        back = lost | wild | (slow & (method != FAST)) | explodes
        z, fz = torch.where(back.unsqueeze(1), best.z, z), torch.where(back.unsqueeze(1), best.fz, fz)
        error = torch.where(back, best_error, error)

        next_method = torch.where(method == NEWTON, ANDERSON, method + 1)
        next_method = torch.where(explodes, NEWTON, next_method)
        next_method = torch.where(moves, next_method, torch.where(recovered, ANDERSON, method))
        next_method = torch.where(constant & (method != NEWTON), FAST, next_method)
        returns = moves & (next_method == PICARD)
        visits = state.visits + returns
        start_measure = relative(best_error, rms_norm(best.fz))
        start = torch.where(returns, start_measure, best_error)
        return AutoState(
            z=z,
            fz=fz,
            method=next_method,
            error=error,
            limit=limit,
            best=best,
            best_error=best_error,
            mark=torch.where(moves | recovered, start, mark),
            idle=torch.where(moves | recovered, 0, idle),
            measure=torch.where(back, start_measure, measure),
            ratio=torch.where(back, torch.inf, ratio),
            falls=torch.where(back, 0, falls),
            half=torch.where(halved | back, error, state.half),
            age=torch.where(halved | back, 0, state.age + 1),
            expands=expands,
            wild=(state.wild | wild) & ~better & ~moves,
            target=torch.where(returns, start * _PLAIN_REDUCTION ** visits.to(error.dtype), state.target),
            visits=visits,
            grown=torch.where(growing, state.grown + 1, torch.where(state.grown > 0, _LONGEST_GROWTH, 0)),
            grew=error > state.error,
            fresh=back,
            newton=state.newton,
            window=self._anderson(z).absorb(window, z, fz),
            broyden=state.broyden,
        )

    @property
    def _newton(self) -> NewtonKrylov:
        return NewtonKrylov(linear_solver=self.linear_solver)

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


def _patience(size: int) -> dict[int, int]:
    """How many steps each method may take without progress, for states of so many entries.

    Quasi-Newton methods know all directions of a small state after few steps. With few unknowns a step of Newton's
    method is cheap, and it may search for a way out where the residual has a minimum.
    """
    if size > FEW_UNKNOWNS:
        return {ANDERSON: 15, PICARD: 12, BROYDEN: 15, NEWTON: 3}
    return {ANDERSON: min(size + 6, 30), PICARD: 12, BROYDEN: min(size + 3, 15), NEWTON: 40}
