"""compile=True: the statuses, steps, values and gradients of solves that run step by step."""

import math
import warnings

import pytest
import torch
from compiling_warnings import COMPILING_WARNINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from tanh_map import TanhMap
from torch import nn
from torch._dynamo.utils import counters

from implicit import FixedPointLayer, fixed_point, root
from solvers import Anderson, Broyden, Newton, NotCompiledWarning, Picard, Status, Steps, Stopping, _compiled, solve

pytestmark = [
    pytest.mark.usefixtures("without_a_compiler"),
    COMPILING_WARNINGS,
]

SOLVERS = {
    "picard": Picard(),
    "damped": Picard(damping=0.6),
    "anderson": Anderson(memory=3),
    "qr": Anderson(memory=3, damping=0.8, least_squares="qr"),
    "broyden": Broyden(),
    "bad broyden": Broyden(method="bad"),
}


def graphs():
    return counters["stats"]["unique_graphs"]


def both(f, z0, solver, **options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        return [solve(f, z0, solver, on_failure="ignore", compile=compile, **options) for compile in (False, True)]


def firm(eager, f, z0, solver, **options):
    """Which samples end alike from starts that rounding moves; where not, their steps are chaotic."""
    same = torch.ones_like(eager.converged)
    for _ in range(3):
        start = z0 + 1e-15 * (z0.abs().amax() + 1) * torch.randn_like(z0)
        moved = solve(f, start, solver, on_failure="ignore", **options)
        same &= (moved.status == eager.status) & (moved.num_steps == eager.num_steps)
    return same


def assert_equal(eager, compiled, *, steps_apart=0, where=None):
    where = torch.ones_like(eager.converged) if where is None else where
    assert compiled.status[where].tolist() == eager.status[where].tolist()
    assert (compiled.num_steps - eager.num_steps)[where].abs().max() <= steps_apart
    if where.all() and not steps_apart:
        assert compiled.num_evals == eager.num_evals
    ended = eager.converged & where
    eps = torch.finfo(eager.value.dtype).eps ** 0.5
    torch.testing.assert_close(compiled.value[ended], eager.value[ended], rtol=eps, atol=eps)
    estimate = eager.error_estimate[ended], compiled.error_estimate[ended]
    torch.testing.assert_close(*estimate, rtol=1e-2, atol=1e-6, equal_nan=True)


def affine(z, rate, shift):
    return rate * z.flip(1) + shift


def logarithm(z, rate, shift):
    return rate * torch.log(z) + 2 + shift.abs()


def sine(z, rate, shift):
    return rate * torch.sin(z) + shift


# Rates of samples that converge fast and slowly, cycle, run away, and are not finite.
RATES = [0.1, 0.5, 0.9, 0.97, -0.6, -1.0, 1.0, 1.02, 3.0, math.inf, math.nan]
STOPPINGS = {
    "loose": Stopping(rtol=1e-3, max_steps=60),
    "tight": Stopping(rtol=1e-14, atol=0, max_steps=90, patience=20),
    "now and then": Stopping(rtol=1e-6, norm="max", check_every=3, max_steps=60),
}


CASES = {
    **{(name, "tight"): logarithm for name in ("picard", "anderson", "broyden", "bad broyden")},
    **{(name, "now and then"): affine for name in ("damped", "qr", "broyden")},
    ("picard", "loose"): affine,
    ("anderson", "loose"): logarithm,
}


@pytest.mark.parametrize(
    ("name", "stopping"),
    [
        pytest.param(
            *case, marks=() if case in {("anderson", "tight"), ("damped", "now and then")} else pytest.mark.long
        )
        for case in CASES
    ],
)
def test_samples_end_alike(name, stopping, double):
    """Mixtures of samples that converge, diverge, stagnate, are taken back and are not finite."""
    f = CASES[name, stopping]
    rate = torch.tensor(RATES).unsqueeze(1)
    shift = torch.randn(len(RATES), 6)
    problem = f, torch.full_like(shift, 0.3), SOLVERS[name]
    options = {"args": (rate, shift), "stopping": STOPPINGS[stopping]}
    eager, compiled = both(*problem, **options)
    where = firm(eager, *problem, **options)
    assert where.sum() > len(RATES) // 2
    assert len(eager.status[where].unique()) > 1
    assert_equal(eager, compiled, where=where)
    assert not _compiled._refused


@pytest.mark.long
@pytest.mark.parametrize("name", ["picard", "anderson", pytest.param("broyden", marks=pytest.mark.long)])
@settings(max_examples=8)
@given(data=st.data())
def test_random_maps(name, data):
    number = st.floats(-2.5, 2.5, allow_subnormal=False)
    rates = data.draw(st.lists(st.one_of(number, st.sampled_from(RATES)), min_size=4, max_size=4))
    f = data.draw(st.sampled_from([affine, sine]))
    scale = 10.0 ** data.draw(st.integers(-8, 8))
    dtype = torch.float64
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    shift = scale * torch.randn(4, 6, dtype=dtype, generator=generator)
    rate = torch.tensor(rates, dtype=dtype).unsqueeze(1)
    stopping = Stopping(rtol=data.draw(st.sampled_from([1e-3, 1e-6])), max_steps=40, patience=15)
    problem, options = (f, torch.zeros_like(shift), SOLVERS[name]), {"args": (rate, shift), "stopping": stopping}
    eager, compiled = both(*problem, **options)
    where = firm(eager, *problem, **options)
    assert compiled.status[where].tolist() == eager.status[where].tolist()
    assert compiled.num_steps[where].tolist() == eager.num_steps[where].tolist()
    solved = where & eager.converged
    torch.testing.assert_close(compiled.value[solved], eager.value[solved], rtol=1e-5, atol=1e-5 * scale)
    assert not _compiled._refused


@pytest.mark.parametrize(
    "name",
    [pytest.param("picard", marks=pytest.mark.long), "anderson", pytest.param("broyden", marks=pytest.mark.long)],
)
def test_single_precision_ends_within_two_steps(name):
    rate = torch.linspace(-0.9, 0.9, 16).unsqueeze(1)
    eager, compiled = both(sine, torch.zeros(16, 40), SOLVERS[name], args=(rate, torch.randn(16, 40)), rtol=1e-5)
    assert_equal(eager, compiled, steps_apart=2)


@pytest.mark.long
def test_more_entries_than_the_secant_takes(double):
    rate = torch.linspace(-0.9, 0.9, 4).unsqueeze(1)
    eager, compiled = both(sine, torch.zeros(4, 300), Anderson(), args=(rate, torch.randn(4, 300)), rtol=1e-8)
    assert_equal(eager, compiled)


@pytest.mark.long
def test_pytrees_batch_dims_and_tolerances_of_leaves(double):
    def f(z, x):
        return {"a": 0.5 * torch.tanh(z["b"]) + x, "b": 0.4 * z["a"].cos()}

    z0 = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 3, 4)}
    x = torch.randn(2, 3, 4)
    for options in ({"batch_dims": 2}, {"batch_dims": 0}, {"rtol": {"a": 1e-3, "b": 1e-8}, "norm": "max"}):
        norm = {"stopping": Stopping(norm=options.pop("norm"), rtol=options.pop("rtol"))} if "norm" in options else {}
        with torch.no_grad():
            eager, compiled = (solve(f, z0, args=(x,), compile=c, **options, **norm) for c in (False, True))
        assert torch.equal(eager.status, compiled.status)
        assert torch.equal(eager.num_steps, compiled.num_steps)
        torch.testing.assert_close(compiled.value, eager.value)
    assert not _compiled._refused


