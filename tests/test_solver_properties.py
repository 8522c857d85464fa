"""What holds for every solver on random maps: right answers, true reports, independent samples."""

import dataclasses
import math
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import strategies as st
from solver_rows import SOLVERS
from torch import Tensor

from solvers import Newton, NewtonKrylov, Status, solve

solvers = st.sampled_from([*SOLVERS.values()])
# Well above the rounding errors, which a solver may amplify.
RTOL = {torch.float32: 1e-4, torch.float64: 1e-6}


@dataclasses.dataclass(frozen=True)
class Map:
    """``z -> rate * h(C z) + shift``, where C is a weighted mean of rotations of a sample's entries.

    h is the identity or tanh, so that the root mean square of f(x) - f(y) is at most ``rate`` times that of x - y. No
    operation but tanh depends on how the entries lie in memory.

    Attributes:
        rate: (*batch, 1) the Lipschitz constants.
        shift: (*batch, D).
    """

    h: Callable[[Tensor], Tensor]
    weights: tuple[float, float, float]
    rate: Tensor
    shift: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        a, b, c = self.weights
        return self.rate * self.h(a * z + b * z.roll(1, dims=-1) + c * z.roll(2, dims=-1)) + self.shift

    def with_fixed_point(self, point: Tensor) -> "Map":
        """The map with the same rates that has the fixed point ``point`` (*batch, D), but for rounding."""
        return dataclasses.replace(self, shift=point + self.shift - self(point))

    def __getitem__(self, rows: Tensor) -> "Map":
        return dataclasses.replace(self, rate=self.rate[rows], shift=self.shift[rows])

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.shift)


@st.composite
def maps(draw, max_rate, min_batch_dims=0, max_batch_dims=2, dtypes=(torch.float32, torch.float64)):
    batch = [draw(st.integers(1, 5)) for _ in range(draw(st.integers(min_batch_dims, max_batch_dims)))]
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shift = torch.randn(*batch, draw(st.integers(1, 20)), dtype=torch.float64, generator=generator)
    rate = max_rate * torch.rand(*batch, 1, dtype=torch.float64, generator=generator)
    weights = [draw(st.floats(-1, 1)) for _ in range(3)]
    total = max(sum(map(abs, weights)), 1.0)
    return Map(
        draw(st.sampled_from([torch.tanh, lambda z: z])),
        tuple(weight / total for weight in weights),
        rate.to(dtype),
        (shift * 10 ** draw(st.floats(-3, 3))).to(dtype),
    )


contractions = maps(max_rate=0.9)
batches = maps(max_rate=0.9, min_batch_dims=1, max_batch_dims=1, dtypes=(torch.float64,))


def rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1).sqrt()


@hypothesis.settings(max_examples=150)
@hypothesis.given(solvers, contractions)
def test_answer_is_a_fixed_point(solver, f):
    rtol = RTOL[f.shift.dtype]
    solution = solve(
        f, f.start, solver, rtol=rtol, atol=0, max_steps=500, batch_dims=f.shift.dim() - 1, on_failure="raise"
    )
    assert solution.status.shape == f.shift.shape[:-1]
    # The value is the image of the iterate that met the tolerance, and f brings both nearer to each other by its rate.
    # Newton's methods return the iterate.
    error = rms(f(solution.value) - solution.value)
    rounding = 8 * torch.finfo(f.shift.dtype).eps
    rate = torch.where(solution.is_image, f.rate.squeeze(-1), 1.0)
    assert solution.is_image.all() or isinstance(solver, Newton | NewtonKrylov)
    assert (error <= (rate * rtol + rounding) * rms(solution.value)).all()


@hypothesis.settings(max_examples=150)
@hypothesis.given(solvers, maps(max_rate=10.0), st.integers(1, 100), st.floats(-9, -1))
def test_statuses_are_true(solver, f, max_steps, digits):
    """Also where f expands: the last residual of a converged sample and that of its value meet the tolerance."""
    rtol = 10**digits
    solution = solve(
        f,
        f.start,
        solver,
        rtol=rtol,
        atol=0,
        max_steps=max_steps,
        batch_dims=f.shift.dim() - 1,
        history=True,
        on_failure="ignore",
    )
    assert len(solution.history) == solution.num_steps.max()
    margin = 1 + 1e-5  # the driver tests without the division
    image = f(solution.value)
    rounding = 8 * (1 + f.rate.abs().squeeze(-1)) * torch.finfo(f.shift.dtype).eps
    is_solved = rms(image - solution.value) <= (rtol * margin + rounding) * rms(image)
    for status, steps, residual, solved, history in zip(
        solution.status.flatten().tolist(),
        solution.num_steps.flatten().tolist(),
        solution.residual.flatten().tolist(),
        is_solved.flatten().tolist(),
        solution.history.reshape(len(solution.history), -1).T.tolist(),
        strict=True,
    ):
        last = history[steps - 1]
        assert history[steps:] == [residual] * (len(history) - steps)
        if Status(status) is Status.CONVERGED:
            assert last <= rtol * margin
            assert residual == last
            assert solved
        else:
            assert residual in history[:steps]
            assert (steps == max_steps) or Status(status) is not Status.MAX_STEPS
    assert all(leaf.isfinite().all() for leaf in (solution.value, solution.residual))


