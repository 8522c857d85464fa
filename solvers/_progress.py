"""What becomes of each sample of a solve: its best value, its status, and the step at which it stops."""

import dataclasses
import math

import torch
from torch import Tensor

from solvers._fixed_steps import Outcome
from solvers._samples import News, Samples, Verdict
from solvers._secant import Secant
from solvers._solution import ACTIVE, Status
from solvers._stopping import Measure, Stopping
from solvers.methods.solver import State
from solvers.problem import relative, with_tensors
from solvers.problem.norms import FLOOR, underflow

# Steps without a smaller residual after which a sample that is at the floor ends there.
FLOOR_PATIENCE = 10

# A residual this many times its minimum is growing or wild, and not stagnant.
WILD = 1e3

# Growth of the residual since the start from which a sample that is out of steps counts as diverged.
FAR = 1e6

# A residual that gets beyond the limit in so many steps from its smallest value has not grown there step by step.
SUDDEN = 10

# How often in a row a sample is taken back without a smaller residual in between.
MOST_TAKEN_BACK = 10

# A residual this many times its bound does not meet it in the next step, as a rule.
CLOSE = 100.0

# The part of its bound below which the residual of a single iterate counts as convergence.
TINY = 1e-2


class ToleranceTest:
    """Follows every sample: its best value and residual, its status, the step at which it stops.

    A sample that has stopped, well or badly, keeps its value; later updates do not touch it. An update is tensor code
    without branches up to one look at the host, which tells how many samples are left and what is to be done beyond
    remembering the latest iterate as the best one. The changes from step to step, which only convergence depends on,
    are followed where a residual is within its bound. How many of those samples have converged, the next look tells;
    where all that are left may have, this one must, so that the changes are then followed before it. (If all of them
    come from far away to their bounds in one step, it takes a second look.)

    Args:
        stopping: When a sample is done.
        measure: The norms and bounds for its state.
        eps: The relative rounding error of the map.
        remembers: Whether the solver remembers earlier steps, which can lead it astray.
        keep_history: Keep the residuals of every tested step.

    Attributes:
        num_done: How many of the samples that are left in the batch have stopped at least, on the host.
        may_have_ended: Whether some may have stopped in the last step.
        lost: (B,) bool, the samples to be taken back: their last step led to infinity, NaN or far away. None if there
            are none.
        latest: The latest iterate and its image.
    """

    # Set by the first update.
    latest: State
    _samples: Samples

    def __init__(
        self, stopping: Stopping, measure: Measure, eps: float, *, remembers: bool, keep_history: bool
    ) -> None:
        self._stopping = stopping
        self._measure = measure
        self._eps = eps
        self._remembers = remembers
        self._least_patience = min(stopping.patience, FLOOR_PATIENCE)
        self._history: list[Tensor] | None = [] if keep_history else None
        self._step = 0
        # The last step at which the residual of every active sample fell: none of them can be stagnant soon after it.
        self._all_improved_at = 0
        # Whether all samples that are left may converge in the next step; for how many the map has contracted in every
        # step.
        self._near, self._num_contracting = True, 1
        self._before: State | None = None  # during an update, the iterate before the latest
        self.num_done = 0
        self.may_have_ended = self._some_done = False
        self.lost: Tensor | None = None
        # After drop_done: which samples of the batch are left, and what is known of all of them.
        self._rows: Tensor | None = None
        self._aside: Samples | None = None

    def update(self, step: int, state: State, *, taken_back: bool = False) -> bool:
        """Take in the state after a step; True when every sample has stopped.

        Nothing is taken in where samples are ``lost``, unless they were ``taken_back`` already.
        """
        first, self._step = self._step == 0, step
        if not taken_back:
            self._before = None if first else self.latest
        # Without what else the solver remembers.
        self.latest, self.lost = State(state.z, state.fz), None
        self._image_is_nearer = state.image_is_nearer
        with torch.no_grad():
            errors, scales = self._measure.parts(state.displacement), self._measure.parts(state.fz)
            if first:
                self._samples = self._at_start(state, errors, scales)
            news = self._news(errors, scales)
            waited = step - self._all_improved_at >= self._least_patience
            near = self._near or waited or step == self._stopping.max_steps or self._stopping.check_every > 1
            # Whether the map contracts is asked at steps that do not depend on the batch.
            asked = self._num_contracting > 0 and (step <= 3 or step % 4 == 0)
            secant, contracted = None, self._samples.contracts
            if not first and (near or asked):
                secant = self._secant()
                if asked:
                    self._samples.contracts = contracted & secant.contracts
            verdict = self._verdict(news, secant if near else None, waited=waited)
            if verdict.num_within and not (near or first):
                secant = secant or self._secant()
                if verdict.num_within < verdict.num_active:
                    verdict.met = news.within & self._is_sure(news, secant)
                    verdict.active = verdict.met < verdict.active
                else:  # all may have converged: only a second look tells
                    verdict = self._verdict(news, secant, waited=waited)
            if verdict.num_beyond and not taken_back:
                self.lost = self._lost(news)
                if self.lost is not None:
                    self._samples.contracts = contracted
                    return False
            taken = self._take_in(news, verdict, secant)
        self._before = None  # what follows, and the next step, need the room
        self._take_value(taken)
        return self.num_done == len(verdict.active)

    def _at_start(self, state: State, errors: Tensor, scales: Tensor) -> Samples:
        starts = self._measure.sizes_at_start(state.z, scales)
        error, scale, size = (self._measure.whole(parts) for parts in (errors, scales, starts))  # (B,)
        growth = self._stopping.max_growth
        self._far = min(1.0, FAR / growth)
        # Where squares lose digits to underflow, norms tell nothing.
        self._vanishing = error.new_tensor(10 * underflow(error))
        zero = torch.zeros_like(error, dtype=torch.int64)
        infinite = torch.full_like(error, math.inf)
        return Samples(
            value=state.fz,
            contracts=torch.ones_like(error, dtype=torch.bool),
            is_image=torch.ones_like(error, dtype=torch.bool),
            status=torch.full_like(error, ACTIVE, dtype=torch.int8),
            active=torch.ones_like(error, dtype=torch.bool),
            num_steps=zero,
            error=infinite,
            scale=torch.ones_like(scale),
            least=infinite,
            best_step=zero,
            error_ratio=torch.full_like(error, math.nan),
            latest=error,
            reference=infinite,
            next_growth=10 * size,
            taken_back=zero,
            start=state.z,
            start_size=size,
            absolute=self._measure.absolute(starts),
            limit=torch.where(error.isfinite(), growth * (error + scale), -1.0),
        )

    def _news(self, errors: Tensor, scales: Tensor) -> News:
        samples, measure = self._samples, self._measure
        error, scale, bound = measure.whole(errors), measure.whole(scales), measure.bound(scales, samples.absolute)
        rounded = torch.add(error, scale, alpha=self._eps / 2)
        within = measure.within(errors, bound)
        if self._step == 1:
            # One iterate tells nothing of the error, so that the residual has to.
            tiny = measure.within(errors, TINY * bound) & (scale > underflow(scale))
            within = tiny | (within & self._is_fixed())
        return News(
            error=error,
            scale=scale,
            rounded=rounded,
            improved=rounded < samples.least,
            grown=scale > samples.next_growth,
            allowed=error <= samples.limit,
            within=within,
            slack=self._measure.slack(errors, bound),
            close=measure.within(errors, CLOSE * bound),
        )

    def _secant(self) -> Secant:
        assert self._before is not None
        secant = Secant.between(self._before, self.latest)
        if self._image_is_nearer:
            secant.contracts = torch.ones_like(secant.contracts)
        return secant

    def _verdict(self, news: News, secant: Secant | None, *, waited: bool) -> Verdict:
        """What becomes of the samples, by one look; none is idle unless one can have ``waited`` long enough.

        After the first step, none converges without ``secant``.
        """
        samples = self._samples
        met = idle = None
        going = news.allowed
        if self._step == 1:
            met = news.within & news.allowed
        elif secant is not None:
            met = news.within & self._is_sure(news, secant)
        if waited and secant is not None:
            idle = self._idle(news, secant)
            # Norms whose squares have vanished tell nothing, entries do.
            fixed = (idle != ACTIVE) & (news.scale <= underflow(news.scale)) & self._is_fixed()
            met = fixed if met is None else met | fixed
            going = going & (idle == ACTIVE)
        # Of truth values, "less than" says "but not".
        if met is not None:
            going = met < going
        flags = (
            samples.active & going,
            news.allowed < samples.active,
            news.improved < samples.active,
            news.grown,
            news.close,
            news.within,
            samples.contracts,
        )
        # The look at the host.
        return Verdict(met, idle, flags[0], *torch.stack(flags).sum(dim=1).tolist())

    def _is_fixed(self) -> Tensor:
        """(B,) bool: whether f(z) is z, bit for bit."""
        return (self.latest.fz == self.latest.z).all(dim=1)

    def _is_sure(self, news: News, secant: Secant) -> Tensor:
        """(B,) bool: whether at least one digit of the value is right, as far as the iterates tell.

        The error, which is the residual times the change of f(z) over the change of f(z) - z in the last step, must be
        below a tenth of the size of the value or of the start. And if the value has grown tenfold, the residual must
        have fallen tenfold since, with room for rounding in f: a residual that is small only beside a value that ran
        away has not.
        """
        samples = self._samples
        tenfold = torch.add(self._vanishing, news.rounded, alpha=10)
        near = tenfold * secant.df < torch.maximum(news.scale, samples.start_size) * secant.dg
        fallen = torch.add(tenfold, news.scale, alpha=10 * FLOOR * torch.finfo(tenfold.dtype).eps)
        near = near & (fallen <= torch.where(news.grown, samples.latest, samples.reference))
        return near if news.slack is None else near & (secant.dz <= news.slack * secant.dg)

    def _idle(self, news: News, secant: Secant) -> Tensor:
        """(B,) int8: STAGNATED or PRECISION_FLOOR where no smaller residual is to be expected, else ACTIVE."""
        samples = self._samples
        waited = (self._step - samples.best_step.clamp_min(self._all_improved_at)).masked_fill(news.improved, 0)
        stagnant = (waited >= self._stopping.patience) & (news.error <= WILD * samples.error)
        at_floor = (waited >= FLOOR_PATIENCE) & (samples.residual <= FLOOR * self._eps) & self._is_sure(news, secant)
        idle = torch.full_like(samples.status, ACTIVE)
        return idle.masked_fill(stagnant, Status.STAGNATED).masked_fill(at_floor, Status.PRECISION_FLOOR)

    def _lost(self, news: News) -> Tensor | None:
        """(B,) bool: the samples that a step has led to infinity or NaN, or what the solver remembers far away."""
        samples = self._samples
        astray = ~news.error.isfinite()
        if self._remembers:
            since = self._step - samples.best_step.clamp_min(self._all_improved_at)
            astray = astray | ((since <= SUDDEN) & (news.error > WILD * samples.latest))
        lost = (news.allowed < samples.active) & astray
        lost = lost & (samples.taken_back < MOST_TAKEN_BACK)
        if self._step == 1 or not bool(lost.any()):
            return None
        samples.taken_back = samples.taken_back + lost
        return lost

    def _take_in(self, news: News, verdict: Verdict, secant: Secant | None) -> Tensor | None:
        """Remember a step; returns the samples with a new best iterate (B,), or None for all."""
        samples, tenfold = self._samples, 10 * news.scale
        active, left = verdict.active, verdict.num_active
        may_end = verdict.num_within or left < len(active) - self.num_done
        ended = samples.active & ~active if may_end else None
        self.may_have_ended = ended is not None
        self._some_done = self._some_done or self.may_have_ended
        if ended is not None:
            self._end(ended, news, verdict, secant)
        if self._history is not None:
            residual = torch.where(samples.active, relative(news.error, news.scale), samples.residual)
            self._history.append(residual if self._aside is None else self._merged(self._aside.residual, residual))
        if verdict.num_grown:
            samples.reference = torch.where(news.grown, samples.latest, samples.reference)
            samples.next_growth = torch.where(news.grown, tenfold, samples.next_growth)
        samples.next_growth = torch.minimum(samples.next_growth, tenfold)
        samples.latest = news.error
        if verdict.num_missed or self._some_done:
            taken = samples.active & (news.improved if verdict.met is None else news.improved | verdict.met)
            for name, value in (("error", news.error), ("scale", news.scale), ("least", news.rounded)):
                setattr(samples, name, torch.where(taken, value, getattr(samples, name)))
            samples.best_step = samples.best_step.masked_fill(taken, self._step)
            samples.taken_back = samples.taken_back.masked_fill(taken, 0)
            samples.is_image = torch.where(taken, samples.contracts, samples.is_image)
        else:
            taken = None
            samples.error, samples.scale, samples.least = news.error, news.scale, news.rounded
            samples.is_image = samples.contracts
        if secant is not None and self._step == self._stopping.max_steps:
            ratio = secant.error_ratio(samples.is_image)
            samples.error_ratio = torch.where(active, ratio, samples.error_ratio)
        if not verdict.num_missed:
            self._all_improved_at = self._step
        # All that are left may converge in the next step only if all are close.
        self._near = verdict.num_close >= left - verdict.num_within
        samples.active, self.num_done = active, len(active) - left
        self._num_contracting = (
            verdict.num_contracting if ended is None else min(verdict.num_contracting, len(active) - 1)
        )
        return taken

    def _end(self, ended: Tensor, news: News, verdict: Verdict, secant: Secant | None) -> None:
        """Give the samples ``ended`` (B,) their status."""
        samples = self._samples
        status = torch.full_like(samples.status, ACTIVE) if verdict.idle is None else verdict.idle
        # The later line wins.
        if verdict.num_beyond:
            status = status.masked_fill(~news.allowed, Status.DIVERGED)
            status = status.masked_fill(~news.error.isfinite(), Status.NONFINITE)
        is_new = news.improved
        if verdict.met is not None:
            status = status.masked_fill(verdict.met, Status.CONVERGED)
            is_new = is_new | verdict.met
        samples.status = torch.where(ended, status, samples.status)
        samples.num_steps = samples.num_steps.masked_fill(ended, self._step)
        if secant is not None:
            # Of a sample that stops, its last step is asked as well.
            samples.contracts = samples.contracts & (secant.contracts | ~ended)
            is_image = torch.where(is_new, samples.contracts, samples.is_image)
            samples.error_ratio = torch.where(ended, secant.error_ratio(is_image), samples.error_ratio)
        rows = ended if samples.absolute.dim() == 1 else ended.unsqueeze(1)
        samples.absolute = samples.absolute.masked_fill(rows, -math.inf)

    def _take_value(self, taken: Tensor | None) -> None:
        """Take in the values of the samples ``taken``, with gradients where they are recorded."""
        samples, newest = self._samples, self.latest.fz
        if self._num_contracting < len(samples.contracts):
            newest = torch.where(samples.contracts.unsqueeze(1), newest, self.latest.z)
        samples.value = newest if taken is None else torch.where(taken.unsqueeze(1), newest, samples.value)

    @property
    def value(self) -> Tensor:
        """(B, D) the best values so far."""
        return self._samples.value

    @property
    def done(self) -> Tensor:
        """(B,) bool, the samples that have stopped."""
        return ~self._samples.active

    def held(self) -> Tensor:
        """(B, D) what the map is to be called with for samples that have stopped: always finite, if z0 was."""
        samples = self._samples
        return torch.where(samples.error.isinf().unsqueeze(1), samples.start, samples.value).detach()

    def drop_done(self) -> Tensor:
        """Put stopped samples aside; from now on updates are of the others alone.

        Returns:
            (n,) the positions of the others, among the samples that were left before.
        """
        # As many as are known to have stopped, so that nothing waits for the device.
        order = self._samples.active.to(torch.int8).argsort(descending=True, stable=True)
        keep = order[: len(order) - self.num_done]
        self._aside = self._whole()
        self._rows = keep if self._rows is None else self._rows[keep]
        for name in ("_samples", "latest"):
            setattr(self, name, with_tensors(getattr(self, name), lambda tensor: tensor.index_select(0, keep)))
        self.num_done = 0
        return keep

    def outcome(self) -> Outcome:
        """Where the samples stand; one that is still active has not made it within the steps taken."""
        samples, whole = self._samples, self._whole()
        active = samples.active
        with torch.no_grad():
            far = torch.maximum(self._far * samples.limit, WILD * samples.error)
            status = samples.status.masked_fill(active, Status.MAX_STEPS)
            status = status.masked_fill(active & (samples.latest > far), Status.DIVERGED)
            change = self._measure.in_units(whole.error)
            estimate = whole.error_ratio * change
        return Outcome(
            value=whole.value,
            status=self._merged(whole.status, status),
            residual=whole.residual,
            change=change,
            error_estimate=estimate.masked_fill(change == 0, 0.0),
            num_steps=self._merged(whole.num_steps, samples.num_steps.masked_fill(active, self._step)),
            history=None if self._history is None else torch.stack(self._history),
        )

    def _whole(self) -> Samples:
        """What is known of all samples, those put aside too."""
        aside, samples = self._aside, self._samples
        if aside is None:
            return samples
        names = [field.name for field in dataclasses.fields(Samples)]
        return Samples(**{name: self._merged(getattr(aside, name), getattr(samples, name)) for name in names})

    def _merged(self, whole: Tensor, current: Tensor) -> Tensor:
        return current if self._rows is None else whole.index_copy(0, self._rows, current)
