"""A solver that chooses the method for each sample by how fast it converges."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from solvers.linear import GMRES, LinearSolver
from solvers.methods.anderson import Anderson, AndersonState
from solvers.methods.broyden import Broyden, BroydenState
from solvers.methods.method_choice import (
    ANDERSON,
    BROYDEN,
    FAST,
    FAST_REDUCTION,
    LONGEST_GROWTH,
    NEWTON,
    PICARD,
    MethodChoice,
)
from solvers.methods.newton_krylov import NewtonKrylov, NewtonKrylovState
from solvers.methods.solver import FlatMapping, Solver, State, replaced
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.norms import rms_norm

# An accelerated step that reduces the iterate to this part of its size leads to a fixed point at zero. Where the
# residual grows, that point repels, and the sample takes plain steps away from it.
_COLLAPSE = 1e-3

_BROYDEN = Broyden()


@dataclasses.dataclass
class Trail(State):
    """Iterates of plain steps, the latest first, that have not been put into Anderson's window yet."""

    earlier: "Trail | None"
    length: int


class Needs(NamedTuple):
    """What the host knows of the next step.

    Where an attribute is False, it is so of no sample. Where it is True, it may be so of some; but ``broyden`` and
    ``newton`` are then certain as long as there are as many samples.

    Attributes:
        num_samples: How many samples there are.
        fresh: Whether samples are fresh.
        grew: Whether residuals grew in the last step, or samples have taken steps away from a fixed point at zero.
        fast: Whether samples are on FAST; likewise ``anderson`` and so on.
    """

    num_samples: int
    fresh: bool
    grew: bool
    fast: bool
    anderson: bool
    picard: bool
    broyden: bool
    newton: bool

    @classmethod
    def of(cls, choice: MethodChoice) -> "Needs":
        """What this choice needs, by a look at the host."""
        rows = [choice.method == method for method in (FAST, ANDERSON, PICARD, BROYDEN, NEWTON)]
        grew = choice.grew | (choice.grown > 0)
        flags: list[bool] = torch.stack((choice.fresh, grew, *rows)).any(dim=1).tolist()
        return cls(len(grew), *flags)

    @classmethod
    def at_most(cls, num_samples: int, *, picard: bool) -> "Needs":
        """When no more is known than that no sample is on BROYDEN or NEWTON, nor on PICARD if that is False."""
        return cls(num_samples, True, True, fast=True, anderson=True, picard=picard, broyden=False, newton=False)

    @property
    def is_settled(self) -> bool:
        """Whether every sample is on FAST or ANDERSON."""
        return not (self.picard or self.broyden or self.newton)


