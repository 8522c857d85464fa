"""Broyden's method: its variants, its limited memory, its line search, and its inverse Jacobian."""

import itertools

import pytest
import torch

from solvers import Broyden, Iteration, solve
from solvers.methods.low_rank_inverse import LowRankInverse
from solvers.testing import BANK, BankProblem
from solvers.testing.problems import linear
from solvers.testing.row_contractions import RowContractions

# Most calls of f to 1e-5 relative in float32 and to 1e-8 in float64, by (method, memory).
CALLS: dict[str, dict[tuple[str, int | None], tuple[int, int]]] = {
    "linear 0.9": {("good", 10): (34, 55), ("good", None): (34, 50), ("bad", 10): (28, 45), ("bad", None): (28, 42)},
    "linear 0.99": {("good", 10): (90, 140), ("good", None): (80, 95), ("bad", 10): (55, 85), ("bad", None): (48, 66)},
    "tanh": {("good", 5): (16, 25), ("bad", 5): (16, 25)},
    "planes": {("good", 10): (48, 60), ("bad", 10): (50, 70)},
    "expansive": {("good", 10): (40, 50), ("bad", 10): (40, 50)},
    "H-equation": {("good", 5): (9, 10), ("bad", 5): (9, 10)},
}


def solved(bank, solver, rtol, **options):
    options = {"atol": 0, "max_steps": 300, "on_failure": "raise"} | options
    return solve(bank.f, bank.z0, solver, rtol=rtol, **options)


@pytest.mark.parametrize(("problem", "variant"), [(p, v) for p, row in CALLS.items() for v in row], ids=str)
def test_needs_few_calls(problem, variant):
    method, memory = variant
    single, double = CALLS[problem][variant]
    solver = Broyden(method=method, memory=memory)
    assert solved(BANK[problem](torch.float32), solver, 1e-5).num_evals <= single
    assert solved(BANK[problem](torch.float64), solver, 1e-8).num_evals <= double


@pytest.mark.parametrize("method", ["good", "bad"])
@pytest.mark.parametrize(("memory", "most"), [(5, 100), (10, 80), (20, 75)])
def test_limited_memory_does_not_stall(method, memory, most):
    bank = linear(torch.float64, radius=0.95)
    solution = solved(bank, Broyden(method=method, memory=memory), 1e-8)
    assert solution.num_evals <= most
    assert solution.state.inverse.rank <= memory
    assert (solution.value - bank.solution).norm() < 1e-6 * bank.solution.norm()


@pytest.mark.parametrize("solver", [Broyden(), Broyden(method="bad"), Broyden(memory=5), Broyden(damping=0.7)], ids=str)
def test_inverse_is_an_operator_with_its_transpose_that_maps_changes_to_steps(solver):
    bank = BANK["tanh"](torch.float64)
    iteration = Iteration(bank.f, bank.z0, solver, rtol=1e-8, atol=1e-6)
    while not iteration.done:
        old = iteration.state.z, iteration.state.fz
        iteration.step()
        state = iteration.state
        s, y = state.z - old[0], (state.fz - state.z) - (old[1] - old[0])
        assert torch.allclose(state.inverse.mv(y), s, atol=1e-10 * float(s.norm()))
    x, y = torch.randn(2, *bank.z0.shape, dtype=torch.float64)
    assert state.inverse.rank > 2
    assert torch.allclose((state.inverse.rmv(x) * y).sum(1), (x * state.inverse.mv(y)).sum(1))


@pytest.mark.parametrize("method", ["good", "bad"])
def test_update_is_the_textbook_formula(method):
    problem = RowContractions.make(batch=1, size=4)
    inverse = -torch.eye(4, dtype=torch.float64)
    iteration = Iteration(problem, problem.start, Broyden(method=method), rtol=None, atol=None, max_steps=6)
    while not iteration.done:
        z, g = iteration.state.z[0], (iteration.state.fz - iteration.state.z)[0]
        iteration.step()
        s = -inverse @ g
        assert torch.allclose(iteration.state.z[0], z + s)
        y = (iteration.state.fz - iteration.state.z)[0] - g
        v = inverse.T @ s if method == "good" else y
        inverse = inverse + torch.outer(s - inverse @ y, v) / (v @ y)


def pairs(*shape, dtype=torch.float64):
    return torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def matrix(inverse):
    """(B, D, D) the sum of the pairs."""
    return torch.einsum("bki,bkj->bij", inverse.u[:, : inverse.rank], inverse.v[:, : inverse.rank])


