"""Full Newton steps for many small systems, without the bookkeeping of samples that need more than these."""

import dataclasses
import math

import torch
from torch import Tensor

from solvers._measure import Measure
from solvers._rules import TINY
from solvers._samples import count_true
from solvers._secant import Secant, some_entries
from solvers._solution import Status
from solvers._stopping import Stopping
from solvers.methods.dense_jacobian import with_jacobian
from solvers.methods.descent import SUFFICIENT
from solvers.methods.jacobian_product import Way
from solvers.methods.root_map import RootMap
from solvers.methods.solver import State
from solvers.problem import InDims, Layout, all_of, relative, with_tensors
from solvers.problem.norms import underflow

# The part of the samples that must have ended before the others are copied together.
SHARE = 0.25
# A step of at most this many rounding units counts as zero.
ROUNDED = 64
# A root is tested again if F, by its slope at the start, belongs to a step of more than this part of the tolerance.
SUSPECT = 0.1


@dataclasses.dataclass(frozen=True)
class Reached:
    """The roots that full steps have reached, and which samples need something else.

    Attributes:
        value: (B, D) the roots; for a sample that has reached none, its start.
        num_steps: (B,) int64, the step at which the sample converged; 0 for one that has not.
        residual: (B,) the step that would have come next, relative to the value.
        error_estimate: (B,) as in :class:`Solution`.
    """

    value: Tensor
    num_steps: Tensor
    residual: Tensor
    error_estimate: Tensor

    @classmethod
    def nothing(cls, z0: Tensor) -> "Reached":
        """No roots, from the start ``z0`` (B, D)."""
        nan = z0.new_full((len(z0),), math.nan)
        return cls(z0.clone(), torch.zeros_like(nan, dtype=torch.int64), nan, nan.clone())

    def part(self, start: int, stop: int) -> "Reached":
        """A view of some samples."""
        return Reached(*(getattr(self, field.name)[start:stop] for field in dataclasses.fields(self)))

    def store(self, rows: Tensor, step: int, value: Tensor, residual: Tensor, error_estimate: Tensor) -> None:
        """Take in the samples ``rows`` (n,), which have converged in this step."""
        self.num_steps.index_fill_(0, rows, step)
        self.value.index_copy_(0, rows, value)
        self.residual.index_copy_(0, rows, residual)
        self.error_estimate.index_copy_(0, rows, error_estimate)


@dataclasses.dataclass
class Pace:
    """What the next full step of each sample is compared with.

    Attributes:
        size: (n,) Euclidean norm of F.
        rounded: (n,) norm of the step, with what rounding may hide.
        smallest: (n,) the smallest norm of the value so far.
    """

    size: Tensor
    rounded: Tensor
    smallest: Tensor

    def after(self, size: Tensor, rounded: Tensor, scale: Tensor) -> tuple["Pace", Tensor]:
        """That of the next step, and (n,) bool, whether this one is accepted; ``scale`` is the next value's norm."""
        shrinks, grows_not = size <= (1 - SUFFICIENT) * self.size, scale <= 10 * self.smallest
        allowed = all_of(shrinks, rounded < self.rounded, grows_not)
        return Pace(size, rounded, torch.minimum(self.smallest, scale)), allowed


def next_step(residual: Tensor, matrix: Tensor) -> Tensor:
    """(n, D) what Newton's step subtracts from the iterate, for F (n, D) and its Jacobian (n, D, D)."""
    if residual.shape[1] == 1:
        return residual / matrix.squeeze(2)
    step: Tensor = torch.linalg.solve_ex(matrix, residual.unsqueeze(2))[0].squeeze(2)
    return step


def at_start(
    measure: Measure, error: Tensor, scale: Tensor, size: Tensor, start_size: Tensor, absolute: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,) bool each: which samples have converged with the first step, and which of the others may take it."""
    allowed = all_of(error < math.inf, 10 * start_size >= scale, (error > 0) | (size == 0))
    # One iterate tells nothing of the error, so that the residual has to.
    met = all_of(TINY * measure.bound(scale, absolute) >= error, scale > underflow(error), allowed)
    return met, allowed


def found(
    measure: Measure,
    secant: Secant,
    pace: Pace,
    error: Tensor,
    scale: Tensor,
    start_size: Tensor,
    absolute: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of samples (n,) whose step is within its bound: whether their error is as well, and the estimate of it."""
    slack = measure.slack(error, measure.bound(scale, absolute))
    met = secant.shows_a_digit(pace.rounded, scale, start_size, slack)
    # A step of zero may come from an infinite slope.
    met = all_of(met, (error > 0) | (pace.size == 0))
    estimate = secant.df / secant.dg * measure.in_units(error)
    return met, estimate.masked_fill(error == 0, 0.0)