@dataclasses.dataclass
class AutoState(State):
    """The method of each sample and what the methods remember.

    Attributes:
        choice: The method of each sample and how it fares.
        best: The iterate of the smallest error of each sample.
        newton: Newton's state, which is meaningful only for the samples on that method.
        trail: While there is no window, the iterates before this one.
        window: Anderson's state, of all samples since they were last fresh; None while all samples are fast.
        broyden: Broyden's state, which is meaningful only for the samples on that method.
        needs: What the host knows of the next step; None if the step has to look.
    """

    choice: MethodChoice
    best: State
    newton: NewtonKrylovState
    trail: Trail | None = None
    window: AndersonState | None = None
    broyden: BroydenState | None = None
    needs: Needs | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """Begins with the cheapest method and moves each sample to another one when its own residuals ask for it.

    1. Picard iteration, while every step reduces the residual at least ten times. No other work is done.
    2. Anderson acceleration with a long window, which has the plain steps in it from the start. Where the residual
       becomes much larger than it was, it begins again at the best iterate with an empty window, once.
    3. Picard iteration again, when that did not help or 15 steps have brought no progress. Once it has reduced the
       relative residual tenfold (the next time a hundredfold, and so on), Anderson acceleration gets another chance.
    4. Broyden's method, when 12 plain steps (the next time 24, and so on) have brought no progress.
    5. Newton's method, when another 15 have brought none; while it makes progress within 3 steps. Then 2 again.

    Progress is a smaller residual in the absolute sense, because iterates that run away have small relative ones.
    Each method starts at the best iterate so far. A step that leads to infinity or NaN, or far beyond the residual of
    the start, is taken back to that iterate, and the sample goes on with the next method. With at most 32 unknowns,
    Newton's method is cheap: it comes first where plain steps explode, and may search longer.

    For maps of which little is known, and batches of easy and hard samples. A step is one call of ``f`` until a sample
    needs Newton's method, and as many more as that takes. Where the map is known to be fast, :class:`Picard` has less
    to do. If gradients are to flow through the steps, use :class:`Anderson`: they do not flow through these. Each step
    waits for the device once, also when their number is fixed, and more often while a sample is on Newton's method.

    Args:
        memory: The most differences in Anderson's window, which grows by one per step: two vectors of the state's size
            each. It is never longer than the state has entries. Broyden's estimate, where it comes to that, has no
            limit.
        linear_solver: The solver of Newton's linear systems, as in :class:`NewtonKrylov`.
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
        choice = MethodChoice.at_start(rms_norm(fz - z0), rms_norm(fz))
        return AutoState(z=z0, fz=fz, choice=choice, best=State(z0, fz), newton=self._newton.begin(z0, fz))

    @torch.no_grad()
    def step(self, f: FlatMapping, state: AutoState) -> AutoState:
        if state.window is not None:
            return self._mixed_step(f, state, state.window)
        z = state.fz
        fz = f(z)
        error, choice = rms_norm(fz - z), state.choice
        trail = Trail(state.z, state.fz, state.trail, 1 if state.trail is None else state.trail.length + 1)
        # One look at the host is all the work of a step in which every sample is fast.
        flags = torch.stack((error <= FAST_REDUCTION * choice.error, choice.is_tame(error, z.shape[1])))
        num_fast, num_tame = flags.sum(dim=1).tolist()
        if trail.length < self.memory and num_fast == len(z):
            return dataclasses.replace(state, z=z, fz=fz, choice=dataclasses.replace(choice, error=error), trail=trail)
        state, window = self._apart(state)
        # A sample that is not fast goes on to Anderson's method, or to Newton's if its residual explodes.
        needs = Needs.at_most(len(z), picard=False) if num_tame == len(z) else None
        return self._judge(dataclasses.replace(state, needs=needs), window, z, fz, error)

    def restarted(self, state: AutoState, rows: Tensor, z: Tensor, fz: Tensor) -> AutoState:
        if state.window is None:
            state = dataclasses.replace(self._apart(state)[0], needs=Needs.at_most(len(z), picard=False))
        needs = state.needs
        if needs is not None:
            needs = needs._replace(fresh=True, grew=True, fast=True) if needs.is_settled else None
        return dataclasses.replace(
            state,
            z=replaced(state.z, rows, z),
            fz=replaced(state.fz, rows, fz),
            best=State(replaced(state.best.z, rows, z), replaced(state.best.fz, rows, fz)),
            choice=state.choice.restarted(rows, rms_norm(fz - z), rms_norm(fz)),
            needs=needs,
        )

    def _apart(self, state: AutoState) -> tuple[AutoState, AndersonState]:
        """The state in which every sample has its own method, and its window, which holds the plain steps so far."""
        iterates: list[State] = [state]
        trail = state.trail
        while trail is not None:
            iterates.append(trail)
            trail = trail.earlier
        first = iterates.pop()
        anderson = self._anderson(first.z)
        window = anderson.init(lambda _: first.fz, first.z)
        for iterate in reversed(iterates):
            window = anderson.absorb(window, iterate.z, iterate.fz)
        choice = state.choice.after_fast_steps(state.choice.error, rms_norm(state.fz))
        best = State(state.z, state.fz)
        return dataclasses.replace(state, choice=choice, best=best, trail=None, window=window), window

    def _mixed_step(self, f: FlatMapping, state: AutoState, window: AndersonState) -> AutoState:
        """A step of every sample by its own method."""
        choice, anderson, newton, needs = state.choice, self._anderson(state.z), state.newton, state.needs
        # The step looks at the host once: here, where it must know more, or else when the map has been called.
        looks = needs is None or (needs.num_samples != len(state.z) and not needs.is_settled)
        if needs is None or looks:
            needs = Needs.of(choice)
        broyden = state.broyden if needs.broyden else None
        if needs.fresh:
            window = anderson.restarted(window, choice.fresh, state.z, state.fz)
            newton = self._newton.restarted(newton, choice.fresh, state.z, state.fz)
            if broyden is not None:
                broyden = _BROYDEN.restarted(broyden, choice.fresh, state.z, state.fz)
        if broyden is None and needs.broyden:
            broyden = _BROYDEN.init(lambda _: state.fz, state.z)

        z, growing = state.fz, None
        if needs.anderson:
            proposal = anderson.propose(window)
            rows = None if needs.is_settled and not needs.fast else choice.method == ANDERSON
            if needs.grew:
                growing = (choice.grown > 0) | (rms_norm(proposal) <= _COLLAPSE * rms_norm(state.best.z))
                growing = growing & choice.grew & (choice.grown < LONGEST_GROWTH)
                growing = growing if rows is None else growing & rows
                rows = ~growing if rows is None else rows & ~growing
            z = proposal if rows is None else replaced(z, rows, proposal)
        if broyden is not None:
            z = replaced(z, choice.method == BROYDEN, broyden.z + broyden.direction)
        if needs.newton:
            newton = dataclasses.replace(newton, z=state.z, fz=state.fz, error=choice.error)
            newton = self._newton.step_some(f, newton, choice.method == NEWTON, z)
            z, fz, error = newton.z, newton.fz, newton.error
        else:
            fz = f(z)
            error = rms_norm(fz - z)
        if broyden is not None:
            # What it makes of the other samples is meaningless, and cleared before it is used.
            broyden = _BROYDEN.step(lambda _: fz, broyden)
        state = dataclasses.replace(state, newton=newton, broyden=broyden, needs=None)
        if needs.is_settled and not looks:
            return self._settled_step(state, needs, window, z, fz, error, growing)
        state = self._judge(state, window, z, fz, error, growing)
        if not looks or needs.newton:
            return dataclasses.replace(state, needs=Needs.of(state.choice))
        if needs.is_settled and not needs.fast:
            return dataclasses.replace(state, needs=Needs.at_most(len(z), picard=True))
        return state

    def _settled_step(
        self,
        state: AutoState,
        needs: Needs,
        window: AndersonState,
        z: Tensor,
        fz: Tensor,
        error: Tensor,
        growing: Tensor | None,
    ) -> AutoState:
        """What :meth:`_judge` returns, with less work where all samples are on FAST or ANDERSON and calm.

        A look at the host tells whether that is so. Then no sample goes back to its best iterate, so that ``z`` and
        ``fz`` stay as they are, and :meth:`MethodChoice.after_calm` gives the same choice. Where every sample improved,
        the new best iterate is this one.
        """
        choice, count = state.choice, len(z)
        course = choice.course(error, size=z.shape[1], fast=needs.fast, growing=growing)
        constant = (fz == state.fz).all(dim=1)
        flags = [course.calm, course.better, course.grew, constant]
        if course.first is not None:
            # With "less than" for "but not".
            flags += [course.first, choice.is_tame(error, z.shape[1]) < course.first]
        # The look at the host.
        num_calm, num_better, num_grew, num_constant, *rest = torch.stack(flags).sum(dim=1).tolist()
        num_fast, num_exploding = rest or (0, 0)
        if num_calm < count:
            # Those that leave ANDERSON come to PICARD; those that leave FAST to ANDERSON, or to NEWTON if they explode.
            known = None if num_exploding else Needs.at_most(count, picard=True)
            return self._judge(dataclasses.replace(state, needs=known), window, z, fz, error, growing)
        all_better = num_better == count
        choice = choice.after_calm(
            error,
            rms_norm(fz),
            course,
            all_better=all_better,
            any_fresh=needs.fresh,
            any_grown=needs.grew,
            constant=constant if num_constant else None,
        )
        best = State(z, fz)
        if not all_better:
            best = State(replaced(state.best.z, course.better, z), replaced(state.best.fz, course.better, fz))
        known = needs._replace(fresh=False, grew=num_grew > 0, fast=num_fast + num_constant > 0)
        window = self._anderson(z).absorb(window, z, fz)
        return dataclasses.replace(state, z=z, fz=fz, choice=choice, best=best, window=window, needs=known)

    def _judge(
        self,
        state: AutoState,
        window: AndersonState,
        z: Tensor,
        fz: Tensor,
        error: Tensor,
        growing: Tensor | None = None,
    ) -> AutoState:
        """The state at ``z``, with steps that led astray taken back and the methods for the next step."""
        choice, better, back = state.choice.after(
            error,
            rms_norm(fz),
            size=z.shape[1],
            memory=self.memory,
            growing=torch.zeros_like(state.choice.fresh) if growing is None else growing,
            constant=(fz == state.fz).all(dim=1),
        )
        best = State(replaced(state.best.z, better, z), replaced(state.best.fz, better, fz))
        z, fz = replaced(z, back, best.z), replaced(fz, back, best.fz)
        window = self._anderson(z).absorb(window, z, fz)
        return dataclasses.replace(state, z=z, fz=fz, choice=choice, best=best, window=window)

    @property
    def _newton(self) -> NewtonKrylov:
        return NewtonKrylov(linear_solver=self.linear_solver)

    def _anderson(self, z: Tensor) -> Anderson:
        # More differences than unknowns depend on each other, and old ones only blur the new.
        return Anderson(memory=max(1, min(self.memory, z.shape[1])), safeguard=False)
