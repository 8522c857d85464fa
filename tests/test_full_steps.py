"""The short way for roots: samples that need nothing but full Newton steps, and the batch in parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_systems import kepler, orbits, system, systems

from implicit import root
from solvers import Iteration, Newton, Status, Stopping, solve_root
from solvers.testing import NONLINEAR

pytestmark = pytest.mark.usefixtures("double")

FIELDS = ("value", "status", "residual", "change", "error_estimate", "num_steps")


def by_the_loop(f, z0, args, stopping, batch_dims=1):
    iteration = Iteration(f, z0, Newton(), args=args, stopping=stopping, batch_dims=batch_dims, root=True)
    return iteration.run("ignore")


def assert_same(one, other, rtol=0.0):
    for field in FIELDS:
        a, b = getattr(one, field), getattr(other, field)
        assert torch.allclose(a, b, rtol=rtol, atol=0.0, equal_nan=True), field


@pytest.mark.parametrize("rtol", [1e-3, 1e-8, 1e-13, 1e-16])
@pytest.mark.parametrize("parts", [{}, {"compact": True}, {"chunk_size": 7}, {"chunk_size": 64}, {"chunk_size": 1000}])
def test_kepler_is_what_the_driver_loop_finds(rtol, parts):
    """Value, status, steps and residual of every sample, bit for bit, whichever way it was solved."""
    z0, *args = orbits(200)
    stopping = Stopping(rtol=rtol)
    loop = by_the_loop(kepler, z0, tuple(args), stopping)
    solution = solve_root(kepler, z0, args=tuple(args), stopping=stopping, on_failure="ignore", **parts)
    assert_same(solution, loop, rtol=1e-15)


@pytest.mark.long
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 4),
    exponent=st.integers(-40, 40),
    of_f=st.integers(-40, 40),
    norm=st.sampled_from(["rms", "max", "l2"]),
    atol=st.sampled_from([None, 0.0, 1e-6]),
    compact=st.booleans(),
)
def test_random_systems_are_what_the_driver_loop_finds(seed, size, exponent, of_f, norm, atol, compact):
    """Among them systems without a root, with singular slopes, and starts that are roots."""
    unit, (z0, args) = 2.0**exponent, systems(seed, size)
    args = (*args, unit, 2.0**of_f)
    stopping = Stopping(rtol=1e-9, max_steps=15, norm=norm, **({} if atol is None else {"atol": atol}))
    loop = by_the_loop(system, unit * z0, args, stopping)
    solution = solve_root(system, unit * z0, args=args, stopping=stopping, compact=compact, on_failure="ignore")
    assert torch.equal(solution.status, loop.status)
    assert torch.equal(solution.num_steps, loop.num_steps)
    assert torch.allclose(solution.value, loop.value, rtol=1e-9, atol=1e-9 * unit, equal_nan=True)


@pytest.mark.parametrize("name", NONLINEAR)
def test_classical_systems_are_what_the_driver_loop_finds(name):
    problem = NONLINEAR[name]
    z0 = problem.x0 * torch.tensor([[1.0], [1.1], [0.9], [10.0]])
    loop = by_the_loop(problem.F, z0, (), Stopping(rtol=1e-10))
    solution = solve_root(problem.F, z0, stopping=Stopping(rtol=1e-10), on_failure="ignore")
    assert torch.equal(solution.status, loop.status)
    assert torch.equal(solution.num_steps, loop.num_steps)
    assert torch.allclose(solution.value, loop.value, rtol=1e-9, equal_nan=True)


def test_finished_samples_are_seen_where_they_were_finite():
    """Also where the next step of a sample that has been given up would not be."""
    seen = []

    def f(z, x):
        seen.append(bool(z.isfinite().all()))
        return torch.where(x > 3, z.abs().sqrt() * z.sign(), torch.where(x > 2, torch.zeros_like(z) + x, z**3 - x))

    x = torch.tensor([0.5, 1.0, 2.5, 4.0])
    solution = solve_root(f, torch.tensor([1.0, 1.0, 1.0, 0.0]), args=(x,), on_failure="ignore")
    assert all(seen)
    assert solution.statuses()[:2] == ["CONVERGED", "CONVERGED"]
    assert solution.status[2] != Status.CONVERGED


def test_in_dims_and_pytrees_in_parts():
    z0, eccentricity, mean = orbits(50)
    whole = root(kepler, z0, eccentricity, mean)

    def f(z, x, shared):
        return {"a": kepler(z["a"], x["eccentricity"], x["mean"].squeeze(0)), "b": z["b"] * 2 - shared}

    args = ({"eccentricity": eccentricity.unsqueeze(1).mT, "mean": mean.unsqueeze(0)}, torch.tensor([1.0, 2.0]))
    start = {"a": z0, "b": torch.zeros(50, 2)}

    def of_rows(z, x, shared):
        return f(z, {"eccentricity": x["eccentricity"].squeeze(0), "mean": x["mean"]}, shared)

    found, solution = root(of_rows, start, *args, in_dims=(1, None), chunk_size=8, return_solution=True)
    assert solution.converged.all()
    assert torch.allclose(found["a"], whole, rtol=1e-14)
    assert torch.allclose(found["b"], args[1].expand(50, 2) / 2)


def test_gradients_in_parts():
    z0, eccentricity, mean = orbits(20)
    eccentricity.requires_grad_()
    mean.requires_grad_()
    expected = torch.autograd.grad(root(kepler, z0, eccentricity, mean).sum(), (eccentricity, mean))
    for parts in ({"chunk_size": 6}, {"compact": True}):
        z = root(kepler, z0, eccentricity, mean, **parts)
        for one, other in zip(torch.autograd.grad(z.sum(), (eccentricity, mean)), expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: root(kepler, z0, *x, rtol=1e-12, chunk_size=6), (eccentricity, mean))


@pytest.mark.parametrize("solver", ["newton", "newton_krylov", "broyden", "anderson"])
def test_every_solver_in_parts(solver):
    z0, *args = orbits(20)
    options = {"solver": solver, "args": tuple(args), "stopping": Stopping(rtol=1e-8), "on_failure": "ignore"}
    whole, parts = solve_root(kepler, z0, **options), solve_root(kepler, z0, chunk_size=6, **options)
    assert_same(parts, whole, rtol=1e-12)
    one, other = (solve_root(kepler, z0, history=True, chunk_size=n, **options).history for n in (6, 100))
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-15)


def test_gradients_through_the_steps_in_parts():
    """Also to the start, under the backward mode that gives it one."""
    z0, *args = orbits(9)
    z0.requires_grad_()
    gradients = []
    for chunk_size in (None, 4):
        options = {"solver": "picard", "backward": "unrolled", "rtol": None, "atol": None, "max_steps": 3}
        z = root(kepler, z0, *args, chunk_size=chunk_size, **options)
        gradients.append(torch.autograd.grad(z.sum(), z0)[0])
    assert gradients[0].count_nonzero()
    assert torch.allclose(*gradients)


def test_refusals():
    z0, *args = orbits(20)
    for chunk_size in (0, -1, 2.5, "all"):
        with pytest.raises(ValueError, match=r"chunk_size must be a positive integer or None, got"):
            root(kepler, z0, *args, chunk_size=chunk_size)
    with pytest.raises(ValueError, match=r"chunk_size needs batch_dims=1.*got 0"):
        root(kepler, z0, *args, chunk_size=5, batch_dims=0)
    with pytest.raises(ValueError, match=r"take dimension 0 of argument 1.*\(3,\)"):
        root(lambda z, x, y: z - x, z0, args[0], torch.zeros(3), chunk_size=5)


def test_failures_are_reported_once_for_the_whole_batch():
    x = torch.tensor([1.0, -1.0, 2.0, -2.0])
    with pytest.warns(match=r"for 2 of 4 samples") as caught:
        root(lambda z, x: z**2 - x, torch.ones(4), x, chunk_size=2)
    assert len(caught) == 1
