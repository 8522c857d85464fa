"""Which method each sample of :class:`solvers.Auto` is on, and when it moves to another one."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.methods.newton_krylov import FEW_UNKNOWNS
from solvers.methods.solver import replaced
from solvers.problem.norms import relative

# The methods, in the order in which a sample comes to them; after the last it goes on with ANDERSON.
FAST, ANDERSON, PICARD, BROYDEN, NEWTON = range(5)

# A sample whose residual falls more slowly than this in one of the first plain steps goes on to Anderson acceleration,
# which from there on needs fewer steps.
FAST_REDUCTION = 0.1
# With few unknowns, a residual that grows this much in one of the first plain steps leads to Newton's method at once.
# On the other plain steps it may grow this much altogether.
_EXPLOSION = 100.0
# A method must reduce the smallest residual to this part of it within its patience; PICARD the relative residual to
# less.
_PROGRESS, _PLAIN_PROGRESS = 0.9, 0.5
# On its nth visit, plain iteration hands the sample back to Anderson acceleration after reducing the relative residual
# to the nth power of this, if it has fallen in so many steps in a row.
_PLAIN_REDUCTION, _FALLS = 0.1, 3
# Anderson's window is forgotten where the residual is this many times the smallest one, after so many steps or more
# since it was last halved.
_WILD, _WILD_STEPS = 2.0, 3
# A step to a residual this many times the size of the first image and its residual is taken back.
_GROWTH = 1e5
# The most plain steps away from a fixed point at zero that repels: enough for growth by 1e10 at a doubling per step.
LONGEST_GROWTH = 34
# A relative residual of this many units in the last place is not worth another method.
_ROUNDING = 100.0


class Verdict(NamedTuple):
    """What follows from a step.

    Attributes:
        choice: The methods of the next step.
        better: (B,) bool, the samples with a new best iterate.
        back: (B,) bool, those that go back to their best iterate.
    """

    choice: "MethodChoice"
    better: Tensor
    back: Tensor


class Course(NamedTuple):
    """How a step went.

    Attributes:
        calm: (B,) bool, the samples that neither move to another method nor go back to their best iterate.
        better: (B,) bool, those with a smaller error than ever.
        grew: (B,) bool, those whose error grew.
        progress: (B,) bool, those that have made progress.
        idle: (B,) int64, the number of steps since then.
        first: (B,) bool, those on FAST; None if there are none.
    """

    calm: Tensor
    better: Tensor
    grew: Tensor
    progress: Tensor
    idle: Tensor
    first: Tensor | None


@dataclasses.dataclass
class MethodChoice:
    """The method of each sample and how it fares. All fields are of shape (B,); counts are int64.

    Attributes:
        method: One of FAST, ANDERSON, PICARD, BROYDEN and NEWTON, int8.
        fresh: Bool; whether the next step is the first one of a method that remembers nothing of the sample.
        error: Root mean square of ``f(z) - z``.
        measure: That relative to the size of ``f(z)``.
        limit: The largest error that is not taken back.
        best_error: The smallest error.
        best_measure: The measure where the error was smallest.
        mark: The error at the last progress, on PICARD the measure.
        idle: Steps since then.
        half: The error when it was last halved, or when the sample was last fresh.
        age: Steps since then.
        expands: Bool; whether the last of the first plain steps made the error larger.
        wild: Bool; whether Anderson's window has been forgotten since the error was last halved.
        rise: How much the error grew in the last step.
        falls: For how many steps in a row the measure has fallen.
        visits: How often the sample has returned to plain iteration.
        target: The measure at which plain iteration hands the sample back.
        grew: Bool; whether the error grew in the last step.
        grown: How many plain steps the sample has taken away from a fixed point at zero.
    """

    method: Tensor
    fresh: Tensor
    error: Tensor
    measure: Tensor
    limit: Tensor
    best_error: Tensor
    best_measure: Tensor
    mark: Tensor
    idle: Tensor
    half: Tensor
    age: Tensor
    expands: Tensor
    wild: Tensor
    rise: Tensor
    falls: Tensor
    visits: Tensor
    target: Tensor
    grew: Tensor
    grown: Tensor

    @classmethod
    def at_start(cls, error: Tensor, scale: Tensor) -> "MethodChoice":
        """The choice for samples that begin with this error (B,) and size (B,) of the image."""
        no, zero = torch.zeros_like(error, dtype=torch.bool), torch.zeros_like(error, dtype=torch.int64)
        measure = relative(error, scale)
        best_error = torch.where(error.isfinite(), error, torch.inf)
        return cls(
            method=torch.full_like(error, FAST, dtype=torch.int8),
            fresh=no,
            error=error,
            measure=measure,
            limit=_GROWTH * (error + scale),
            best_error=best_error,
            best_measure=measure,
            mark=best_error,
            idle=zero,
            half=best_error,
            age=zero,
            expands=no,
            wild=no,
            rise=torch.zeros_like(error),
            falls=zero,
            visits=zero,
            target=torch.zeros_like(error),
            grew=no,
            grown=zero,
        )

    def after_fast_steps(self, error: Tensor, scale: Tensor) -> "MethodChoice":
        """The choice after plain steps that were all fast, the last one to this error and size of the image."""
        return dataclasses.replace(self.at_start(error, scale), limit=self.limit)

    def restarted(self, rows: Tensor, error: Tensor, scale: Tensor) -> "MethodChoice":
        """The choice with the samples ``rows`` (B,) as if they began with this error and size of the image."""
        new = dataclasses.replace(self.at_start(error, scale), fresh=torch.ones_like(self.fresh))
        names = [field.name for field in dataclasses.fields(self)]
        return MethodChoice(**{name: replaced(getattr(self, name), rows, getattr(new, name)) for name in names})

    def after(
        self, error: Tensor, scale: Tensor, *, size: int, memory: int, growing: Tensor, constant: Tensor
    ) -> Verdict:
        """Judge a step.

        Args:
            error: (B,) the new error.
            scale: (B,) the size of the new image.
            size: How many entries a sample has.
            memory: The length of Anderson's window.
            growing: (B,) bool, the samples that took a plain step away from a fixed point at zero.
            constant: (B,) bool, those with the same image as before: the map is made so for finished ones.
        """
        first, anderson, plain, newton = (self.method == method for method in (FAST, ANDERSON, PICARD, NEWTON))
        measure = relative(error, scale)
        limit = torch.where(growing, torch.maximum(self.limit, _GROWTH * (error + scale)), self.limit)
        # Also where the error is NaN; a sample without any finite residual has no iterate to go back to.
        lost = ~(error <= limit) & self.best_error.isfinite()
        growing = growing & ~lost

        patience = self._patience(size)
        falls = torch.where(measure < self.measure, self.falls + 1, 0)
        progress = torch.where(
            plain, self._plain_progress(error, measure, falls, patience), error <= _PROGRESS * self.mark
        )
        progress = progress | growing
        halved = (error <= 0.5 * self.half) | growing
        idle = torch.where(progress, 0, self.idle + 1)

        recovered = plain & (measure <= self.target) & (falls >= _FALLS) & ~lost
        better = (error < self.best_error) | growing | recovered
        best_error = torch.where(better, error, self.best_error)
        best_measure = torch.where(better, measure, self.best_measure)

        # A linear map of few unknowns that expands is known after as many steps as there are, and not before.
        expands = torch.where(first, error > self.error, self.expands)
        learning = self.age < torch.where(expands & (size <= FEW_UNKNOWNS), min(size, memory) + 2, _WILD_STEPS)
        wild = anderson & ~learning & (error > _WILD * self.best_error) & ~growing
        slow = torch.where(first, error > FAST_REDUCTION * self.error, idle >= patience)
        slow = slow & (error > _ROUNDING * torch.finfo(error.dtype).eps * scale) & ~recovered
        slow = slow | (wild & self.wild) | (plain & (error > _EXPLOSION * self.best_error))
        # Nothing is known but that plain steps lead astray.
        explodes = first & (lost | (error > _EXPLOSION * self.error) & (size <= FEW_UNKNOWNS))
        moves = lost | slow
        # From the first plain steps to the window of the same steps a sample goes on where it is.
        back = lost | wild | (slow & ~first) | explodes

        following = torch.where(explodes, NEWTON, torch.where(newton, ANDERSON, self.method + 1))
        method = torch.where(moves, following, torch.where(recovered, ANDERSON, self.method))
        method = torch.where(constant & ~newton, FAST, method)
        returns = moves & (method == PICARD)
        visits = self.visits + returns
        mark = torch.where(progress, torch.where(plain, measure, error), self.mark)
        mark = torch.where(moves | recovered, torch.where(returns, best_measure, best_error), mark)
        rise = error - self.error
        error = torch.where(back, best_error, error)
        choice = MethodChoice(
            method=method,
            fresh=back,
            error=error,
            measure=torch.where(back, best_measure, measure),
            limit=limit,
            best_error=best_error,
            best_measure=best_measure,
            mark=mark,
            idle=torch.where(moves | recovered, 0, idle),
            half=torch.where(halved | back, error, self.half),
            age=torch.where(halved | back, 0, self.age + 1),
            expands=expands,
            wild=(self.wild | wild) & ~halved & ~moves,
            rise=rise,
            falls=torch.where(back, 0, falls),
            visits=visits,
            target=torch.where(returns, best_measure * _PLAIN_REDUCTION ** visits.to(error.dtype), self.target),
            grew=error > self.error,
            grown=torch.where(growing, self.grown + 1, torch.where(self.grown > 0, LONGEST_GROWTH, 0)),
        )
        return Verdict(choice, better, back)

    def is_tame(self, error: Tensor, size: int) -> Tensor:
        """(B,) bool: whether a plain step to this error does not explode, for samples of so many entries."""
        limit = torch.minimum(self.limit, _EXPLOSION * self.error) if size <= FEW_UNKNOWNS else self.limit
        return error <= limit

    def course(self, error: Tensor, *, size: int, fast: bool, growing: Tensor | None) -> Course:
        """How a step went in which all samples are on ANDERSON or, if ``fast``, on FAST.

        Not all that is calm is found to be so, but what is found to be so is: :meth:`after` would neither move these
        samples nor take them back.
        """
        progress = error <= _PROGRESS * self.mark
        idle = (self.idle + 1).masked_fill_(progress, 0)
        calm = (error <= _WILD * self.best_error) | (self.age < _WILD_STEPS)
        calm = calm & (idle < _window_patience(size))
        first = None
        if fast:
            first = self.method == FAST
            calm = torch.where(first, error <= FAST_REDUCTION * self.error, calm)
        calm = calm & (error <= self.limit)
        if growing is not None:
            calm = calm & ~growing
        return Course(calm, error < self.best_error, error > self.error, progress, idle, first)

    def after_calm(
        self,
        error: Tensor,
        scale: Tensor,
        course: Course,
        *,
        all_better: bool,
        any_fresh: bool,
        any_grown: bool,
        constant: Tensor | None,
    ) -> "MethodChoice":
        """The choice after a step in which all samples are calm.

        It is what :meth:`after` returns, because that changes nothing else where no sample moves, goes back or grows;
        except for three fields that are not read before it sets them anew. The fields ``falls`` and ``rise`` matter
        only on PICARD, to which a sample comes by a step that is not calm. On FAST, each step sets ``expands``.
        """
        better, measure = course.better, relative(error, scale)
        halved = error <= 0.5 * self.half
        return dataclasses.replace(
            self,
            method=self.method if constant is None else self.method.masked_fill(constant, FAST),
            fresh=torch.zeros_like(self.fresh) if any_fresh else self.fresh,
            error=error,
            measure=measure,
            best_error=error if all_better else torch.where(better, error, self.best_error),
            best_measure=measure if all_better else torch.where(better, measure, self.best_measure),
            mark=torch.where(course.progress, error, self.mark),
            idle=course.idle,
            half=torch.where(halved, error, self.half),
            age=(self.age + 1).masked_fill_(halved, 0),
            wild=self.wild > halved,  # of truth values: and not
            grew=course.grew,
            grown=(self.grown > 0) * LONGEST_GROWTH if any_grown else self.grown,
        )

    def _plain_progress(self, error: Tensor, measure: Tensor, falls: Tensor, patience: Tensor) -> Tensor:
        """(B,) bool: whether plain iteration is on its way to a solution.

        The iterates may grow on that way, and their residuals with them. Then the relative ones fall, and the absolute
        ones grow less and less, unlike those of iterates that run away.
        """
        bends = (error - self.error < 0.98 * self.rise) & (falls >= _FALLS) & (measure < self.mark)
        halved = (measure <= _PLAIN_PROGRESS * self.mark) & (error <= (1 - 0.5 / patience) * self.error)
        return halved | ((error > self.error) & bends)

    def _patience(self, size: int) -> Tensor:
        """(B,) how many steps the methods may take without progress, for samples of so many entries.

        Together they are less than the driver's patience. Quasi-Newton methods know all directions of a small state
        after few steps. With few unknowns a step of Newton's method is cheap, and it may search for a way out where the
        residual has a minimum. That of plain iteration doubles at every visit: it has the last word.
        """
        few = size <= FEW_UNKNOWNS
        steps = {ANDERSON: _window_patience(size), PICARD: 12, BROYDEN: min(size + 3, 15)}
        patience = torch.full_like(self.idle, 40 if few else 3)
        for method, most in steps.items():
            patience = torch.where(self.method == method, most, patience)
        return torch.where(self.method == PICARD, patience << (self.visits - 1).clamp(0, 20), patience)


def _window_patience(size: int) -> int:
    """How many steps Anderson acceleration may take without progress, for samples of so many entries."""
    return min(size + 6, 30) if size <= FEW_UNKNOWNS else 15