def limit_of(measure: Measure, residual: Tensor, error: Tensor, bound: Tensor) -> Tensor:
    """(n,) the norm of F at a root up to which nothing is suspected.

    Args:
        measure: The norms.
        residual: (n, D) F at the start.
        error: (n,) the norm of the first step.
        bound: (n,) the tolerance.
    """
    return measure.norm(residual) * torch.where(error > 0, SUSPECT * bound / error, 0.0)


def judged_again(f: RootMap, measure: Measure, reached: Reached, change: Tensor, limit: Tensor) -> Tensor:
    """(B,) the status of each root, now that the others are where they are; for other samples, CONVERGED.

    A value may no longer be a root where F mixes samples, or changes from call to call. Where |F| has not fallen far
    below the tolerance, the next step tells.

    Args:
        f: The map; called once more, with its Jacobian, where some |F| is so large.
        measure: The norms and bounds.
        reached: The roots; the residuals of those that are roots no longer become those of now.
        change: (B,) the norm of F.
        limit: (B,) what :func:`limit_of` says; infinite for samples that have reached no root.
    """
    status = torch.full_like(reached.num_steps, Status.CONVERGED, dtype=torch.int8)
    large = ~(change <= limit) & (limit < math.inf)
    if not bool(large.any()):
        return status
    step = next_step(*with_jacobian(f.residual, reached.value)[:2])
    error, scale = measure.parts(step), measure.parts(reached.value)
    off = large & ~(error <= 2 * measure.bound(scale, ROUNDED * f.eps * scale))
    reached.residual.copy_(torch.where(off, relative(error, scale), reached.residual))
    return status.masked_fill(off, Status.UNSETTLED)


