"""What the stopping test knows of each sample, and what it learns in a step."""

import dataclasses

from torch import Tensor

from solvers.problem import relative


@dataclasses.dataclass
class Samples:
    """What is known of each sample. All norms are those of the stopping test, without its unit.

    Attributes:
        value: (B, D) of the iterate z with the smallest residual: f(z) where the steps show it to be nearer, else z.
        contracts: (B,) bool, whether every step that was asked has brought images closer together than iterates.
        is_image: (B,) bool, whether the value is f(z).
        status: (B,) int8, ACTIVE until the sample stops.
        active: (B,) bool.
        num_steps: (B,) int64, the step at which it stopped.
        error: (B,) ``norm(f(z) - z)`` at that iterate.
        scale: (B,) ``norm(f(z))`` there.
        least: (B,) the error there with what rounding in f may hide: the smallest so far.
        best_step: (B,) int64, the step of that iterate.
        error_ratio: (B,) error over residual along the last step before the sample stopped.
        latest: (B,) ``norm(f(z) - z)`` of the latest iterate.
        reference: (B,) ``norm(f(z) - z)`` before the value last grew tenfold; infinite if it has not.
        next_growth: (B,) the ``norm(f(z))`` at which it has grown tenfold, since it last did or was smallest.
        taken_back: (B,) int64, how often in a row the sample was taken back to its best value.
        start: (B, D) the iterate of the first step.
        start_size: (B,) the larger one of ``norm(z)`` and ``norm(f(z))`` there.
        absolute: (B,), or (B, parts), the absolute tolerance; minus infinity once a sample has stopped.
        limit: (B,) the residual from which the sample counts as diverged.
    """

    value: Tensor
    contracts: Tensor
    is_image: Tensor
    status: Tensor
    active: Tensor
    num_steps: Tensor
    error: Tensor
    scale: Tensor
    least: Tensor
    best_step: Tensor
    error_ratio: Tensor
    latest: Tensor
    reference: Tensor
    next_growth: Tensor
    taken_back: Tensor
    start: Tensor
    start_size: Tensor
    absolute: Tensor
    limit: Tensor

    @property
    def residual(self) -> Tensor:
        """(B,) the relative residual at the best iterate."""
        return relative(self.error, self.scale)


@dataclasses.dataclass(slots=True)
class News:
    """The residuals of a step, and what they say of each sample; all (B,).

    Attributes:
        error: ``norm(f(z) - z)``.
        scale: ``norm(f(z))``.
        rounded: The error with what rounding in f may hide.
        improved: Whether that is smaller than ever.
        grown: Whether the value has grown tenfold since it last did, or was smallest.
        allowed: Whether the error is below the limit for divergence; False for NaN.
        within: Whether the error is within the bound of the residual test.
        close: Whether it may be so in the next step.
        slack: How many times the error fits into its bound; None if that does not matter.
    """

    error: Tensor
    scale: Tensor
    rounded: Tensor
    improved: Tensor
    grown: Tensor
    allowed: Tensor
    within: Tensor
    close: Tensor
    slack: Tensor | None = None


@dataclasses.dataclass(slots=True)
class Verdict:
    """What becomes of the samples in a step.

    Attributes:
        met: (B,) bool, the samples that have converged; None if none has.
        idle: (B,) int8, STAGNATED or PRECISION_FLOOR where no smaller residual is expected, else ACTIVE; None if no
            sample can have waited long enough.
        active: (B,) bool, the samples that go on.
        num_active: Their number, on the host, as are the numbers below.
        num_beyond: How many of the samples that were active have a residual beyond the limit, or NaN.
        num_missed: How many of them have not improved.
        num_grown: How many samples have grown tenfold.
        num_close: How many are close to their bound.
        num_within: How many are within it.
        num_contracting: For how many every step has brought images closer together than iterates.
    """

    met: Tensor | None
    idle: Tensor | None
    active: Tensor
    num_active: int
    num_beyond: int
    num_missed: int
    num_grown: int
    num_close: int
    num_within: int
    num_contracting: int
