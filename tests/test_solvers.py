"""What is known of single solvers: how many calls of the map they take, textbook steps, hyperparameters."""

import fractions

import numpy as np
import pytest
import torch
from solver_rows import CALLS_VARY, SOLVERS

from solvers import Anderson, Auto, Broyden, Picard, Squarem, Status, get_solver, solve
from solvers.linear import GMRES
from solvers.problem.replaced_tensors import with_tensors
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


@pytest.mark.parametrize("memory", [np.int64(3), np.int8(3), np.uint16(3)], ids=repr)
def test_integers_of_numpy_are_integers(memory):
    for given, plain in (
        (Anderson(memory=memory), Anderson(memory=3)),
        (Broyden(memory=memory), Broyden(memory=3)),
        (Auto(memory=memory), Auto(memory=3)),
        (GMRES(restart=memory), GMRES(restart=3)),
    ):
        assert given == plain
        assert hash(given) == hash(plain)
        assert repr(given) == repr(plain)
    bank = BANK["tanh"](torch.float32)
    steps = {"rtol": None, "atol": None, "max_steps": 8}
    value = solve(bank.f, bank.z0, Anderson(memory=memory), **steps).value
    assert torch.equal(value, solve(bank.f, bank.z0, Anderson(memory=3), **steps).value)
    assert solve(torch.cos, torch.ones(2, 3), batch_dims=np.int64(2), rtol=1e-4).status.shape == (2, 3)


@pytest.mark.parametrize(
    "damping", [*(kind(0.5) for kind in (np.float16, np.float32, np.float64)), fractions.Fraction(1, 2)]
)
@pytest.mark.parametrize("method", [Picard, Anderson, Broyden])
def test_numbers_of_other_types_are_numbers(method, damping):
    given, plain = method(damping=damping), method(damping=0.5)
    assert given == plain
    assert hash(given) == hash(plain)
    assert repr(given) == repr(plain)
    assert type(method(damping=1).damping) is float
    bank = BANK["tanh"](torch.float32)
    steps = {"rtol": None, "atol": None, "max_steps": 8}
    assert torch.equal(solve(bank.f, bank.z0, given, **steps).value, solve(bank.f, bank.z0, plain, **steps).value)


@pytest.mark.parametrize("bad", [True, np.True_, np.float64(3.0), "3", torch.tensor(3), 3 + 0j], ids=repr)
def test_what_is_no_integer_is_refused(bad):
    for solver in (Anderson, Broyden, Auto):
        with pytest.raises(ValueError, match=r"memory=...\) must be a positive integer"):
            solver(memory=bad)
    with pytest.raises(ValueError, match="batch_dims must be an integer"):
        solve(torch.cos, torch.ones(2, 3), batch_dims=bad)


@pytest.mark.parametrize("bad", [True, np.False_, np.float32(1.5), np.nan, "0.5", torch.tensor(0.5), None], ids=repr)
def test_what_is_no_damping_is_refused(bad):
    for solver in (Picard, Anderson, Broyden):
        with pytest.raises(ValueError, match=r"damping=...\) must be in \(0, 1\], got"):
            solver(damping=bad)


@pytest.mark.parametrize("name", ["torchdeq:anderson", "scipy:broyden1", "scipy:df-sane"])
def test_adapters_take_numbers_of_numpy(name):
    pytest.importorskip(name.partition(":")[0])
    assert get_solver(name, memory=np.int64(4)) == get_solver(name, memory=4)
    least = "positive integer" if name == "scipy:df-sane" else "integer >= 2"
    with pytest.raises(ValueError, match=f"memory=...\\) must be an? {least}.*got True"):
        get_solver(name, memory=True)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "solver",
    [
        Picard(damping=0.7),
        Anderson(memory=3, damping=0.7),
        Anderson(memory=3, least_squares="qr"),
        Broyden(memory=3, damping=0.7),
        Broyden(method="bad", line_search=True),
        *(Squarem(scheme=scheme) for scheme in ("S1", "S2", "S3")),
    ],
    ids=str,
)
def test_numbers_of_python_do_not_change_the_dtype(solver, dtype, default):
    """A state without dimensions and one entry, where PyTorch's promotion is at its most surprising."""

    def f(z):
        assert z.dtype == dtype
        return torch.cos(z)

    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        start = torch.ones((), dtype=dtype)
        solution = solve(f, start, solver, batch_dims=0, rtol=None, atol=None, max_steps=9)
        moved = solver.restarted(solution.state, torch.tensor([True]), start.view(1, 1), f(start).view(1, 1))
        dtypes = []
        with_tensors((moved, solver.step(f, moved)), lambda tensor: dtypes.append(tensor.dtype))
        assert set(dtypes) == {dtype}
    finally:
        torch.set_default_dtype(before)
    assert solution.value.dtype == dtype


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