@hypothesis.settings(max_examples=150)
@hypothesis.given(solvers, maps(max_rate=1e6, dtypes=(torch.float64,)), st.floats(-15, -5), st.floats(-9, -3))
def test_values_meet_the_tolerance_from_starts_that_meet_it(solver, f, distance, digits):
    """The image of a start that is solved may be none: the value is then the start."""
    point, rtol = f.shift, 10**digits
    f = f.with_fixed_point(point)
    start = point * (1 + 10**distance)
    solution = solve(f, start, solver, rtol=rtol, atol=0, max_steps=50, batch_dims=point.dim() - 1, on_failure="ignore")
    error, size = (rms(x) for x in (f(solution.value) - solution.value, f(solution.value)))
    rounding = 64 * torch.finfo(point.dtype).eps * (1 + f.rate.squeeze(-1)) * size
    assert (error <= rtol * size * (1 + 1e-5) + rounding)[solution.converged].all()
    tiny = (rms(f(start) - start) + rounding <= 0.009 * rtol * rms(f(start))) & (rms(f(start)) > 1e-100)
    assert solution.converged[tiny].all()
    assert torch.equal(solution.value[tiny], start[tiny])


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    solvers,
    maps(max_rate=1.0, dtypes=(torch.float64,)),
    st.sampled_from([(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (-0.4, 0.0, 0.6)]),
    st.sampled_from([None, -1, -9, -13]),
    st.floats(-9, -1),
)
def test_error_bound_is_certain(solver, f, weights, distance, digits):
    """Of all samples, converged or not, from any start, at rates up to 0.999."""
    point = f.shift
    f = dataclasses.replace(f, weights=weights, rate=1 - 1e-3**f.rate).with_fixed_point(point)
    start = torch.zeros_like(point) if distance is None else point * (1 + 10**distance)
    solution = solve(
        f, start, solver, rtol=10**digits, atol=0, max_steps=200, batch_dims=point.dim() - 1, on_failure="ignore"
    )
    rate = f.rate.squeeze(-1)
    rounding = 64 * torch.finfo(point.dtype).eps * (rms(point) + rms(f.shift)) / (1 - rate)
    assert (rms(solution.value - point) <= solution.error_bound(rate) * (1 + 1e-9) + rounding).all()


@hypothesis.settings(max_examples=100)
@hypothesis.given(solvers, batches, st.data())
def test_samples_are_independent(solver, f, data):
    """Any samples, in any order and beside any others, end as in the batch: a permutation, a part, a sample alone."""
    options = {"rtol": RTOL[torch.float64], "atol": 0.0, "max_steps": 500, "on_failure": "raise"}
    solution = solve(f, f.start, solver, **options)
    indices = st.integers(0, len(f.shift) - 1)
    rows = torch.tensor(data.draw(st.permutations(range(len(f.shift))) | st.lists(indices, min_size=1, max_size=8)))
    chosen = solve(f[rows], f.start[rows], solver, **options)
    assert torch.equal(chosen.num_steps, solution.num_steps[rows])
    assert torch.allclose(chosen.value, solution.value[rows], rtol=1e-9, atol=1e-9 * float(f.shift.abs().max()))


@hypothesis.settings(max_examples=60)
@hypothesis.given(solvers, batches, st.sampled_from([math.nan, math.inf]))
def test_bad_samples_leave_the_others_alone(solver, f, bad):
    options = {"rtol": RTOL[torch.float64], "atol": 0.0, "max_steps": 500, "on_failure": "ignore"}
    solution = solve(f, f.start, solver, **options)
    shift = f.shift.clone()
    shift[0] = bad
    beside = solve(dataclasses.replace(f, shift=shift), f.start, solver, **options)
    assert beside.status[0] == Status.NONFINITE
    assert torch.equal(beside.num_steps[1:], solution.num_steps[1:])
    assert torch.equal(beside.value[1:], solution.value[1:])
