"""The rules by which samples converge, fail and go on: functions of what is known of them, without branches.

:class:`solvers._progress.ToleranceTest` applies those that a step calls for, as far as the host knows; a compiled solve
(:mod:`solvers._branch_free`) applies all of them in every step. No rule looks at the host.
"""

import math

import torch
from torch import Tensor

from solvers._measure import Measure
from solvers._samples import News, Samples
from solvers._secant import Secant
from solvers._solution import ACTIVE, Status
from solvers.methods.solver import State
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
# The part of its bound below which the residual of a single iterate counts as convergence.
TINY = 1e-2


def is_fixed(state: State) -> Tensor:
    """(B,) bool: whether f(z) is z, bit for bit."""
    return (state.fz == state.z).all(dim=1)


def within_at_start(news: News, state: State, measure: Measure) -> Tensor:
    """(B,) bool: whether the first iterate has converged. No step shows its error, so that the residual has to."""
    bound, error = measure.compared(TINY * news.bound, news.errors)
    # Norms whose squares have vanished or overflowed tell nothing.
    tiny = (bound >= error) & (news.scale > underflow(error)) & (news.rounded < math.inf)
    return tiny | (news.of_samples.within & is_fixed(state))


def is_sure(
    samples: Samples,
    news: News,
    secant: Secant,
    slack: Tensor | None,
    *,
    fixed: Tensor | None,
    grown: bool = True,
    confirmed: bool = False,
) -> Tensor:
    """(B,) bool: whether at least one digit of the value is right, as far as the iterates tell.

    As the last step shows, unless Newton's step has confirmed more; and if the value has grown tenfold, the residual
    must have fallen tenfold since: one that is small only beside a value that ran away has not.

    Args:
        samples: What is known of each sample.
        news: The residuals of the step.
        secant: The changes in the step.
        slack: As :meth:`Measure.slack` gives it.
        fixed: (B,) bool, whether f(z) is z, where the secant takes some entries: those may have been solved long ago,
            while others still changed. None where it takes all.
        grown: Whether a value may have grown tenfold so far.
        confirmed: Whether Newton's step has to confirm the samples as well.
    """
    near = samples.active
    if not confirmed:
        near = secant.shows_a_digit(news.rounded, news.scale, samples.start_size, slack)
        if fixed is not None:
            near = near | (secant.dg == 0) & fixed
    return near & samples.has_fallen(news) if grown else near


def idle(samples: Samples, news: News, sure: Tensor, waited: Tensor, *, patience: int | Tensor, eps: float) -> Tensor:
    """(B,) int64: STAGNATED or PRECISION_FLOOR where no smaller residual is to be expected, else ACTIVE.

    Args:
        samples: What is known of each sample.
        news: The residuals of the step.
        sure: What :func:`is_sure` says.
        waited: (B,) int64, for how many steps the residual has reached no new minimum; 0 where it has in this one.
        patience: As in :class:`solvers.Stopping`.
        eps: The relative rounding error of the map.
    """
    stagnant = (waited >= patience) & (news.error <= WILD * samples.error)
    at_floor = (waited >= FLOOR_PATIENCE) & (samples.residual <= FLOOR * eps) & sure
    status = torch.full_like(samples.status, ACTIVE)
    return status.masked_fill(stagnant, Status.STAGNATED).masked_fill(at_floor, Status.PRECISION_FLOOR)


def fixed_where_norms_vanish(samples: Samples, news: News, state: State, idle: Tensor) -> Tensor:
    """(B,) bool: idle samples that are fixed. Norms whose squares have vanished tell nothing, entries do."""
    return (idle != ACTIVE) & (news.scale <= underflow(news.scale)) & is_fixed(state) & samples.active


def lost(samples: Samples, news: News, waited: Tensor, *, remembers: bool) -> Tensor:
    """(B,) bool: the samples that a step has led to infinity or NaN, or what the solver remembers far away.

    Args:
        samples: What is known of each sample.
        news: The residuals of the step.
        waited: (B,) int64, steps since that with the smallest residual.
        remembers: Whether the solver remembers earlier steps, which can lead it astray.
    """
    astray = ~(news.error < math.inf)
    if remembers:
        astray = astray | ((waited <= SUDDEN) & (news.error > WILD * samples.latest))
    return (news.of_samples.allowed < samples.active) & astray & (samples.taken_back < MOST_TAKEN_BACK)


def status_at_end(news: News, met: Tensor | None, idle: Tensor | None) -> Tensor:
    """(B,) int64: the status of a sample if it ends in this step.

    Args:
        news: The residuals of the step.
        met: (B,) bool, the samples that have converged; None if none has.
        idle: What :func:`idle` says; None if no sample can have waited long enough.
    """
    status = torch.full_like(news.error, ACTIVE, dtype=torch.int64) if idle is None else idle
    # The later line wins.
    status = status.masked_fill(~news.of_samples.allowed, Status.DIVERGED)
    status = status.masked_fill(~(news.error < math.inf), Status.NONFINITE)
    return status if met is None else status.masked_fill(met, Status.CONVERGED)


def unsettled(
    samples: Samples, measure: Measure, held: Tensor, image: Tensor, moved: Tensor | None, unit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples had converged and are off again, because the map mixes samples or changes from call to call.

    Twice its bound is off where it has ``moved``. Where that is not known, so it is for a value z, whose residual was
    tested, and ten times for a value f(z). Of a root nothing is known then, as steps of Newton's method are tested.

    Args:
        samples: What is known of each sample.
        measure: The norms and bounds.
        held: (B,) bool, those for which the map is called with their values.
        image: (B, D) what it returns for these.
        moved: (B,) bool, those for which it returned something else before; None if that is not known.
        unit: As in :meth:`Measure.absolute`.

    Returns:
        (B,) bool, which samples; (B,) the norms of ``image`` less the value, and of ``image``.
    """
    start = samples.start_size if measure.is_of_whole else measure.parts(samples.start)
    scales, errors = measure.parts(image), measure.parts(image - samples.value)
    bounds = measure.bound(scales, measure.absolute(start, unit))
    (twice, error), (tenfold, far) = measure.compared(2 * bounds, errors), measure.compared(10 * bounds, errors)
    off = (samples.status == Status.CONVERGED) & held & (twice < error)
    known = torch.zeros_like(off) if moved is None else moved
    if not measure.of_root:
        known = known | (tenfold < far) | ~samples.is_image
    return off & known, measure.whole(errors), measure.whole(scales)


def status_out_of_steps(samples: Samples, max_growth: float) -> Tensor:
    """(B,) int64: the status of each sample, MAX_STEPS or DIVERGED where it is still active."""
    far = torch.maximum(min(1.0, FAR / max_growth) * samples.limit, WILD * samples.error)
    status = samples.status.masked_fill(samples.active, Status.MAX_STEPS)
    return status.masked_fill(samples.active & (samples.latest > far), Status.DIVERGED)


def held(samples: Samples) -> Tensor:
    """(B, D) what the map is to be called with for samples that have stopped: always finite, if z0 was."""
    return torch.where(samples.error.isinf().unsqueeze(1), samples.start, samples.value)