@pytest.mark.long
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.long),
        torch.float32,
        pytest.param(torch.float64, marks=pytest.mark.long),
    ],
)
def test_dtypes_and_autocast(dtype):
    linear = nn.Linear(4, 4).to(dtype)
    x = torch.randn(3, 4, dtype=dtype)

    def f(z, x):
        return 0.5 * torch.tanh(linear(z)) + x

    eager, compiled = both(f, torch.zeros_like(x), "picard", args=(x,), rtol=1e-2)
    assert compiled.value.dtype == dtype
    assert_equal(eager, compiled)
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            eager, compiled = both(f, torch.zeros_like(x), "picard", args=(x,), rtol=1e-2)
        assert_equal(eager, compiled)
    assert not _compiled._refused


@pytest.mark.long
def test_new_data_modules_tolerances_and_limits_do_not_compile_again():
    def call(size, rtol, max_steps):
        layer = FixedPointLayer(TanhMap(), compile=True, on_failure="ignore")
        with torch.no_grad():
            layer(torch.randn(size, 3), rtol=rtol, max_steps=max_steps)
        scale = torch.randn(3)  # a tensor in a closure
        solve(lambda z: 0.1 * z * scale + 1, torch.zeros(size, 3), rtol=rtol, max_steps=max_steps, compile=True)

    call(4, 1e-4, 50)
    assert graphs() == 2
    for rtol, max_steps in ((1e-2, 50), (1e-6, 7), (1e-5, 300)):
        call(4, rtol, max_steps)
    assert graphs() == 2
    for size in (5, 9, 13, 2):  # the second size makes the batch dynamic
        call(size, 1e-4, 50)
    assert graphs() == 4
    assert not _compiled._refused


