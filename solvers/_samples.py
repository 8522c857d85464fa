"""What the stopping test knows of each sample, and what it learns in a step."""

import dataclasses
import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from solvers._measure import Measure
from solvers._solution import ACTIVE
from solvers.methods.solver import State, replaced
from solvers.problem import relative
from solvers.problem.norms import FLOOR, underflow

# A residual this many times its bound does not meet it in the next step, as a rule.
CLOSE = 100.0

# With so many samples, fewer passes over them matter more than fewer operations.
MANY = 8192


@dataclasses.dataclass
class Samples:
    """What is known of each sample. All norms are those of the stopping test, without its unit.

    Attributes:
        value: (B, D) of the iterate z with the smallest residual: f(z) where the steps show it to be nearer, else z.
        contracts: (B,) bool, whether every step that was asked has brought images closer together than iterates; False
            where the start has converged, so that no step can tell.
        is_image: (B,) bool, whether the value is f(z).
        status: (B,) int64, ACTIVE until the sample stops.
        active: (B,) bool.
        num_steps: (B,) int64, the step at which it stopped.
        error: (B,) ``norm(f(z) - z)`` at that iterate.
        scale: (B,) ``norm(f(z))`` there.
        least: (B,) the error there with what rounding in f may hide: the smallest so far; infinite once a sample has
            stopped.
        best_step: (B,) int64, the step of that iterate.
        error_ratio: (B,) error over residual along the last step before the sample stopped.
        latest: (B,) ``norm(f(z) - z)`` of the latest iterate.
        latest_scale: (B,) ``norm(f(z))`` there.
        reference: (B,) ``norm(f(z) - z)`` before the value last grew tenfold, or the smallest until then; infinite if
            the value has not grown.
        smallest: (B,) the smallest ``norm(f(z))`` since it last grew tenfold.
        next_growth: (B,) ten times that: where it has grown tenfold again.
        taken_back: (B,) int64, how often in a row the sample was taken back to its best value.
        start: (B, D) the iterate of the first step.
        start_size: (B,) the larger one of ``norm(z)`` and ``norm(f(z))`` there.
        absolute: (B,), or (B, parts), the absolute tolerance; minus infinity once a sample has stopped.
        limit: (B,) the residual from which the sample counts as diverged; -1 once it has stopped.
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
    latest_scale: Tensor
    reference: Tensor
    smallest: Tensor
    next_growth: Tensor
    taken_back: Tensor
    start: Tensor
    start_size: Tensor
    absolute: Tensor
    limit: Tensor

    @classmethod
    def at_start(
        cls,
        state: State,
        measure: Measure,
        scales: Tensor,
        errors: Tensor,
        max_growth: float,
        unit: Tensor | None,
    ) -> "Samples":
        """What is known before the first step is taken in, given the norms of its parts, and the unit of a root."""
        starts = measure.sizes_at_start(state.z, scales)
        error, scale, size = (measure.whole(parts) for parts in (errors, scales, starts))  # (B,)
        zero, true = torch.zeros_like(error, dtype=torch.int64), torch.ones_like(error, dtype=torch.bool)
        infinite = torch.full_like(error, math.inf)
        may_contract, finite = state.image_is_nearer is not False, (error < math.inf).unsqueeze(1)
        contracts = true if may_contract else torch.zeros_like(true)
        return cls(
            value=state.fz if may_contract else torch.where(finite, state.z, state.fz),
            contracts=contracts,
            is_image=contracts,
            status=torch.full_like(zero, ACTIVE),
            active=true,
            num_steps=zero,
            error=infinite,
            scale=torch.ones_like(scale),
            least=infinite,
            best_step=zero,
            error_ratio=torch.full_like(error, math.nan),
            latest=error,
            latest_scale=scale,
            reference=infinite,
            smallest=size,
            next_growth=10 * size,
            taken_back=zero,
            start=state.z,
            start_size=size,
            absolute=measure.absolute(starts, unit),
            limit=torch.where(error < math.inf, max_growth * (error + scale), -1.0),
        )

    @property
    def residual(self) -> Tensor:
        """(B,) the relative residual at the best iterate."""
        return relative(self.error, self.scale)

    def replaced(self, rows: Tensor, new: "Samples") -> "Samples":
        """These samples, with the ``rows`` (B,) or () of others."""
        mixed = {}
        for field in dataclasses.fields(self):
            old, other = getattr(self, field.name), getattr(new, field.name)
            mixed[field.name] = old if other is old else replaced(old, rows, other)
        return Samples(**mixed)

    def within(self, whole: "Samples", rows: Tensor) -> "Samples":
        """``whole`` with these samples at the positions ``rows`` (n,)."""
        names = [field.name for field in dataclasses.fields(self)]
        return Samples(**{name: getattr(whole, name).index_copy(0, rows, getattr(self, name)) for name in names})

    def news(
        self, measure: Measure, errors: Tensor, scales: Tensor, eps: float, changes: tuple[Tensor, Tensor] | None
    ) -> "News":
        """What the norms of f(z) - z and f(z) say, by one comparison.

        Args:
            measure: The norms.
            errors: Those of the parts of f(z) - z.
            scales: Those of the parts of f(z).
            eps: The relative rounding error of the map.
            changes: The step has contracted where the first of these (B,) is at least the second; None if that is not
                asked.
        """
        error, scale, bound = measure.whole(errors), measure.whole(scales), measure.bound(scales, self.absolute)
        rounded = torch.add(error, scale, alpha=eps / 2)
        pairs = [  # in the order of Tests
            (rounded, self.least),
            (self.next_growth, scale),
            (scale, self.smallest),
            (self.limit, error),
            measure.compared(CLOSE * bound, errors),
            measure.compared(bound, errors),
        ]
        if changes is not None:
            pairs.append(changes)
        if torch.compiler.is_compiling():  # which fuses the comparisons with what asks for them, if nothing stacks them
            tests = Tests(*(one >= other for one, other in pairs))
            return News(errors, bound, error, scale, rounded, None, tests)
        if error.shape[0] < MANY:
            larger, smaller = zip(*pairs, strict=True)
            return News(errors, bound, error, scale, rounded, torch.stack(larger) >= torch.stack(smaller))
        return News(errors, bound, error, scale, rounded, torch.stack([one >= other for one, other in pairs]))

    def has_fallen(self, news: "News") -> Tensor:
        """(B,) bool: whether the residual has fallen tenfold since the value grew so, with room for rounding in f."""
        tenfold = torch.add(10 * underflow(news.rounded), news.rounded, alpha=10)
        fallen = torch.add(tenfold, news.scale, alpha=10 * FLOOR * torch.finfo(tenfold.dtype).eps)
        return fallen <= torch.where(news.of_samples.ungrown, self.reference, self._before_growth())

    def _before_growth(self) -> Tensor:
        """(B,) the residual before a step in which the value grows tenfold.

        The smallest one, where the latest is larger than the value itself: that tells of an iterate far from its image.
        """
        smallest = torch.minimum(self.latest, self.least)
        return torch.where(self.latest <= self.latest_scale, self.latest, smallest)

    def follow_growth(self, news: "News") -> None:
        """Remember where the value has grown tenfold, or is smaller than before, before the step is taken in."""
        grown = news.of_samples.ungrown < news.of_samples.allowed
        self.reference = torch.where(grown, self._before_growth(), self.reference)
        self.smallest = torch.where(grown, news.scale, torch.minimum(self.smallest, news.scale))
        self.next_growth = 10 * self.smallest

    def stop(self, ended: Tensor, step: int | Tensor) -> None:
        """Let the samples ``ended`` (B,) fail all further tests."""
        self.num_steps = self.num_steps.masked_fill(ended, step)
        self.absolute = self.absolute.masked_fill(ended.view(-1, *[1] * (self.absolute.dim() - 1)), -math.inf)
        self.limit, self.least = self.limit.masked_fill(ended, -1.0), self.least.masked_fill(ended, math.inf)


T = TypeVar("T")


class Tests(NamedTuple, Generic[T]):
    """Comparisons of a step: what they say of each sample, (B,) bool, or of how many samples it is true, on the host.

    Of NaN all are False. Of a sample that has stopped, ``missed``, ``allowed``, ``close`` and ``within`` are False.

    Attributes:
        missed: Whether the error, with what rounding in f may hide, is not smaller than ever.
        ungrown: Whether the value is less than tenfold what it was when it last grew so, or was smallest.
        unshrunk: Whether it is at least as large as then.
        allowed: Whether the error is below the limit for divergence.
        close: Whether it may be within its bound in the next step.
        within: Whether it is within the bound of the residual test.
        contracts: Whether the step has brought images closer together than iterates; None where that is not known.
    """

    missed: T
    ungrown: T
    unshrunk: T
    allowed: T
    close: T
    within: T
    contracts: T | None = None


def count_true(flags: Tensor) -> list[int]:
    """How many entries of each row of (K, B) bool are true, by one look at the host."""
    if flags.shape[1] < MANY:
        return flags.sum(dim=1).tolist()
    return torch.stack([torch.count_nonzero(row) for row in flags]).tolist()


@dataclasses.dataclass(slots=True)
class News:
    """The residuals of a step, and what they say of each sample.

    Attributes:
        errors: (B,), or (B, parts), the norms of the parts of f(z) - z.
        bound: Their bounds, likewise.
        error: (B,) ``norm(f(z) - z)``.
        scale: (B,) ``norm(f(z))``.
        rounded: (B,) the error with what rounding in f may hide.
        tests: (6 or 7, B) bool, the rows of ``Tests``; None in a graph.
    """

    errors: Tensor
    bound: Tensor
    error: Tensor
    scale: Tensor
    rounded: Tensor
    tests: Tensor | None
    _of_samples: Tests[Tensor] | None = None

    @property
    def of_samples(self) -> Tests[Tensor]:
        """The tests by name."""
        if self._of_samples is None:
            assert self.tests is not None
            self._of_samples = Tests(*self.tests.unbind())
        return self._of_samples

    @of_samples.setter
    def of_samples(self, tests: Tests[Tensor]) -> None:
        self._of_samples = tests

    def count(self) -> Tests[int]:
        """Of how many samples the tests are true, by one look at the host."""
        assert self.tests is not None
        return Tests(*count_true(self.tests))

    @property
    def improved(self) -> Tensor:
        """(B,) bool: the samples that have not stopped whose error is smaller than ever."""
        return self.of_samples.missed < self.of_samples.allowed  # of truth values: but not, and


@dataclasses.dataclass(slots=True)
class Verdict:
    """What becomes of the samples in a step.

    Attributes:
        met: (B,) bool, the samples that have converged; None if none has.
        idle: (B,) int64, STAGNATED or PRECISION_FLOOR where no smaller residual is expected, else ACTIVE; None if no
            sample can have waited long enough.
        active: (B,) bool, the samples that go on.
        contracts: (B,) bool, whether every step that was asked has contracted; None if that is as before.
        count: Of how many samples the tests of this step are true.
        num_before: How many samples were active before the step.
        num_active: How many go on, at most.
        is_exact: Whether it is so many.
        num_contracting: How many ``contracts`` are true.
    """

    met: Tensor | None
    idle: Tensor | None
    active: Tensor
    contracts: Tensor | None
    count: Tests[int]
    num_before: int
    num_active: int
    is_exact: bool = True
    num_contracting: int = 0
