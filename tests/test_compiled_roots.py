"""compile=True for roots by Newton's method: its full steps in one graph, with the answers of eager mode."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_systems import kepler, orbits, system, systems
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.parametrizations import spectral_norm

from implicit import root
from solvers import NotCompiledWarning, Stopping, _compiled, solve_root
from solvers.testing import NONLINEAR

pytestmark = [
    pytest.mark.usefixtures("without_a_compiler", "double"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

FIELDS = ("value", "status", "residual", "change", "error_estimate", "num_steps")
TIGHT = Stopping(rtol=1e-10)


def both(f, z0, args=(), stopping=TIGHT, **options):
    """The solve in eager mode and compiled, of which no warning says that it was not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        options |= {"args": args, "stopping": stopping, "on_failure": "ignore"}
        solutions = [solve_root(f, z0, compile=compile, **options) for compile in (False, True)]
    assert not _compiled._refused
    return solutions


def assert_same(eager, compiled, rtol=1e-12, atol=1e-14):
    assert compiled.statuses() == eager.statuses()
    assert torch.equal(compiled.num_steps, eager.num_steps)
    torch.testing.assert_close(compiled.value, eager.value, rtol=rtol, atol=atol, equal_nan=True)
    # What is left of rounding errors has no digits.
    for field in ("residual", "change", "error_estimate"):
        one, other = getattr(compiled, field), getattr(eager, field)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("rtol", "chunk_size"),
    [pytest.param(1e-3, 64, marks=pytest.mark.long), (1e-8, None), pytest.param(1e-13, 150, marks=pytest.mark.long)],
)
def test_kepler(rtol, chunk_size):
    z0, *args = orbits(200)
    eager, compiled = both(kepler, z0, tuple(args), Stopping(rtol=rtol), chunk_size=chunk_size)
    assert eager.converged.all()
    assert_same(eager, compiled)


@pytest.mark.long
@pytest.mark.parametrize("max_steps", [1, 2, 6, 50])
def test_few_steps_and_shorter_ones(max_steps):
    """Samples that full steps do not solve go on as in eager mode: to the limit, or by steps that are not full."""
    z0, eccentricity, mean = orbits(100, seed=1)
    eager, compiled = both(kepler, 3 * z0 - 9, (eccentricity, mean), Stopping(rtol=1e-9, max_steps=max_steps))
    assert_same(eager, compiled)
    assert len(eager.status.unique()) == (2 if max_steps == 6 else 1)


@pytest.mark.long
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 4),
    exponent=st.integers(-40, 40),
    of_f=st.integers(-40, 40),
    norm=st.sampled_from(["rms", "max", "l2"]),
    atol=st.sampled_from([None, 0.0, 1e-6]),
)
def test_random_systems(seed, size, exponent, of_f, norm, atol):
    """Among them systems without a root, with singular slopes, and starts that are roots."""
    unit, (z0, args) = torch.tensor(2.0**exponent), systems(seed, size)
    stopping = Stopping(rtol=1e-9, max_steps=15, norm=norm, **({} if atol is None else {"atol": atol}))
    eager, compiled = both(system, unit * z0, (*args, unit, torch.tensor(2.0**of_f)), stopping)
    assert compiled.statuses() == eager.statuses()
    assert torch.equal(compiled.num_steps, eager.num_steps)
    torch.testing.assert_close(compiled.value / unit, eager.value / unit, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in sorted(NONLINEAR)[::3]])
def test_classical_systems(name):
    problem = NONLINEAR[name]
    z0 = problem.x0 * torch.tensor([[1.0], [1.1], [0.9], [10.0]])
    eager, compiled = both(problem.F, z0)
    assert compiled.statuses() == eager.statuses()
    assert torch.equal(compiled.num_steps, eager.num_steps)
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.long
def test_pytrees_and_dimensions_of_a_problem():
    z0, eccentricity, mean = orbits(24)

    def f(z, x):
        return {"a": kepler(z["a"], eccentricity, x), "b": 2 * z["b"] - z["a"].unsqueeze(1).sin()}

    eager, compiled = both(f, {"a": z0, "b": torch.zeros(24, 3)}, (mean,))
    assert compiled.statuses() == eager.statuses()
    for leaf in "ab":
        torch.testing.assert_close(compiled.value[leaf], eager.value[leaf])
    eccentricity, mean = eccentricity.view(2, 3, 4), mean.view(2, 3, 4)
    for batch_dims in (0, 2):
        eager, compiled = both(kepler, z0.view(2, 3, 4), (eccentricity, mean), batch_dims=batch_dims)
        assert_same(eager, compiled)
        assert compiled.status.shape == (2, 3, 4)[:batch_dims]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    """Steps may differ by one, where rounding decides."""
    z0, eccentricity, mean = (x.to(dtype) for x in orbits(50))
    eager, compiled = both(kepler, z0, (0.7 * eccentricity, mean), Stopping(rtol=1e-3 if dtype.itemsize == 4 else 0.1))
    assert compiled.value.dtype == dtype
    assert compiled.statuses() == eager.statuses()
    assert (compiled.num_steps - eager.num_steps).abs().max() <= 1
    torch.testing.assert_close(compiled.value, eager.value, rtol=0.1, atol=0.02)


def test_other_data_tolerances_and_limits_need_no_other_graph():
    for number, seed, rtol, max_steps in ((20, 0, 1e-8, 50), (20, 1, 1e-12, 50), (20, 2, 1e-3, 9)):
        z0, *args = orbits(number, seed)
        both(kepler, z0, tuple(args), Stopping(rtol=rtol, max_steps=max_steps))
        assert counters["stats"]["unique_graphs"] == 1
    for number in (21, 40, 7):  # the second size makes the batch dynamic
        z0, *args = orbits(number)
        both(kepler, z0, tuple(args))
    assert counters["stats"]["unique_graphs"] == 2


