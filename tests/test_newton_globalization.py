"""Newton-Krylov far from a solution: it descends or stays, sample by sample, in any units, and solves what it can."""

import functools
import itertools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from solvers import Iteration, NewtonKrylov, Status, solve
from solvers.methods.newton_krylov import FEW_UNKNOWNS
from solvers.testing import NONLINEAR

RTOL = 1e-10

# Trigonometric has many minima of the residual that are no roots.
UNSOLVED = {1: set(), 10: {"Trigonometric"}}


def rms(x):
    return x.square().mean(dim=1).sqrt()


@pytest.mark.parametrize("factor", UNSOLVED)
@pytest.mark.parametrize("name", NONLINEAR)
def test_solves_the_classical_systems(name, factor):
    """Never uphill, with either sign, and from ten times the start as well."""
    problem = NONLINEAR[name]
    for f in (problem.minus, problem.plus):
        iteration = Iteration(f, factor * problem.x0, NewtonKrylov(), rtol=RTOL, atol=0, max_steps=200)
        errors = [rms(iteration.state.fz - iteration.state.z).item()]
        while not iteration.done:
            iteration.step()
            errors.append(rms(iteration.state.fz - iteration.state.z).item())
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))
        assert iteration.solution().converged.all() or name in UNSOLVED[factor]
        if iteration.solution().converged.all():
            scale = max(1.0, problem.x0.norm().item())
            assert problem.F(iteration.state.z).norm() <= 1e-8 * scale


# A map in some unknowns whose residual has minima that are no fixed points; more unknowns than the trust region takes.
def waves(z, x):
    return 3 * torch.sin(z) + 0.5 * z.roll(1, dims=1) + x


@pytest.mark.long
@hypothesis.settings(max_examples=12)
@hypothesis.given(st.integers(0, 2**32), st.sampled_from([1, 3, FEW_UNKNOWNS, FEW_UNKNOWNS + 1]))
def test_never_uphill(seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, size, dtype=torch.float64, generator=generator)
    z0 = 5 * torch.randn(4, size, dtype=torch.float64, generator=generator)
    iteration = Iteration(lambda z: waves(z, x), z0, NewtonKrylov(), rtol=RTOL, atol=0, max_steps=30)
    error = rms(iteration.state.fz - iteration.state.z)
    active = torch.ones(4, dtype=torch.bool)
    while not iteration.done:
        iteration.step()
        latest = rms(iteration.state.fz - iteration.state.z)
        assert torch.allclose(iteration.state.error, latest, rtol=1e-12)
        assert (latest <= error * (1 + 1e-12))[active].all()
        error = latest
        active = iteration.solution().status == Status.MAX_STEPS


@pytest.mark.long
@pytest.mark.parametrize("unit", [2.0**-27, 2.0**27])
@pytest.mark.parametrize("name", NONLINEAR)
def test_units_do_not_matter(name, unit):
    """The same system in other units: by a power of two, so that every digit is the same."""
    problem = NONLINEAR[name]
    start = 10 * problem.x0
    options = {"rtol": RTOL, "atol": 0, "max_steps": 60, "on_failure": "ignore"}
    plain = solve(problem.minus, start, NewtonKrylov(), **options)
    scaled = solve(lambda z: unit * problem.minus(z / unit), unit * start, NewtonKrylov(), **options)
    assert torch.equal(scaled.status, plain.status)
    assert torch.equal(scaled.num_steps, plain.num_steps)
    assert scaled.num_evals == plain.num_evals
    assert torch.equal(scaled.value, unit * plain.value)