def test_truncation_keeps_the_largest_singular_values():
    u, v = pairs(5, 8, 30)
    sizes = 0.5 ** torch.arange(8, dtype=torch.float64)
    # Pairs of which none is a pair of singular vectors.
    left, right = torch.linalg.qr(u.mT)[0].mT, torch.linalg.qr(v.mT)[0].mT
    mixing = torch.randn(5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inverse = LowRankInverse(8, torch.linalg.inv(mixing).mT @ (sizes.unsqueeze(1) * left), mixing @ right)
    before = matrix(inverse)
    kept = inverse.truncated(5)
    assert kept.rank == 5
    error = torch.linalg.matrix_norm(matrix(kept) - before, 2)
    assert (error >= sizes[5] * (1 - 1e-9)).all()  # the best there is
    assert (error < 5 * sizes[5]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_truncation_stands_dependent_and_vanished_pairs(dtype):
    u, v = pairs(4, 4, 10, dtype=dtype)
    u[0], v[0] = 0, 0
    u[1, 3] = 0
    v[2, 2] = v[2, 1]
    v[3, 2] = v[3, 1]
    u[3] *= torch.finfo(dtype).tiny ** 0.5
    before = matrix(LowRankInverse(4, u, v))
    kept = matrix(LowRankInverse(4, u.clone(), v.clone()).truncated(3))
    # Three pairs that count in each; nearly dependent ones are told apart but roughly.
    error = torch.linalg.matrix_norm(kept - before) / torch.linalg.matrix_norm(before).clamp_min(1e-300)
    assert kept[0].count_nonzero() == 0
    assert error[1] < 1e2 * torch.finfo(dtype).eps
    assert (error[2:] < 1e-2).all()


@pytest.mark.parametrize("method", ["good", "bad"])
@pytest.mark.parametrize("memory", [1, 2, 4])
def test_gradients_through_truncations(method, memory):
    problem = RowContractions.make(batch=2, size=5)

    def steps(z0, shift):
        f = RowContractions(problem.rate, problem.growth, shift)
        return solve(f, z0, Broyden(method=method, memory=memory), rtol=None, atol=None, max_steps=9).value

    start = problem.shift.flip(1).clone().requires_grad_()
    assert torch.autograd.gradcheck(steps, (start, problem.shift.clone().requires_grad_()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "solver",
    [Broyden(), Broyden(method="bad"), Broyden(memory=5), Broyden(damping=0.7), Broyden(line_search=True)],
    ids=str,
)
def test_gradients_many_steps_past_convergence(solver, dtype):
    """Updates made of rounding errors are not learnt: their derivatives would grow. At z = 0 all products underflow."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (8, 4))
    weight = (0.9 * weight / torch.linalg.matrix_norm(weight, 2)).to(dtype)
    for shift in (x, torch.zeros_like(x)):
        x = shift.to(dtype).requires_grad_()
        value = solve(
            lambda z, x=x: torch.tanh(z @ weight.T + x), torch.ones_like(x), solver, rtol=None, atol=None, max_steps=120
        ).value
        (gradient,) = torch.autograd.grad(value.sum(), x)
        slope = 1 - value.detach().double() ** 2  # at the fixed point z = tanh(W z + x)
        jacobian = slope.unsqueeze(2) * weight.double()
        system = torch.eye(8, dtype=torch.float64) - jacobian
        expected = slope * torch.linalg.solve(system.mT, torch.ones(4, 8, 1, dtype=torch.float64)).squeeze(2)
        assert torch.allclose(gradient.double(), expected, rtol=1e3 * torch.finfo(dtype).eps)


@pytest.mark.long
@pytest.mark.parametrize("solver", [Broyden(memory=2), Broyden(method="bad"), Broyden(damping=0.7)], ids=str)
def test_fixed_steps_compile_to_one_graph(solver):
    weight = torch.randn(4, 4) / 4

    def run(x):
        start = torch.zeros_like(x)
        return solve(lambda z: torch.tanh(z @ weight) + x, start, solver, rtol=None, atol=None, max_steps=5).value

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for x in (torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)):
        assert torch.allclose(compiled(x), run(x), atol=1e-5)


def exponential():
    """``g(z) = b - exp(z)`` from z = 0: a full step to b overshoots log(b) by far."""
    b = torch.linspace(2, 40, 20, dtype=torch.float64).unsqueeze(1)
    return BankProblem(lambda z: z + b - torch.exp(z), torch.zeros_like(b), torch.log(b))


def quartic():
    """Minus the gradient of a convex quartic, far from its minimum: full steps overflow."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, dtype=torch.float64, generator=generator)
    a = a @ a.T / 16
    z0 = torch.full((8, 16), 3.0, dtype=torch.float64)
    return BankProblem(lambda z: z - (z @ a + z**3), z0, torch.zeros_like(z0))


@pytest.mark.parametrize(("problem", "most"), [(exponential, 60), (quartic, 80)])
def test_line_search_converges_where_full_steps_run_away(problem, most):
    bank = problem()
    assert solved(bank, Broyden(), 1e-8, atol=1e-9, on_failure="ignore").failed.any()
    solution = solved(bank, Broyden(line_search=True), 1e-8, atol=1e-9)
    assert solution.num_evals <= most
    assert torch.allclose(solution.value, bank.solution, atol=1e-7)


@pytest.mark.parametrize("problem", ["linear 0.9", "tanh", "mixed", "planes", "expansive", "cos", "H-equation"])
@pytest.mark.parametrize("method", ["good", "bad"])
def test_line_search_costs_little_where_full_steps_do(method, problem):
    bank = BANK[problem](torch.float64)
    full = solved(bank, Broyden(method=method), 1e-8)
    searched = solved(bank, Broyden(method=method, line_search=True), 1e-8)
    assert searched.num_evals <= 1.25 * full.num_evals


def test_line_search_holds_accepted_samples():
    """While some samples try shorter steps, f is called with the same z for the others."""
    bank = exponential()
    calls = []

    def f(z):
        calls.append(z.clone())
        return bank.f(z)

    iteration = Iteration(f, bank.z0, Broyden(line_search=True), rtol=None, atol=None, max_steps=2)
    iteration.step()
    assert len(calls) > 2
    most = 2 * (bank.f(bank.z0) - bank.z0).abs()
    for earlier, later in itertools.pairwise(calls[1:]):
        held = earlier == later  # one entry a sample
        assert held.any()
        assert torch.equal(held, (bank.f(earlier) - earlier).abs() <= most)
    assert torch.equal(iteration.state.fz, bank.f(iteration.state.z))
    assert torch.equal(iteration.state.z, calls[-1])


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match='"good" or "bad", got \'ugly\''):
        Broyden(method="ugly")