@pytest.mark.long
def test_a_number_in_a_closure_is_not_taken_for_another():
    for number in (1.0, 2.0, -3.0):
        solution = solve(lambda z, number=number: 0.5 * z + number, torch.zeros(2, 3), rtol=1e-6, compile=True)
        torch.testing.assert_close(solution.value, torch.full((2, 3), 2 * number), rtol=1e-5, atol=0)


# Names like those of code whose guards are left out.
dataclasses, _pytree = 1.0, 0.0


@pytest.mark.long
def test_a_number_in_a_module_is_not_taken_for_another(monkeypatch):
    for number in (1.0, 2.0, -3.0):
        monkeypatch.setitem(globals(), "dataclasses", 3 * number)
        monkeypatch.setitem(globals(), "_pytree", 2 * number)
        solution = solve(lambda z: 0.5 * z + dataclasses - _pytree, torch.zeros(2, 3), rtol=1e-6, compile=True)
        torch.testing.assert_close(solution.value, torch.full((2, 3), 2 * number), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.long)])
def test_layers_have_the_gradients_of_eager_mode(norm, training):
    maps = [TanhMap(norm).train(training) for _ in range(2)]
    maps[1].load_state_dict(maps[0].state_dict())
    layers = [FixedPointLayer(f, rtol=1e-6, compile=compile) for f, compile in zip(maps, (False, True), strict=True)]
    for _ in range(2):
        x = torch.randn(4, 3, requires_grad=True)
        found = []
        for layer in layers:
            z, solution = layer(x, return_solution=True)
            found.append([z, *torch.autograd.grad(z.sin().sum(), [x, *layer.parameters()])])
            assert solution.adjoint.converged.all()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(maps[0].buffers(), maps[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(layers[1](x), layers[0](x))
    assert not _compiled._refused
    assert "compile=True" in repr(layers[1])


@pytest.mark.long
def test_every_order_of_derivative(double):
    w = (torch.randn(3, 3) / 6).requires_grad_()
    x = torch.randn(2, 3)

    def solved(w, compile=True):
        return fixed_point(lambda z, w: torch.tanh(z @ w + x), x, w, rtol=1e-10, compile=compile)

    assert torch.autograd.gradcheck(solved, (w,))
    first, second = (torch.func.hessian(lambda w, c=c: solved(w, c).sum())(w.detach()) for c in (False, True))
    torch.testing.assert_close(first, second)


@pytest.mark.long
@pytest.mark.parametrize("solver", [pytest.param("anderson", marks=pytest.mark.long), "broyden"])
def test_roots(solver, double):
    x = (torch.tensor([[2.0], [3.0], [-5.0]]) * torch.linspace(1, 2, 40)).requires_grad_()
    found = []
    for compile in (False, True):
        options = {"solver": solver, "rtol": 1e-9, "return_solution": True, "compile": compile}
        z, solution = root(lambda z, x: z**3 - x, x.detach().sign(), x, **options)
        found.append((z, solution, *torch.autograd.grad(z.sum(), x)))
    (z, solution, gradient), (other, other_solution, other_gradient) = found
    assert solution.num_evals == other_solution.num_evals
    assert solution.num_steps.tolist() == other_solution.num_steps.tolist()
    torch.testing.assert_close(z, other)
    torch.testing.assert_close(gradient, other_gradient)


def test_roots_that_newton_confirms_run_step_by_step_and_say_so():
    x = torch.tensor([[2.0], [3.0]])
    with pytest.warns(NotCompiledWarning, match="so few unknowns are confirmed by Newton's step"):
        z = root(lambda z, x: z**3 - x, torch.ones(2, 1), x, solver="anderson", compile=True)
    torch.testing.assert_close(z, root(lambda z, x: z**3 - x, torch.ones(2, 1), x, solver="anderson"))


def decides(z, x):
    return z if float(z.detach().sum()) > 1e9 else 0.5 * torch.tanh(z) + x


def test_a_map_that_cannot_be_traced_runs_step_by_step_and_says_so_once():
    x = torch.ones(2, 3)
    with pytest.warns(NotCompiledWarning, match="could not be compiled: .*\n.*decide in"):
        first = solve(decides, torch.zeros(2, 3), args=(x,), compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = solve(decides, torch.zeros(2, 3), args=(x,), compile=True)
    eager = solve(decides, torch.zeros(2, 3), args=(x,))
    assert torch.equal(first.value, eager.value)
    assert torch.equal(second.value, eager.value)
    assert first.num_evals == eager.num_evals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": Newton()}, "Newton.* has no form whose tensors keep their shapes"),
        ({"solver": Broyden(memory=3)}, "Broyden without a limited memory"),
        ({"stopping": Steps(3)}, "a fixed number of steps"),
    ],
    ids=["newton", "limited", "steps"],
)
def test_what_has_no_compiled_form_says_so(options, message):
    with pytest.warns(NotCompiledWarning, match=message):
        solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), compile=True, **options)


