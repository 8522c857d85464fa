"""What becomes of each sample of a solve: its best value, its status, and the step at which it stops."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from solvers import _rules
from solvers._fixed_steps import Outcome
from solvers._measure import Measure
from solvers._rules import FLOOR_PATIENCE
from solvers._samples import News, Samples, Tests, Verdict, count_true
from solvers._secant import Secant, some_entries
from solvers._solution import ACTIVE, Status
from solvers._stopping import Stopping
from solvers.methods.newton import NewtonState, confirming_step
from solvers.methods.root_map import RootMap
from solvers.methods.solver import State
from solvers.problem import FlatMap, relative, with_tensors
from solvers.problem.norms import FLOOR


class ToleranceTest:
    """Follows every sample: its best value and residual, its status, the step at which it stops.

    A sample that has stopped, well or badly, keeps its value; later updates do not touch it. An update is tensor code
    without branches up to one look at the host, which tells how many samples are left and what there is to do. The
    changes from step to step, which only convergence depends on, are followed where a residual is within its bound. How
    many of those samples have converged, the next look tells; where all that are left may have, this one must.

    Args:
        stopping: When a sample is done.
        measure: The norms and bounds for its state.
        eps: The relative rounding error of the map.
        remembers: Whether the solver remembers earlier steps, which can lead it astray.
        confirms: Whether Newton's step has to be within the bound too, for roots: the last step tells nothing of the
            error in other directions.
        keep_history: Keep the residuals of every tested step.

    Attributes:
        remembers, confirms: As they were given.
        num_done: How many of the samples that are left in the batch have stopped at least, on the host.
        may_have_ended: Whether some may have stopped in the last step.
        lost: (B,) bool, the samples to be taken back, whose last step led to infinity, NaN or far away; None for none.
        latest: The latest iterate and its image.
        moved: (B,) bool, samples for which f returned something else after they had stopped; None if that is not known.
    """

    # Set by the first update.
    latest: State
    _samples: Samples

    def __init__(
        self,
        stopping: Stopping,
        measure: Measure,
        eps: float,
        *,
        remembers: bool,
        confirms: bool,
        keep_history: bool,
    ) -> None:
        self._stopping = stopping
        self._measure = measure
        self._eps = eps
        self.remembers, self.confirms = remembers, confirms
        self._history: list[Tensor] | None = [] if keep_history else None
        self._step = 0
        # The last step at which the residual of every active sample fell: none of them can be stagnant soon after it.
        self._all_improved_at = 0
        # From where on to count, since a look has shown that no active sample had waited for half of the patience.
        self._none_waited_at = 0
        # Whether samples may converge in the next step; all that are left, or some as in this one.
        self._near = True
        # For how many samples the map has contracted in every step: for all, for some at most.
        self._all_contract = self._some_contract = True
        # What has happened to no sample so far need not be followed.
        self._some_grown = self._some_taken_back = self._some_lost = False
        # A sample at the floor has been within its bound, unless that is smaller.
        self._some_at_floor = not measure.least_rtol >= FLOOR * eps
        # In an update, what gives Newton's step, the iterate before the latest, and the entries of both for a secant.
        self._newton_step: Callable[[Tensor], Tensor] | None = None
        self._before: State | None = None
        self._entries_before: State | None = None
        self._entries: State | None = None
        self._num_is_exact = True
        self.num_done = 0
        self.may_have_ended = False
        self.lost: Tensor | None = None
        self.moved: Tensor | None = None
        # After drop_done: what is known of all samples of the batch, and which of them are left.
        self._aside: tuple[Samples, Tensor] | None = None

    def update(self, step: int, state: State, f: FlatMap, *, taken_back: bool = False) -> bool:
        """Take in the state after a step of the map ``f``; True when every sample has stopped.

        Nothing is taken in where samples are ``lost``, unless they were ``taken_back`` already.
        """
        first, self._step = self._step == 0, step
        if not first and not taken_back:
            self._before, self._entries_before = self.latest, self._entries
        # Without what else the solver remembers.
        self.latest, self._entries, self.lost = State(state.z, state.fz), None, None
        self._image_is_nearer = state.image_is_nearer is True
        self._takes_newton_steps = isinstance(state, NewtonState)
        if self.confirms:
            assert isinstance(f, RootMap)
            self._newton_step = functools.partial(confirming_step, f, state)
        with torch.no_grad():
            errors, scales = self._measure.parts(state.displacement), self._measure.parts(state.fz)
            if first:
                max_growth = self._stopping.max_growth
                self._samples = Samples.at_start(state, self._measure, scales, errors, max_growth, f.unit)
                self._all_contract = self._some_contract = state.image_is_nearer is not False
            waited = step - max(self._all_improved_at, self._none_waited_at) >= self._patience
            near = self._near or waited or step == self._stopping.max_steps or self._stopping.check_every > 1
            # Whether the map contracts is asked at steps that do not depend on the batch.
            asked = not first and self._some_contract and (step <= 3 or step % 4 == 0)
            secant = self._secant() if asked or (near and not first) else None
            news = self._news(errors, scales, secant)
            # Growth for the first time is expected only where the residual has not fallen for long.
            careful = self._some_grown or waited
            verdict = self._verdict(news, secant if near else None, waited=waited, asked=asked, careful=careful)
            grown = self._some_grown or verdict.count.ungrown < news.error.shape[0]
            if verdict.count.within and not first and not (near and (careful or not grown)):
                secant = secant or self._secant()
                if verdict.count.within < verdict.count.allowed:
                    verdict.met = self._met(news, secant, grown)
                    verdict.active, verdict.is_exact = verdict.met < news.of_samples.allowed, False
                    verdict.num_active = verdict.count.allowed
                else:  # all may have converged: only a second look tells
                    verdict = self._verdict(news, secant, waited=waited, asked=asked, careful=True)
            if verdict.num_active < verdict.num_before and not first:
                self.lost = None if taken_back else self._lost(news, verdict)
                if self.lost is not None:
                    return False
                secant = secant or self._secant()  # for the estimate of the error
            taken = self._take_in(news, verdict, secant)
            ended = self.num_done == news.error.shape[0]
            if f.held_calls and (ended or step == self._stopping.max_steps):
                was_active, image = f.held_calls[-1]
                self.judge_again(f, ~was_active.squeeze(1), image, f.moved())
        self._before = self._entries_before = self._newton_step = None  # what follows, and the next step, need the room
        self._take_value(taken)
        return ended

    def judge_again(self, f: FlatMap, held: Tensor, image: Tensor, moved: Tensor | None = None) -> None:
        """Judge the samples ``held`` (B,) since they stopped by what f returns for them by now, ``image`` (B, D).

        Some of them may have ``moved`` (B,): f has returned something else since.
        """
        samples, self.moved = self._samples, moved
        lost, error, scale = _rules.unsettled(samples, self._measure, held, image, moved, f.unit)
        samples.status = samples.status.masked_fill(lost, Status.UNSETTLED)
        samples.error, samples.scale = torch.where(lost, error, samples.error), torch.where(lost, scale, samples.scale)

    @property
    def _patience(self) -> int:
        """The least number of steps without a smaller residual after which a sample may end."""
        patience = self._stopping.patience
        return min(patience, FLOOR_PATIENCE) if self._some_at_floor else patience

    def _news(self, errors: Tensor, scales: Tensor, secant: Secant | None) -> News:
        changes = None if secant is None else (secant.most, secant.df)
        news = self._samples.news(self._measure, errors, scales, self._eps, changes)
        self._slack = self._measure.slack(errors, news.bound)
        if self._step == 1:
            within = _rules.within_at_start(news, self.latest, self._measure)
            news.of_samples = news.of_samples._replace(within=within)
        return news

    def _secant(self) -> Secant:
        assert self._before is not None
        self._entries = some_entries(self.latest)
        before = self._entries_before or some_entries(self._before)
        complete = self._entries is self.latest
        return Secant.between(before, self._entries, complete=complete, contracts=self._image_is_nearer)

    def _verdict(self, news: News, secant: Secant | None, *, waited: bool, asked: bool, careful: bool) -> Verdict:
        """What becomes of the samples, by one look; none is idle unless one can have ``waited`` long enough.

        After the first step, none converges without ``secant``. Unless ``careful``, samples that have grown tenfold in
        this step are judged as if they had not.
        """
        samples, first = self._samples, self._step == 1
        if secant is None and not first and self._num_is_exact and (not asked or self._all_contract):
            # The look at the host. Samples that have stopped fail the tests that matter.
            count = news.count()
            num_before = samples.active.shape[0] - self.num_done
            active = samples.active if count.allowed == num_before else news.of_samples.allowed
            contracts = news.of_samples.contracts if asked else None
            return Verdict(None, None, active, contracts, count, num_before, count.allowed, True, count.contracts or 0)
        tests, met, idle, contracts = news.of_samples, None, None, samples.contracts
        if asked and tests.contracts is not None:
            contracts = tests.contracts if self._all_contract else contracts & tests.contracts
        if first or secant is not None:
            met = self._met(news, secant, careful)
        if waited and secant is not None:
            waiting, idle = self._idle(news, secant)
            fixed = _rules.fixed_where_norms_vanish(samples, news, self.latest, idle)
            met = fixed if met is None else met | fixed
        # Of truth values, "less than" says "but not".
        active = tests.allowed if met is None else met < tests.allowed
        if idle is not None:
            active = active & (idle == ACTIVE)
        flags = [*(test for test in tests if test is not None), active, samples.active, contracts]
        if idle is not None:
            flags.insert(0, active & waiting)
        # The look at the host.
        *counts, num_active, num_before, num_contracting = count_true(torch.stack(flags))
        if idle is not None and not counts.pop(0):
            self._none_waited_at = self._step - self._patience // 2 + 1
        return Verdict(met, idle, active, contracts, Tests(*counts), num_before, num_active, True, num_contracting)

    def _met(self, news: News, secant: Secant | None, grown: bool) -> Tensor:
        """(B,) bool: the samples that have converged."""
        tests, confirmed = news.of_samples, self.confirms and not self._takes_newton_steps
        sure = tests.allowed if secant is None else self._is_sure(news, secant, grown, confirmed=confirmed)
        met = tests.within & sure
        if self._newton_step is None or not bool(met.any()):
            return met
        # The other samples are of no interest, wherever they are.
        step = self._newton_step(torch.where(met.unsqueeze(1), self.latest.z, self._samples.start))
        bound, error = self._measure.compared(news.bound, self._measure.parts(step))
        return met & (bound >= error)

    def _is_sure(self, news: News, secant: Secant, grown: bool = True, *, confirmed: bool = False) -> Tensor:
        """(B,) bool: whether at least one digit of the value is right, as far as the iterates tell."""
        fixed = None if self._entries is self.latest else _rules.is_fixed(self.latest)
        return _rules.is_sure(self._samples, news, secant, self._slack, fixed=fixed, grown=grown, confirmed=confirmed)

    def _idle(self, news: News, secant: Secant) -> tuple[Tensor, Tensor]:
        """Which samples have waited for half of the least patience or longer (B,), and what they may expect.

        The latter is (B,) int64: STAGNATED or PRECISION_FLOOR where no smaller residual is to be expected, else ACTIVE.
        """
        waited = (self._step - self._best_step).masked_fill(news.improved, 0)
        sure = self._is_sure(news, secant)
        idle = _rules.idle(self._samples, news, sure, waited, patience=self._stopping.patience, eps=self._eps)
        return waited >= self._patience // 2, idle

    def _lost(self, news: News, verdict: Verdict) -> Tensor | None:
        """(B,) bool: the samples that a step has led to infinity or NaN, or what the solver remembers far away."""
        samples = self._samples
        if verdict.count.allowed == verdict.num_before:
            return None
        lost = _rules.lost(samples, news, self._step - self._best_step, remembers=self.remembers)
        if not bool(lost.any()):
            return None
        self._some_taken_back = True
        samples.taken_back = samples.taken_back + lost
        return lost

    def _take_in(self, news: News, verdict: Verdict, secant: Secant | None) -> Tensor | None:
        """Remember a step; returns the samples with a new best iterate (B,), or None for all."""
        samples, count, met = self._samples, verdict.count, verdict.met
        size, left = news.error.shape[0], verdict.num_active
        missed = count.missed > 0 or count.allowed < verdict.num_before
        ended = None if left == verdict.num_before and verdict.is_exact else verdict.active < samples.active
        self.may_have_ended = ended is not None or left < size - self.num_done
        if self._history is not None:
            residual = relative(news.error, news.scale)
            if verdict.num_before < size:
                residual = torch.where(samples.active, residual, samples.residual)
            whole = self._aside and self._aside[0].residual.index_copy(0, self._aside[1], residual)
            self._history.append(residual if whole is None else whole)
        taken = samples.active if verdict.num_before < size else None
        if missed:
            taken = news.improved if met is None else news.improved | met
        self._take_contracts(news, verdict, secant, ended, taken)
        if count.ungrown < size or count.unshrunk < size:
            self._some_grown = self._some_grown or count.ungrown < size
            samples.follow_growth(news)
        if taken is None:
            samples.error, samples.scale, samples.least = news.error, news.scale, news.rounded
        else:
            for name, value in (("error", news.error), ("scale", news.scale), ("least", news.rounded)):
                setattr(samples, name, torch.where(taken, value, getattr(samples, name)))
        if taken is None or not missed:
            self._all_improved_at = self._step
        else:
            samples.best_step = samples.best_step.masked_fill(taken, self._step)
        if self._some_taken_back:
            samples.taken_back = samples.taken_back.masked_fill(samples.active if taken is None else taken, 0)
        stopping = samples.active if self._step == self._stopping.max_steps else ended
        if secant is not None and stopping is not None:
            samples.error_ratio = torch.where(stopping, secant.error_ratio(samples.is_image), samples.error_ratio)
        if ended is not None:
            status: Tensor | Status = Status.CONVERGED
            if verdict.idle is not None or count.allowed < verdict.num_before:
                status, self._some_lost = _rules.status_at_end(news, verdict.met, verdict.idle), True
            samples.status = torch.where(ended, status, samples.status)
            samples.stop(ended, self._step)  # so that they fail all further tests
        samples.latest, samples.latest_scale = news.error, news.scale
        # All that are left may converge in the next step only if all are close.
        self._near = count.close >= count.allowed or count.within > 0
        self._some_at_floor = self._some_at_floor or count.within > 0 or (self._step == 1 and count.close > 0)
        samples.active, self.num_done, self._num_is_exact = verdict.active, size - left, verdict.is_exact
        return taken

    def _take_contracts(
        self, news: News, verdict: Verdict, secant: Secant | None, ended: Tensor | None, taken: Tensor | None
    ) -> None:
        """Remember whether the map contracts, and so whether the values of the samples ``taken`` are images."""
        samples, size = self._samples, news.error.shape[0]
        if verdict.contracts is not None:
            samples.contracts, number = verdict.contracts, verdict.num_contracting
            self._all_contract, self._some_contract = number == size, number > 0
        in_step = self._all_contract and verdict.count.contracts == size
        if self._step == 1 and verdict.count.within and not self._image_is_nearer:
            assert verdict.met is not None
            samples.contracts = verdict.met < samples.contracts
            self._all_contract = False
        if ended is not None and secant is not None and self._some_contract and not in_step:
            # Of a sample that stops, its last step is asked as well.
            samples.contracts = samples.contracts > (ended > (secant.most >= secant.df))
            self._all_contract = False
        if not self._all_contract:
            contracts = samples.contracts
            samples.is_image = contracts if taken is None else torch.where(taken, contracts, samples.is_image)

    def _take_value(self, taken: Tensor | None) -> None:
        """Take in the values of the samples ``taken``, with gradients where they are recorded."""
        samples, z, newest = self._samples, self.latest.z, self.latest.fz
        if not (self._some_contract or self._all_contract):  # of no samples, all do
            newest = z
        elif not self._all_contract:
            if self._step == 1:  # a start that is solved already has the derivative of its image
                z = z.detach() + (newest - newest.detach())
            newest = torch.where(samples.contracts.unsqueeze(1), newest, z)
        samples.value = newest if taken is None else torch.where(taken.unsqueeze(1), newest, samples.value)

    def take_over(self, samples: Samples, state: State, step: int, *, some_active: bool) -> None:
        """Stand where another test of the same kind has ended, and where some samples may be active."""
        self._samples, self._step, self.latest = samples, step, State(state.z, state.fz)
        self.num_done = 0 if some_active else len(samples.active)

    @property
    def _best_step(self) -> Tensor:
        """(B,) int64: the step with the smallest residual before this one."""
        return self._samples.best_step.clamp_min(self._all_improved_at)

    @property
    def value(self) -> Tensor:
        """(B, D) the best values so far."""
        return self._samples.value

    @property
    def active(self) -> Tensor:
        """(B,) bool, the samples that have not stopped."""
        return self._samples.active

    def held(self) -> Tensor:
        """(B, D) what the map is to be called with for samples that have stopped: always finite, if z0 was."""
        return (_rules.held(self._samples) if self._some_lost else self._samples.value).detach()

    def drop_done(self) -> Tensor:
        """Put stopped samples aside; from now on updates are of the others alone.

        Returns:
            (n,) the positions of the others, among the samples that were left before.
        """
        # As many as are known to have stopped, so that nothing waits for the device.
        order = self._samples.active.to(torch.int8).argsort(descending=True, stable=True)
        keep = order[: len(order) - self.num_done]
        self._aside = self._whole(self._samples), keep if self._aside is None else self._aside[1][keep]
        for name in ("_samples", "latest"):
            setattr(self, name, with_tensors(getattr(self, name), lambda tensor: tensor.index_select(0, keep)))
        self.num_done, self._entries = 0, None
        return keep

    def outcome(self) -> Outcome:
        """Where the samples stand; one that is still active has not made it within the steps taken."""
        samples = self._samples
        # torch.export splits a graph where the mode changes, and does not find the loops in the parts.
        with contextlib.nullcontext() if torch.compiler.is_exporting() else torch.no_grad():
            if self.num_done < samples.active.shape[0]:  # len() would fix the size of the batch in a graph
                status = _rules.status_out_of_steps(samples, self._stopping.max_growth)
                num_steps = samples.num_steps.masked_fill(samples.active, self._step)
                samples = dataclasses.replace(samples, status=status, num_steps=num_steps)
        whole = self._whole(samples)
        change = self._measure.in_units(whole.error)
        estimate = whole.error_ratio * change
        return Outcome(
            value=whole.value,
            is_image=whole.is_image,
            status=whole.status.to(torch.int8),
            residual=whole.residual,
            change=change,
            error_estimate=estimate.masked_fill(change == 0, 0.0),
            num_steps=whole.num_steps,
            history=None if self._history is None else torch.stack(self._history),
        )

    def _whole(self, samples: Samples) -> Samples:
        """What is known of all samples, those put aside too."""
        return samples if self._aside is None else samples.within(*self._aside)
