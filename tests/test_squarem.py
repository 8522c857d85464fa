"""SQUAREM: its formula, its safeguards, and the maps that it is made for."""

import pytest
import torch

from solvers import Anderson, Picard, Squarem, Status, solve
from solvers.testing import BANK

SCHEMES = ["S1", "S2", "S3"]


def poisson_mixture(z):
    """One expectation-maximization step for a mixture of two Poisson distributions.

    On how many days how many deaths were announced (Hasselblad 1969), as in Varadhan and Roland. z is (B, 3): the
    weight of the first distribution and the two means.
    """
    deaths = torch.arange(10, dtype=z.dtype)
    days = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1], dtype=z.dtype)
    weight, first, second = z.split(1, dim=1)
    a = weight * torch.exp(deaths * first.log() - first)
    b = (1 - weight) * torch.exp(deaths * second.log() - second)
    of_first, of_second = days * a / (a + b), days * b / (a + b)  # (B, 10)
    n, m = of_first.sum(dim=1), of_second.sum(dim=1)
    return torch.stack((n / (n + m), (of_first * deaths).sum(dim=1) / n, (of_second * deaths).sum(dim=1) / m), dim=1)


@pytest.mark.parametrize(("scheme", "most"), [("S1", 130), ("S2", 130), ("S3", 90)])
def test_expectation_maximization(scheme, most):
    z0 = torch.tensor([[0.3, 1.0, 2.5]], dtype=torch.float64)
    squarem = solve(poisson_mixture, z0, Squarem(scheme=scheme), rtol=1e-8, atol=0, max_steps=500, on_failure="raise")
    picard = solve(poisson_mixture, z0, Picard(), rtol=1e-8, atol=0, max_steps=2000, on_failure="ignore")
    assert torch.allclose(squarem.value, torch.tensor([[0.3599, 1.256, 2.663]], dtype=torch.float64), atol=1e-3)
    assert squarem.num_evals <= most
    assert picard.failed.all()


@pytest.mark.parametrize("problem", ["linear 0.9", "linear 0.99", "mixed"])
def test_needs_fewer_calls_than_the_shortest_window(problem):
    bank = BANK[problem](torch.float64)
    calls = {
        solver: solve(bank.f, bank.z0, solver, rtol=1e-5, atol=0, max_steps=2000, on_failure="raise").num_evals
        for solver in (Squarem(), Anderson(memory=1), Picard())
    }
    squarem, anderson, picard = calls.values()
    assert 1.5 * squarem < anderson < picard


def step_length(scheme, r, v):
    """alpha by the formulas of the paper, for one sample."""
    return {"S1": r @ v / (v @ v), "S2": r @ r / (r @ v), "S3": -r.norm() / v.norm()}[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cycle_is_that_of_the_paper(scheme):
    bank = BANK["tanh"](torch.float64)
    iterates = []

    def f(z):
        iterates.append(z.clone())
        return bank.f(z)

    solve(f, bank.z0, Squarem(scheme=scheme), rtol=None, atol=None, max_steps=7)
    for z, once, far, after in (iterates[:4], iterates[3:]):
        assert torch.equal(once, bank.f(z))
        assert torch.equal(after, bank.f(far))
        for i in range(5):
            r = (once - z)[i]
            v = (bank.f(once) - once)[i] - r
            alpha = step_length(scheme, r, v)
            assert alpha < 0
            assert torch.allclose(far[i], z[i] - 2 * alpha * r + alpha**2 * v)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_unknown_is_solved_by_one_extrapolation(scheme):
    """All schemes find the rate of a linear map of one unknown, also where it oscillates or expands."""
    rate = torch.tensor([[0.9], [-0.9], [-3.0], [0.0]], dtype=torch.float64)
    solution = solve(
        lambda z: rate * z + 1, torch.zeros_like(rate), Squarem(scheme=scheme), rtol=1e-12, atol=0, on_failure="raise"
    )
    assert torch.allclose(solution.value, 1 / (1 - rate), rtol=1e-10)
    assert solution.num_steps.tolist() == [3, 3, 3, 2]


def test_bad_extrapolations_are_taken_back():
    """Across the kink the two plain steps promise far more than there is; the iteration goes on from the second."""

    def f(z):
        return torch.where(z < 3, z + 1 - 1e-4 * z, 3 + 1e3 * (z - 3).clamp_max(0.0) - 1e4 * (z - 3).clamp_min(0.0))

    z0 = torch.zeros(1, 1, dtype=torch.float64)
    iterates = []

    def recorded(z):
        iterates.append(float(z))
        return f(z)

    solve(recorded, z0, Squarem(), rtol=None, atol=None, max_steps=4)
    _, once, far, after = iterates
    assert far > 1e3
    assert after == float(f(torch.tensor([[once]], dtype=torch.float64)))


def test_differences_that_vanish_leave_plain_steps():
    solution = solve(lambda z: z + 1, torch.zeros(2, 3), Squarem(), rtol=None, atol=None, max_steps=8)
    assert torch.equal(solution.value, torch.full((2, 3), 8.0))
    assert (solution.status == Status.UNTESTED).all()


def test_memory_is_three_vectors():
    state = solve(torch.cos, torch.ones(2, 50), Squarem(), rtol=None, atol=None, max_steps=6).state
    assert sum(tensor.numel() for tensor in vars(state).values() if isinstance(tensor, torch.Tensor)) <= 2 * (150 + 1)


def test_refuses_unknown_schemes():
    with pytest.raises(ValueError, match='must be "S1", "S2" or "S3", got \'S4\''):
        Squarem(scheme="S4")
