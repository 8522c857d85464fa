"""No solver reports CONVERGED where that is false, and contractions are solved from every start."""

import functools

import pytest
import torch
from solver_rows import SOLVERS
from torch.nn.functional import leaky_relu

from solvers import solve
from solvers.testing import STATUS_MAPS

# At most as wrong as this: the stopping test promises one digit.
ONE_DIGIT = 0.1

# Contractions that a method does not promise to solve; what it reports there is still true.
UNSOLVED: dict[str, set[str]] = {
    # Its linear systems are singular at the start of a sample: f' is 1 there, or infinite.
    "through zero, quadratic": {"newton_krylov"},
    "domain of a square root": {"newton_krylov"},
    # They extrapolate to the fixed point at zero, which repels, and where a relative tolerance alone is never met.
    "late": {"anderson 5", "anderson 5 damped", "anderson 10", "broyden damped 5"},
}


@functools.cache
def status_map(name):
    return STATUS_MAPS[name]()


def solved(name, solver, max_steps=5000):
    problem = status_map(name)
    tolerances = {"rtol": problem.rtol} if problem.atol is None else {"rtol": problem.rtol, "atol": problem.atol}
    steps = min(max_steps, 200) if solver == "newton_krylov" else max_steps
    return solve(problem.f, problem.z0, SOLVERS[solver], max_steps=steps, on_failure="ignore", **tolerances)


@pytest.mark.parametrize("name", STATUS_MAPS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_is_true(solver, name):
    problem, solution = status_map(name), solved(name, solver)
    value, converged = solution.value, solution.converged
    assert value.isfinite().all()
    residual = torch.linalg.vector_norm(problem.f(value) - value, dim=1)
    scale = torch.maximum(torch.linalg.vector_norm(value, dim=1), torch.linalg.vector_norm(problem.z0, dim=1))
    assert (residual <= 1.01 * problem.rtol * scale)[converged].all()
    assert (problem.error(value) <= ONE_DIGIT)[converged].all()


@pytest.mark.parametrize("name", [name for name in STATUS_MAPS if STATUS_MAPS[name]().contracts])
@pytest.mark.parametrize("solver", SOLVERS)
def test_contractions_are_solved(solver, name):
    if solver not in UNSOLVED.get(name, ()):
        assert solved(name, solver).converged.all()


def test_the_automatic_solver_leaves_a_fixed_point_that_repels():
    """Near zero 2 tanh(z) doubles: the fixed point that plain iteration leads to is 1.915, not the one at zero."""
    value = solved("late", "auto").value
    assert torch.allclose(value, status_map("late").solutions[0], rtol=1e-4)


def test_solution_that_is_exact_has_converged_wherever_it_changed_last():
    """Of a large state only some entries are looked at, which may be solved long before the others."""

    def f(z):
        chain = torch.cat([torch.ones_like(z[:, :1]), z[:, :9]], dim=1)
        return torch.cat([chain, torch.zeros_like(z[:, 10:])], dim=1)

    solution = solve(f, torch.zeros(1, 200_000), "picard", rtol=1e-5, on_failure="ignore")
    assert solution.statuses() == ["CONVERGED"]
    assert solution.num_steps.item() <= 13
    assert torch.equal(solution.value, f(solution.value))


@pytest.mark.parametrize(
    ("solver", "compile"),
    [
        *(pytest.param(name, False, marks=() if name in {"picard", "auto"} else pytest.mark.long) for name in SOLVERS),
        *(pytest.param(solver, True, marks=pytest.mark.long) for solver in ("picard", "anderson 5", "broyden")),
    ],
)
def test_sizes_whose_squares_vanish_or_overflow(without_a_compiler, solver, compile):
    """No state from 1e-30 to 1e30 in float32 counts as solved that is not, though norms tell nothing there."""
    sizes = 10.0 ** torch.arange(-30.0, 31.0, 2.0).unsqueeze(1)
    usual = ((sizes > 1e-11) & (sizes < 1e17)).squeeze(1)
    maps = [
        lambda z, size: size * torch.cos(z / size),
        lambda z, size: 0.95 * z + 0.05 * size,
        lambda z, size: 1.03 * z + 0.01 * size,
    ]
    for f in maps:
        for start in (0.0, 0.7):
            z0 = start * sizes.expand(-1, 2).contiguous()
            options = {"rtol": 1e-4, "max_steps": 60, "compile": compile, "on_failure": "ignore"}
            with torch.no_grad():
                solution = solve(f, z0, SOLVERS[solver], args=(sizes,), **options)
            value, size = solution.value.double(), sizes.double()
            residual, scale = (f(value, size) - value).norm(dim=1), torch.maximum(value.norm(dim=1), size.squeeze(1))
            assert (residual <= 1.1e-4 * scale)[solution.converged].all()
            if start and f is not maps[-1]:
                assert (solution.status[usual] == solution.status[len(size) // 2]).float().mean() > 0.9


# Maps whose first step from a start of this size leads far away, with their solution.
FAR_STEPS = {
    "square root": (lambda z: 0.5 * (z + 2 / z), [1e-4, 1e-6, 1e-8, 1e-10], 2**0.5),
    "exponential": (lambda z: torch.exp(-z), [-10.0, -20.0, -30.0, -40.0], 0.5671432904),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("solver", "compile"), [*((name, False) for name in SOLVERS), pytest.param("picard", True, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", FAR_STEPS)
def test_a_first_step_that_leads_far_away_is_no_measure_of_the_solution(
    without_a_compiler, name, solver, compile, dtype
):
    f, starts, solution = FAR_STEPS[name]
    z0 = torch.tensor(starts, dtype=dtype).unsqueeze(1)
    with torch.no_grad():
        found = solve(f, z0, SOLVERS[solver], max_steps=100, compile=compile, on_failure="ignore")
    value = found.value[found.converged].abs()  # minus the square root is one too
    torch.testing.assert_close(value, torch.full_like(value, solution), rtol=1e-3, atol=0.0)
    assert len(value) or name != "square root" or solver == "newton_krylov"


@pytest.mark.parametrize("solver", ["newton_krylov", "anderson", "broyden", "auto", "picard"])
def test_a_step_that_makes_the_value_larger_and_the_residual_tiny_has_found_a_solution(solver):
    """In float32, where no later residual can be ten times smaller."""

    def f(z):
        return 1 - 0.01 * (z - 1) + 3e-9 * (z - 1) ** 2

    for start in (100.0, 1e4, -1e5, 1e-3):
        solution = solve(f, torch.full((1, 2), start), solver, on_failure="ignore", rtol=1e-5, max_steps=200)
        assert solution.statuses() == ["CONVERGED"], (start, solution)


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("solver", ["broyden", "anderson", "auto", "squarem", "newton_krylov"])
def test_a_map_with_a_kink_and_no_fixed_point(solver, slope):
    """Far from the start, |x| is below the tolerance or rounding, but no solver has come closer to a fixed point."""
    for seed in range(10):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).abs()
        start = torch.zeros(4, 8)
        solution = solve(lambda z, x: leaky_relu(z, slope) + x, start, solver, args=(x,), on_failure="ignore")
        assert not solution.converged.any(), solution