@pytest.mark.long
@pytest.mark.parametrize("size", [5, FEW_UNKNOWNS + 8])
def test_samples_do_not_depend_on_their_batch_mates(size):
    """Easy ones, ones that need the trust region or leaps, one that is NaN; also where finished ones are dropped."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, size, dtype=torch.float64, generator=generator)
    z0 = torch.tensor([[0.1], [1.0], [3.0], [10.0], [30.0], [1.0]], dtype=torch.float64).expand(6, size).contiguous()
    x[5] = math.nan
    options = {"rtol": RTOL, "atol": 0, "max_steps": 60, "on_failure": "ignore"}
    together = solve(waves, z0, NewtonKrylov(), args=(x,), **options)
    compact = solve(waves, z0, NewtonKrylov(), args=(x,), compact=True, **options)
    assert together.status[5] == Status.NONFINITE
    for i in range(6):
        alone = solve(waves, z0[i : i + 1], NewtonKrylov(), args=(x[i : i + 1],), **options)
        for solution in (together, compact):
            assert solution.status[i] == alone.status[0]
            assert solution.num_steps[i] == alone.num_steps[0]
            assert torch.allclose(solution.residual[i], alone.residual[0], rtol=1e-6, atol=1e-12, equal_nan=True)
            if alone.converged[0]:
                assert torch.allclose(solution.value[i], alone.value[0], rtol=1e-9)


def test_a_minimum_that_is_no_root_is_left():
    """Of 200 samples with such minima in each unknown all find a fixed point."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    z0 = torch.full_like(x, 2.0)
    solution = solve(lambda z: 3 * torch.sin(z) + x, z0, NewtonKrylov(), rtol=1e-12, max_steps=100, on_failure="ignore")
    assert solution.converged.float().mean() >= 0.99


@pytest.mark.parametrize("size", [3, FEW_UNKNOWNS + 1])
def test_without_a_root_it_stagnates_at_the_least_residual(size):
    """The residual 1 + (z - 2)^2 is least at 2, and there is nothing else to find."""
    z0 = torch.linspace(-1, 1, size, dtype=torch.float64).expand(2, size)
    solution = solve(lambda z: z + 1 + (z - 2) ** 2, z0, NewtonKrylov(), max_steps=300, on_failure="ignore")
    assert (solution.status == Status.STAGNATED).all()
    assert torch.allclose(solution.state.z, torch.full_like(z0, 2.0), atol=0.3)
    assert (solution.state.error <= 1.1).all()
    if size > FEW_UNKNOWNS:
        # It gives up, and calls f no more.
        assert solution.num_evals < 250


@pytest.mark.parametrize("size", [1, FEW_UNKNOWNS + 1])
def test_a_domain_is_not_left(size):
    """z - log(z) / 2 is NaN for z <= 0, and full steps from 9 go there."""
    z0 = torch.full((1, size), 9.0, dtype=torch.float64)
    solution = solve(lambda z: z - 0.5 * torch.log(z), z0, NewtonKrylov(), rtol=RTOL, on_failure="raise")
    assert torch.allclose(solution.value, torch.ones_like(z0))
    assert solution.num_evals < 60


@pytest.mark.parametrize("size", [2, FEW_UNKNOWNS + 1])
def test_few_calls_for_a_sample_that_is_hopeless_everywhere(size):
    """Finite at the start only: the trials are given up soon, and not made again."""
    z0 = torch.zeros(1, size, dtype=torch.float64)
    solution = solve(
        lambda z: torch.where(z == 0, 1 + z, math.nan), z0, NewtonKrylov(), max_steps=100, on_failure="ignore"
    )
    assert solution.failed.all()
    assert solution.value.isfinite().all()
    assert solution.num_evals < 60


def test_settled_samples_call_nothing():
    """At the level of rounding errors a step changes nothing and calls nothing."""
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return torch.cos(z)

    z0 = torch.ones(3, 2, dtype=torch.float64)
    state = functools.reduce(lambda state, _: NewtonKrylov().step(f, state), range(8), NewtonKrylov().init(f, z0))
    before = calls
    after = NewtonKrylov().step(f, state)
    assert calls == before
    assert torch.equal(after.z, state.z)


def test_restarted():
    """Samples that begin anew are as new; the others go on as they were."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    z0 = 10 * torch.randn(4, 3, dtype=torch.float64, generator=generator)
    f = functools.partial(waves, x=x)
    solver = NewtonKrylov()
    state = functools.reduce(lambda state, _: solver.step(f, state), range(12), solver.init(f, z0))
    rows = torch.tensor([True, False, True, False])
    again = solver.restarted(state, rows, z0, f(z0))
    fresh = solver.init(f, z0)
    for _ in range(6):
        state, again, fresh = (solver.step(f, each) for each in (state, again, fresh))
        expected = torch.where(rows.unsqueeze(1), fresh.z, state.z)
        assert torch.allclose(again.z, expected, rtol=1e-10)
