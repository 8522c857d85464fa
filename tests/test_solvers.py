"""What is known of single solvers: how many calls of the map they take, textbook steps, hyperparameters."""

import pytest
import torch
from solver_rows import CALLS_VARY, SOLVERS

from solvers import Anderson, Broyden, Picard, Status, solve
from solvers.testing import BANK

# Calls of f to 1e-5 relative in float32. None where the count depends on the last bits.
CALLS = {
    "linear 0.5": {"picard": 16, "anderson 5": 11, "anderson 10": 10, "broyden": 11},
    "linear 0.9": {"picard": 86, "anderson 5": 35, "anderson 10": 25, "broyden": 28},
    "cos": {"picard": 29, "anderson 5": 5, "anderson 10": 5, "broyden": 5},
    "contractive 2x2": {"picard": 18, "anderson 5": 4, "anderson 10": 4, "broyden": 5},
}


class CountedMap:
    """A map that counts its calls."""

    def __init__(self, f):
        self.f = f
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return self.f(z)


@pytest.mark.parametrize(("problem", "solver"), [(p, s) for p, row in CALLS.items() for s in row])
def test_calls_of_the_map(problem, solver):
    bank = BANK[problem](torch.float64)
    solution = solve(bank.f, bank.z0, SOLVERS[solver], rtol=1e-5, atol=0, max_steps=200)
    assert solution.num_evals == CALLS[problem][solver]


@pytest.mark.parametrize("solver", [Anderson(memory=10), Anderson(memory=10, least_squares="qr"), Broyden()], ids=str)
def test_planes_is_solved_where_picard_cycles(solver):
    bank = BANK["planes"](torch.float64)
    picard = solve(bank.f, bank.z0, Picard(), rtol=1e-8, atol=0, max_steps=200, on_failure="ignore")
    assert Status(int(picard.status)) is Status.STAGNATED
    # Fourteen unknowns and a memory of ten: more steps than unknowns.
    solution = solve(bank.f, bank.z0, solver, rtol=1e-8, atol=0, max_steps=200, on_failure="raise")
    assert torch.allclose(solution.value, bank.solution, atol=1e-5)


def test_damping_is_the_textbook_step():
    bank = BANK["tanh"](torch.float64)
    iterates = []

    def f(z):
        iterates.append(z.clone())
        return bank.f(z)

    solve(f, bank.z0, Picard(damping=0.25), rtol=None, atol=None, max_steps=2)
    assert torch.allclose(iterates[1], 0.75 * iterates[0] + 0.25 * bank.f(iterates[0]))


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - CALLS_VARY))
def test_fixed_steps_are_exact_calls(solver):
    bank = BANK["tanh"](torch.float64)
    for steps in (1, 2, 7):
        f = CountedMap(bank.f)
        solution = solve(f, bank.z0, SOLVERS[solver], rtol=None, atol=None, max_steps=steps)
        assert solution.num_evals == f.calls == steps
        assert solution.residual is None
        assert solution.history is None
        assert (solution.status == Status.UNTESTED).all()
        assert (solution.num_steps == steps).all()


def test_n_picard_steps_return_the_nth_result():
    bank = BANK["tanh"](torch.float64)
    z = bank.z0
    for _ in range(5):
        z = bank.f(z)
    assert torch.equal(solve(bank.f, bank.z0, Picard(), rtol=None, atol=None, max_steps=5).value, z)


@pytest.mark.parametrize("bad", [{"memory": 0}, {"memory": 2.5}, {"damping": 0.0}, {"damping": 1.5}], ids=str)
def test_bad_hyperparameters_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"Anderson\({name}=...\)"):
        Anderson(**bad)
    with pytest.raises(ValueError, match=rf"Broyden\({name}=...\)"):
        Broyden(**bad)


def test_unknown_options_list_the_valid_ones():
    with pytest.raises(TypeError, match="no option 'memroy'. Did you mean 'memory'\\? Its options: memory, damping"):
        Anderson(memroy=3)
    with pytest.raises(TypeError, match="keyword arguments only"):
        Anderson(3)
    with pytest.raises(ValueError, match='"gram" or "qr", got \'svd\''):
        Anderson(least_squares="svd")


def test_solvers_are_frozen_values():
    assert Anderson(memory=3) == Anderson(memory=3) != Anderson(memory=4)
    assert len({Picard(), Picard(), Broyden()}) == 2
    with pytest.raises(AttributeError):
        Picard().damping = 0.5


def test_sizes_at_the_limits_of_the_dtype():
    """Squares that overflow or underflow in a norm do not pass for convergence."""
    for size in (1e-25, 1e-21, 1e-15, 1.0, 1e15):
        solution = solve(
            lambda z, s=size: 0.5 * z + s, torch.zeros(2, 4), Picard(), rtol=1e-4, atol=0, on_failure="ignore"
        )
        if solution.converged.all():
            assert torch.allclose(solution.value, torch.full((2, 4), 2 * size), rtol=1e-3, atol=0)
        else:
            assert size < 1e-18
    huge = solve(lambda z: 0.5 * z + 1e25, torch.zeros(2, 4), Picard(), rtol=1e-4, atol=0, on_failure="ignore")
    assert not huge.converged.any()