def test_recorded_steps_say_so():
    w = torch.randn(3, requires_grad=True)
    with pytest.warns(NotCompiledWarning, match="gradients are recorded through its steps"):
        z = fixed_point(lambda z, w: 0.1 * z * w + 1, torch.zeros(2, 3), w, compile=True, backward="unrolled")
    z.sum().backward()
    assert w.grad is not None


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="compact=True takes samples out .* leave one of them out"):
        solve(torch.cos, torch.zeros(2, 3), compact=True, compile=True)
    with pytest.raises(ValueError, match="compact=True takes samples out"):
        FixedPointLayer(torch.cos, compact=True, compile=True)
    with pytest.raises(TypeError, match="compile must be True or False, got 'yes'"):
        fixed_point(torch.cos, torch.zeros(2, 3), compile="yes")


def test_failures_are_reported():
    with pytest.raises(RuntimeError, match="did not converge .*\n.*DIVERGED"):
        solve(lambda z: 3 * z + 1, torch.zeros(2, 3), "picard", compile=True, on_failure="raise")


def test_large_states_run_step_by_step(monkeypatch):
    monkeypatch.setattr(_compiled, "MOST_BYTES", 40)
    for shape, number in (((2, 6), 0), ((1, 9), 1), ((20, 1), 2)):  # of one unknown, large ones are compiled as well
        solution = solve(lambda z: 0.5 * z + 1, torch.zeros(shape), compile=True)
        assert solution.converged.all()
        assert graphs() == number


def test_an_empty_batch():
    solution = solve(lambda z: 0.5 * z + 1, torch.zeros(0, 3), compile=True)
    assert solution.value.shape == (0, 3)


def test_a_record_of_the_residuals_is_kept_step_by_step():
    solution = solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), "picard", history=True, compile=True)
    assert solution.history.shape == (int(solution.num_steps.max()), 2)


@pytest.mark.long
@pytest.mark.parametrize("name", ["picard", "anderson", "broyden"])
def test_inductor(name, monkeypatch):
    monkeypatch.setattr(_compiled, "BACKEND", "inductor")
    rate = torch.tensor(RATES).unsqueeze(1)
    for size in (6, 40) if name == "anderson" else (40,):
        shift = torch.randn(len(RATES), size)
        eager, compiled = both(sine, torch.full_like(shift, 0.3), SOLVERS[name], args=(rate, shift), rtol=1e-4)
        assert compiled.status.tolist() == eager.status.tolist()
        assert (compiled.num_steps - eager.num_steps).abs().max() <= 2
        assert Status.NONFINITE in compiled.status
    assert not _compiled._refused