class FullSteps:
    """Newton's method for as long as every full step of a sample is accepted.

    What a sample reaches is what :class:`solvers.Newton` reaches under the driver loop, step for step, because the
    tests are the same. A sample is given up, and left to that loop, in the first step that reduces neither the residual
    nor its own length enough, that is singular or not finite, or in which the value has grown tenfold. Where few
    samples need that, this takes a fraction of the loop's passes over memory.

    Args:
        f: The map; this object takes samples out of it.
        reached: What to store the results in; its value is the start.
        layout: The layout of the state.
        stopping: When to stop, without tolerances for single leaves.
        in_dims: Which dimension of each argument of ``f`` indexes the samples.
        compact: Take samples that have ended out of these arguments; otherwise ``f`` is called with all samples.

    Attributes:
        limit: (B,) what :func:`limit_of` says, once it has run.
    """

    limit: Tensor

    def __init__(
        self, f: RootMap, reached: Reached, layout: Layout, stopping: Stopping, in_dims: InDims, *, compact: bool
    ) -> None:
        self._f, self._reached, self._in_dims, self._compact = f, reached, in_dims, compact
        self._max_steps = stopping.max_steps
        self._measure = Measure(stopping, layout, root=True)
        self._way: Way = "forward mode"
        # The samples that are left, None for all, and the iterates of all.
        self._rows: Tensor | None = None
        self._whole = reached.value
        # Of the samples that are left: the iterates (n, D), F there (n, D) and its Jacobian (n, D, D), the iterates
        # after the next step (n, D); which samples have ended (n,), None for none.
        self._z = reached.value.clone()
        self._residual, self._matrix = self._z, self._z.unsqueeze(2)
        self._fz = self._z
        self._ended: Tensor | None = None

    def run(self) -> None:
        """Take all steps that samples need."""
        self._start()
        for step in range(2, self._max_steps + 1):
            self._leave_out_ended()
            if not len(self._z):
                break
            self._step(step)

    def _start(self) -> None:
        measure, error = self._measure, self._take_step()
        scale, size = measure.parts(self._fz), torch.linalg.vector_norm(self._residual, dim=1)
        self._start_size = measure.sizes_at_start(self._z, scale)
        if measure.needs_unit:
            self._f.set_scaling_by_matrix(self._z, self._residual, self._matrix)
        self._absolute = measure.absolute(self._start_size, self._f.unit)
        self.limit = limit_of(measure, self._residual, error, measure.bound(scale, self._absolute))
        rounded = torch.add(error, scale, alpha=self._f.eps / 2)
        self._pace = Pace(size, rounded, torch.minimum(self._start_size, scale))
        met, allowed = at_start(measure, error, scale, size, self._start_size, self._absolute)
        num_met, num_allowed = count_true(torch.stack((met, allowed)))
        if num_met:
            rows = met.nonzero().squeeze(1)
            residual = relative(error[rows], scale[rows])
            self._reached.store(rows, 1, self._fz[rows], residual, torch.full_like(residual, math.nan))
        if num_met or num_allowed < len(met):
            self._ended = met | ~allowed

    def _step(self, step: int) -> None:
        measure, before, ended = self._measure, self._z, self._ended
        self._z = self._fz
        if ended is not None:  # F sees them where they were finite
            gone = ended.nonzero().squeeze(1)
            self._z = self._z.index_copy(0, gone, before.index_select(0, gone))
        error = self._take_step()
        scale, size = measure.parts(self._fz), torch.linalg.vector_norm(self._residual, dim=1)
        self._pace, allowed = self._pace.after(size, torch.add(error, scale, alpha=self._f.eps / 2), scale)
        within = (measure.bound(scale, self._absolute) >= error) & allowed
        if ended is not None:
            within, allowed = within & ~ended, allowed | ended
        num_within, num_allowed = int(torch.count_nonzero(within)), int(torch.count_nonzero(allowed))
        if num_allowed < len(allowed):
            self._ended = ~allowed if ended is None else ended | ~allowed
        if num_within:
            self._take_in(step, within.nonzero().squeeze(1), before, error, scale)

    def _take_in(self, step: int, rows: Tensor, before: Tensor, error: Tensor, scale: Tensor) -> None:
        """Store those of the ``rows`` (m,), whose residual is small enough, whose error is as well."""

        def some(of_all: Tensor) -> Tensor:
            return of_all.index_select(0, rows)

        z, fz, error, scale = some(self._z), some(self._fz), some(error), some(scale)
        after = State(z, fz)
        entries = some_entries(after)
        last = some_entries(State(some(before), z))
        secant = Secant.between(last, entries, complete=entries is after, contracts=True)
        pace = with_tensors(self._pace, some)
        met, estimate = found(self._measure, secant, pace, error, scale, some(self._start_size), some(self._absolute))
        residual = relative(error, scale)
        if not bool(met.all()):
            rows, fz, residual, estimate = rows[met], fz[met], residual[met], estimate[met]
        places = rows if self._rows is None else self._rows.index_select(0, rows)
        self._reached.store(places, step, fz, residual, estimate)
        ended = torch.zeros(len(self._z), dtype=torch.bool, device=rows.device) if self._ended is None else self._ended
        self._ended = ended.index_fill(0, rows, True)

    def _take_step(self) -> Tensor:
        """Evaluate F and its Jacobian at the iterates, and the next ones; returns the norm of that step (n,)."""
        f, rows = self._f, self._rows
        if rows is None or self._compact:
            self._residual, self._matrix, self._way = with_jacobian(f.residual, self._z, self._way)
        else:
            self._whole = self._whole.index_copy(0, rows, self._z)
            residual, matrix, self._way = with_jacobian(f.residual, self._whole, self._way)
            self._residual, self._matrix = residual.index_select(0, rows), matrix.index_select(0, rows)
        step = next_step(self._residual, self._matrix)
        self._fz = self._z - step
        return self._measure.parts(step)

    def _leave_out_ended(self) -> None:
        """Go on without the samples that have ended, once there are enough of them."""
        if self._ended is None:
            return
        number = len(self._ended)
        left = number - int(torch.count_nonzero(self._ended))
        if left and left > (1 - SHARE) * number:
            return
        keep = (~self._ended).nonzero().squeeze(1)
        if self._compact:
            self._f.take_samples(keep, self._in_dims)
        elif self._rows is None:
            self._whole = self._z  # F goes on seeing those that have ended where they are
        self._rows = keep if self._rows is None else self._rows.index_select(0, keep)
        self._pace = with_tensors(self._pace, lambda part: part.index_select(0, keep))
        for name in ("_z", "_fz", "_start_size", "_absolute"):
            setattr(self, name, getattr(self, name).index_select(0, keep))
        self._ended = None
