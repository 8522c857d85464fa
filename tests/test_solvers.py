"""Every solver on the problem bank: the answer, the status, and how many calls of the map it takes."""

import functools

import pytest
import torch

from solvers import Anderson, Broyden, Picard, Solver, Status, solve
from solvers.testing import BANK
from solvers.testing.problems import imlp

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "anderson 1": Anderson(memory=1),
    "anderson 5": Anderson(),
    "anderson 10": Anderson(memory=10),
    "anderson 5 qr": Anderson(least_squares="qr"),
    "anderson 5 damped": Anderson(damping=0.7),
    "broyden": Broyden(),
    "broyden 10": Broyden(memory=10),
    "broyden bad": Broyden(method="bad"),
    "broyden bad 5": Broyden(method="bad", memory=5),
}
CONVERGENT = ["linear 0.5", "linear 0.9", "cos", "tanh", "imlp", "contractive 2x2", "H-equation"]

# Calls of f to 1e-5 relative in float32. None where the count depends on the last bits.
CALLS = {
    "linear 0.5": {"picard": 16, "anderson 5": 11, "anderson 10": 10, "broyden": 11},
    "linear 0.9": {"picard": 86, "anderson 5": 35, "anderson 10": 25, "broyden": 28},
    "cos": {"picard": 29, "anderson 5": 5, "anderson 10": 5, "broyden": 5},
    "contractive 2x2": {"picard": 18, "anderson 5": 4, "anderson 10": 4, "broyden": 5},
}


@functools.cache
def bank_problem(name, dtype):
    return imlp(dtype, rows=128) if name == "imlp" else BANK[name](dtype)


class CountedMap:
    """A map that counts its calls."""

    def __init__(self, f):
        self.f = f
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return self.f(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("problem", CONVERGENT)
@pytest.mark.parametrize("solver", SOLVERS)
def test_finds_the_fixed_point(solver, problem, dtype):
    bank = bank_problem(problem, dtype)
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    f = CountedMap(bank.f)
    solution = solve(f, bank.z0, SOLVERS[solver], rtol=rtol, atol=0, max_steps=500, on_failure="raise")
    assert solution.converged.all()
    assert solution.num_evals == f.calls == int(solution.num_steps.max())
    # At a contraction factor of at most 0.9 the error is within 10 residuals; the H-equation's is 0.91 or so.
    error = (solution.value - bank.solution).norm(dim=1) / bank.solution.norm(dim=1)
    assert (error <= 20 * rtol).all()
    # The residual that it reports is that of the iterate whose image is the value.
    assert (solution.residual <= rtol).all()
    assert solution.value.dtype == dtype


@pytest.mark.parametrize(("problem", "solver"), [(p, s) for p, row in CALLS.items() for s in row])
def test_calls_of_the_map(problem, solver):
    bank = bank_problem(problem, torch.float64)
    solution = solve(bank.f, bank.z0, SOLVERS[solver], rtol=1e-5, atol=0, max_steps=200)
    assert solution.num_evals == CALLS[problem][solver]


@pytest.mark.parametrize("solver", [Anderson(memory=10), Anderson(memory=10, least_squares="qr"), Broyden()], ids=str)
def test_planes_is_solved_where_picard_cycles(solver):
    bank = bank_problem("planes", torch.float64)
    picard = solve(bank.f, bank.z0, Picard(), rtol=1e-8, atol=0, max_steps=200, on_failure="ignore")
    assert Status(int(picard.status)) is Status.STAGNATED
    # Fourteen unknowns and a memory of ten: more steps than unknowns.
    solution = solve(bank.f, bank.z0, solver, rtol=1e-8, atol=0, max_steps=200, on_failure="raise")
    assert torch.allclose(solution.value, bank.solution, atol=1e-5)


@pytest.mark.parametrize("solver", ["anderson 5", "anderson 5 qr", "anderson 5 damped", "broyden"])
def test_marginal_cosine(solver):
    bank = bank_problem("cos, marginal", torch.float64)
    solution = solve(bank.f, bank.z0, SOLVERS[solver], rtol=1e-10, atol=0, on_failure="raise")
    assert torch.allclose(solution.value, bank.solution, atol=1e-9)


def test_damping_is_the_textbook_step():
    bank = bank_problem("tanh", torch.float64)
    iterates = []

    def f(z):
        iterates.append(z.clone())
        return bank.f(z)

    solve(f, bank.z0, Picard(damping=0.25), rtol=None, atol=None, max_steps=2)
    assert torch.allclose(iterates[1], 0.75 * iterates[0] + 0.25 * bank.f(iterates[0]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_start_stops_at_once(solver):
    z0 = torch.randn(3, 4, dtype=torch.float64)
    solution = solve(lambda z: z, z0, SOLVERS[solver], on_failure="raise")
    assert solution.num_evals == 1
    assert torch.equal(solution.value, z0)
    assert (solution.residual == 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_size_zero_and_one(solver):
    for shape in ((0, 3), (1, 1), (2, 0)):
        solution = solve(lambda z: 0.5 * z + 1, torch.zeros(shape), SOLVERS[solver], on_failure="raise")
        assert solution.value.shape == shape
        assert solution.status.shape == shape[:1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_fixed_steps_are_exact_calls(solver):
    bank = bank_problem("tanh", torch.float64)
    for steps in (1, 2, 7):
        f = CountedMap(bank.f)
        solution = solve(f, bank.z0, SOLVERS[solver], rtol=None, atol=None, max_steps=steps)
        assert solution.num_evals == f.calls == steps
        assert solution.residual is None
        assert solution.history is None
        assert (solution.status == Status.UNTESTED).all()
        assert (solution.num_steps == steps).all()


def test_n_picard_steps_return_the_nth_result():
    bank = bank_problem("tanh", torch.float64)
    z = bank.z0
    for _ in range(5):
        z = bank.f(z)
    assert torch.equal(solve(bank.f, bank.z0, Picard(), rtol=None, atol=None, max_steps=5).value, z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_half_precision_states(solver, dtype):
    bank = bank_problem("linear 0.5", torch.float32)

    def f(z):
        assert z.dtype == dtype
        return bank.f(z.float()).to(dtype)

    eps = torch.finfo(dtype).eps
    solution = solve(f, bank.z0.to(dtype), SOLVERS[solver], rtol=4 * eps, atol=0, on_failure="raise")
    assert solution.value.dtype == dtype
    assert (solution.value.float() - bank.solution).norm() < 10 * eps * bank.solution.norm()


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
