"""The stopping test without branches: every rule in every step, and no look at the host.

What :class:`solvers._progress.ToleranceTest` finds out with as little work as it can, :func:`take_in` finds out in one
piece of tensor code, which can be compiled or exported. Both apply :mod:`solvers._rules` to the same
:class:`solvers._samples.Samples`, so that all samples end alike.
"""

import dataclasses

import torch
from torch import Tensor

from solvers import _rules
from solvers._measure import Measure
from solvers._samples import News, Samples
from solvers._secant import Secant, some_entries, stride_of
from solvers._solution import ACTIVE
from solvers._stopping import Stopping
from solvers.methods.solver import State, replaced


@dataclasses.dataclass
class Limits:
    """When samples end: a :class:`solvers.Stopping`, with its numbers as tensors, so that others need no other code.

    Attributes:
        measure: The norms and bounds, with tensors for tolerances.
        eps: The relative rounding error of the map.
        remembers: Whether the solver remembers earlier steps, which can lead it astray.
        patience: () int64.
        max_steps: () int64.
        check_every: At every so many steps a test is due.
        stride: The distance of the entries of a state that a secant takes.
    """

    measure: Measure
    eps: float
    remembers: bool
    patience: Tensor
    max_steps: Tensor
    check_every: int
    stride: int

    @classmethod
    def of(cls, stopping: Stopping, measure: Measure, like: Tensor, *, eps: float, remembers: bool) -> "Limits":
        """The limits of a solve whose states are like ``like`` (B, D)."""

        def number(value: int) -> Tensor:
            return torch.full((), value, dtype=torch.int64, device=like.device)

        # torch.compile looks through caches, and warns of it.
        stride = (stride_of.__wrapped__ if torch.compiler.is_compiling() else stride_of)(like.shape[1])
        return cls(
            measure=measure.with_tensors(like),
            eps=eps,
            remembers=remembers,
            patience=number(stopping.patience),
            max_steps=number(stopping.max_steps),
            check_every=stopping.check_every,
            stride=stride,
        )

    def entries_of(self, state: State) -> State:
        """The entries of an iterate that a secant takes."""
        return some_entries(State(state.z, state.fz), self.stride)

    def is_due(self, step: Tensor) -> Tensor | None:
        """() bool: whether a test is due; None for always."""
        return None if self.check_every == 1 else (step % self.check_every == 0) | (step >= self.max_steps)


def first(limits: Limits, state: State, max_growth: float, unit: Tensor | None) -> Samples:
    """What is known of each sample after the first step; ``unit`` as in :meth:`Measure.absolute`."""
    measure = limits.measure
    errors, scales = measure.parts(state.displacement), measure.parts(state.fz)
    samples = Samples.at_start(state, measure, scales, errors, max_growth, unit)
    news = samples.news(measure, errors, scales, limits.eps, None)
    within = _rules.within_at_start(news, state, measure)
    news.of_samples = news.of_samples._replace(within=within)
    allowed = news.of_samples.allowed
    met, idle = within & allowed, torch.full_like(samples.status, ACTIVE)
    contracts = samples.contracts if state.image_is_nearer else met < samples.contracts
    return _taken_in(samples, news, state, torch.ones_like(limits.max_steps), met, idle, met < allowed, contracts)


def take_in(
    limits: Limits, samples: Samples, before: State, state: State, step: Tensor, rows: Tensor | None = None
) -> tuple[Samples, Tensor]:
    """What is known of each sample after a step.

    Args:
        limits: When samples end.
        samples: What was known before.
        before: Entries of the last tested iterate, as :func:`some_entries` gives them.
        state: The solver's state after the step.
        step: () int64, the number of the step.
        rows: (B,) bool, the samples that were taken back in this step, which are taken in now; None for a new step.

    Returns:
        What is known, and (B,) bool, the samples that are lost: of these nothing is taken in yet, they have to be taken
        back first.
    """
    measure = limits.measure
    errors, scales = measure.parts(state.displacement), measure.parts(state.fz)
    entries, complete = limits.entries_of(state), limits.stride == 1
    secant = Secant.between(before, entries, complete=complete, contracts=state.image_is_nearer is True)
    news = samples.news(measure, errors, scales, limits.eps, (secant.most, secant.df))
    waited = step - samples.best_step
    slack, fixed = measure.slack(errors, news.bound), None if complete else _rules.is_fixed(state)
    sure = _rules.is_sure(samples, news, secant, slack, fixed=fixed)
    waited_now = waited.masked_fill(news.improved, 0)
    idle = _rules.idle(samples, news, sure, waited_now, patience=limits.patience, eps=limits.eps)
    tests = news.of_samples
    met = (tests.within & sure) | _rules.fixed_where_norms_vanish(samples, news, state, idle)
    active = (met < tests.allowed) & (idle == ACTIVE)
    ended = active < samples.active
    # Whether the map contracts is asked at steps that do not depend on the batch, and where a sample ends.
    assert tests.contracts is not None
    asked = (step <= 3) | (step % 4 == 0) | ended
    contracts = samples.contracts & (tests.contracts | ~asked)

    new = _taken_in(samples, news, state, step, met, idle, active, contracts)
    ratio = secant.error_ratio(new.is_image)
    new.error_ratio = torch.where(samples.active & (ended | (step >= limits.max_steps)), ratio, samples.error_ratio)
    if rows is not None:
        return samples.replaced(rows, new), torch.zeros_like(rows)
    lost = _rules.lost(samples, news, waited, remembers=limits.remembers)
    due = limits.is_due(step)
    if due is not None:
        lost = lost & due
    samples.taken_back = samples.taken_back + lost
    return samples.replaced(~lost if due is None else due & ~lost, new), lost


def _taken_in(
    samples: Samples,
    news: News,
    state: State,
    step: Tensor,
    met: Tensor,
    idle: Tensor,
    active: Tensor,
    contracts: Tensor,
) -> Samples:
    """The samples after a step, but for the estimate of the error.

    Args:
        samples: What was known before.
        news: The residuals of the step.
        state: The iterate and its image.
        step: () int64.
        met: (B,) bool, those that have converged.
        idle: (B,) int64, as :func:`_rules.idle` gives it.
        active: (B,) bool, those that go on.
        contracts: (B,) bool, whether the value is to be f(z).
    """
    ended, taken = active < samples.active, met | news.improved
    followed = dataclasses.replace(samples)
    followed.follow_growth(news)
    new = dataclasses.replace(
        followed,
        value=replaced(samples.value, taken, replaced(state.z, contracts, state.fz)),
        contracts=contracts,
        is_image=replaced(samples.is_image, taken, contracts),
        error=torch.where(taken, news.error, samples.error),
        scale=torch.where(taken, news.scale, samples.scale),
        least=torch.where(taken, news.rounded, samples.least),
        best_step=torch.where(taken, step, samples.best_step),
        taken_back=samples.taken_back.masked_fill(taken, 0),
        status=torch.where(ended, _rules.status_at_end(news, met, idle), samples.status),
    )
    new.stop(ended, step)
    new.latest, new.latest_scale, new.active = news.error, news.scale, active
    return new