def power(z, exponent, factor):
    return z**exponent - factor


@pytest.mark.long
def test_python_numbers_are_taken_for_what_they_are():
    """Those of every solve, not those of the first one; and the way in which PyTorch takes them elsewhere stays."""
    before = {name: getattr(torch._dynamo.config, name) for name in _compiled._SETTINGS}
    for exponent, factor in ((2, 2.0), (2, 3.0), (3, 3.0), (2, 5)):
        _, compiled = both(power, torch.ones(3), (exponent, factor))
        torch.testing.assert_close(compiled.value, torch.full((3,), factor ** (1 / exponent)))
    assert {name: getattr(torch._dynamo.config, name) for name in before} == before


class Equation(nn.Module):
    """``z + tanh(W z) - x`` with a normalized W."""

    def __init__(self):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(3, 3))

    def forward(self, z, x):
        return z + torch.tanh(self.linear(z)) - x


@pytest.mark.parametrize("training", [False, True])
def test_modules_have_the_gradients_of_eager_mode(training):
    """And the buffers, which the power iteration of spectral norm changes once a pass."""
    maps = [Equation().train(training) for _ in range(2)]
    maps[1].load_state_dict(maps[0].state_dict())
    for _ in range(2):
        x = torch.randn(4, 3, requires_grad=True)
        found = []
        for f, compile in zip(maps, (False, True), strict=True):
            z = root(f, torch.zeros(4, 3), x, compile=compile)
            found.append([z, *torch.autograd.grad(z.sin().sum(), [x, *f.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        for a, b in zip(maps[0].buffers(), maps[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert not _compiled._refused


@pytest.mark.long
def test_derivatives_of_two_orders_in_parts():
    z0, eccentricity, mean = orbits(6)
    inputs = eccentricity.requires_grad_(), mean.requires_grad_()

    def solved(*inputs):
        return root(kepler, z0, *inputs, rtol=1e-12, chunk_size=4, compile=True)

    assert torch.autograd.gradcheck(solved, inputs)
    assert torch.autograd.gradgradcheck(solved, inputs)
    assert not _compiled._refused


def decides(z, x):
    return z**3 - x if float(x.detach().sum()) > -1e9 else z


def test_what_cannot_be_traced_runs_step_by_step_and_says_so_once():
    x = torch.tensor([2.0, 3.0])
    with pytest.warns(NotCompiledWarning, match="could not be compiled"):
        first = solve_root(decides, torch.ones(2), args=(x,), compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = solve_root(decides, torch.ones(2), args=(x,), compile=True)
    eager = solve_root(decides, torch.ones(2), args=(x,))
    for solution in (first, second):
        assert all(torch.equal(getattr(solution, field), getattr(eager, field)) for field in FIELDS)


@pytest.mark.parametrize(
    "options", [{"stopping": Stopping(rtol=1e-8, check_every=2)}, {"stopping": Stopping(rtol={"a": 1e-8})}]
)
def test_what_full_steps_do_not_serve_says_so(options):
    with pytest.warns(NotCompiledWarning, match="Newton has one for roots, if all leaves have one tolerance"):
        solution = solve_root(lambda z: {"a": z["a"] ** 2 - 2}, {"a": torch.ones(3)}, compile=True, **options)
    assert solution.converged.all()


def test_errors_are_those_of_eager_mode():
    z0, *args = orbits(4)
    with pytest.raises(ValueError, match="shape"):
        solve_root(lambda z: z[:2], z0, compile=True)
    with pytest.raises(TypeError, match="compile must be True or False, got 'yes'"):
        solve_root(kepler, z0, args=tuple(args), compile="yes")
    with pytest.raises(ValueError, match="compact=True takes samples out of the batch"):
        solve_root(kepler, z0, args=tuple(args), compact=True, compile=True)
    with pytest.raises(RuntimeError, match="of my own"):
        solve_root(fails, z0, compile=True)
    empty = solve_root(kepler, z0[:0], args=(args[0][:0], args[1][:0]), compile=True)
    assert empty.value.shape == (0,)


def fails(z):
    raise RuntimeError("of my own")


@pytest.mark.long
def test_solvers_with_a_loop_of_their_own_go_in_parts():
    x = torch.tensor([[2.0], [3.0], [5.0], [7.0]]) * torch.linspace(1, 2, 40)
    options = {"solver": "anderson", "args": (x,), "chunk_size": 2, "stopping": Stopping(rtol=1e-9)}
    eager, compiled = both(lambda z, x: z**3 - x, torch.ones_like(x), **options)
    assert_same(eager, compiled, rtol=1e-8)


@pytest.mark.long
def test_inductor(monkeypatch):
    """The real compiler, with chunks of two sizes, and numbers that differ."""
    monkeypatch.setattr(_compiled, "BACKEND", "inductor")
    z0, *args = orbits(200)
    assert_same(*both(kepler, z0, tuple(args), Stopping(rtol=1e-10), chunk_size=64))
    z0, args = systems(0, 3, number=50)
    for unit in (1.0, 10.0):
        eager, compiled = both(system, unit * z0, (*args, unit, 1.0))
        assert compiled.statuses() == eager.statuses()
        torch.testing.assert_close(compiled.value, eager.value, rtol=1e-8, atol=1e-8, equal_nan=True)
