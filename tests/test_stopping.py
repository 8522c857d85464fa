"""When samples stop: norms, tolerances for each leaf, the precision floor, and what is known of the error."""

import math

import pytest
import torch

from implicit import FixedPointLayer, fixed_point
from solvers import Anderson, Broyden, Picard, Status, Stopping, solve
from solvers.testing import BANK

NORMS = {
    "rms": lambda x: x.square().mean(1).sqrt(),
    "max": lambda x: x.abs().amax(1),
    "l2": lambda x: x.norm(dim=1),
}


def first_step_within(f, z, measure, rtol, atol, most=500):
    """The step at which Picard iteration meets a tolerance, computed the long way."""
    for step in range(1, most):
        fz = f(z)
        if measure(fz - z) <= atol + rtol * measure(fz):
            return step, fz
        z = fz
    raise AssertionError("not met")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("rtol", "atol"), [(1e-6, 0.0), (0.0, 1e-6), (1e-7, 1e-5)])
def test_each_norm_is_the_one_that_it_says(norm, rtol, atol):
    problem = BANK["linear 0.9"](torch.float64)
    stopping = Stopping(rtol=rtol, atol=atol, norm=norm)
    solution = solve(problem.f, problem.z0, Picard(), stopping=stopping, max_steps=500, on_failure="raise")
    a_row = problem.f(torch.zeros_like(problem.z0))
    for row in (0, 17, 63):
        step, value = first_step_within(
            lambda z, row=row: problem.f(z.expand_as(a_row))[row : row + 1],
            problem.z0[row : row + 1],
            NORMS[norm],
            rtol,
            atol,
        )
        assert int(solution.num_steps[row]) == step
        assert torch.allclose(solution.value[row : row + 1], value, rtol=1e-12)
    assert solution.residual.tolist() == pytest.approx((solution.change / NORMS[norm](solution.value)).tolist())


def two_speeds(z):
    return {"slow": 0.9 * z["slow"] + 1, "fast": [0.1 * z["fast"][0] + 1]}


def two_starts(dtype=torch.float64):
    return {"slow": torch.zeros(3, 2, dtype=dtype), "fast": [torch.zeros(3, dtype=dtype)]}


@pytest.mark.parametrize("norm", ["rms", "max", "l2"])
def test_each_leaf_meets_its_own_tolerance(norm):
    """Picard steps k from zero: the residual of a leaf is rate^(k - 1) (1 - rate) / (1 - rate^k)."""

    def first(rate, tolerance):
        return next(k for k in range(1, 999) if rate ** (k - 1) * (1 - rate) <= tolerance * (1 - rate**k))

    for slow, fast in ((1e-2, 1e-12), (1e-8, 1e-2), (1e-3, 1e-3)):
        solution = solve(
            two_speeds,
            two_starts(),
            Picard(),
            stopping=Stopping(rtol={"slow": slow, "fast": [fast]}, atol=0.0, norm=norm),
            max_steps=500,
        )
        assert solution.num_steps.tolist() == [max(first(0.9, slow), first(0.1, fast))] * 3


def test_absolute_tolerances_of_leaves_do_not_depend_on_their_size():
    def steps(size, norm):
        stopping = Stopping(rtol=0.0, atol={"a": 1e-3, "b": 1e-6}, norm=norm)
        state = {"a": torch.zeros(1, size), "b": torch.zeros(1, 1)}
        return int(
            solve(
                lambda z: {"a": 0.5 * z["a"] + 1, "b": 0.1 * z["b"] + 1}, state, Picard(), stopping=stopping
            ).num_steps
        )

    assert steps(1, "rms") == steps(400, "rms") == steps(400, "max")
    assert steps(400, "l2") > steps(1, "l2")


def test_tolerances_of_leaves_without_an_object():
    whole = solve(two_speeds, two_starts(), Picard(), rtol=1e-3, max_steps=500)
    leaves = solve(two_speeds, two_starts(), Picard(), rtol={"slow": 1e-8, "fast": [None]}, atol=0, max_steps=500)
    assert leaves.num_steps.min() > whole.num_steps.max()
    # The leaf with a tolerance of zero has come to its last bit.
    assert torch.equal(leaves.value["fast"][0], 0.1 * leaves.value["fast"][0] + 1)
    z = fixed_point(two_speeds, two_starts(), rtol={"slow": 1e-8, "fast": [1e-8]}, atol=0, on_failure="raise")
    assert torch.allclose(z["slow"], torch.full_like(z["slow"], 10.0))


@pytest.mark.parametrize("norm", ["rms", "max", "l2"])
def test_a_leaf_that_is_nan_or_infinite_is_never_within_its_tolerance(norm):
    def f(z):
        return {"a": 0.5 * z["a"] + 1, "b": z["b"] * torch.tensor([[1.0], [math.nan], [math.inf]])}

    state = {"a": torch.zeros(3, 2), "b": torch.ones(3, 1)}
    stopping = Stopping(rtol={"a": 1e-3, "b": 1e3}, norm=norm)
    solution = solve(f, state, Picard(), stopping=stopping, on_failure="ignore")
    assert [Status(int(s)).name for s in solution.status] == ["CONVERGED", "NONFINITE", "NONFINITE"]


def test_tolerances_of_leaves_and_compaction():
    def f(z, rate):
        return {"a": rate * z["a"] + 1, "b": 0.5 * rate * z["b"] + 1}

    rate = torch.linspace(0.1, 0.9, 8, dtype=torch.float64).unsqueeze(1)
    state = {name: torch.zeros(8, 2, dtype=torch.float64) for name in "ab"}
    options = {"args": (rate,), "stopping": Stopping(rtol={"a": 1e-4, "b": 1e-9}), "max_steps": 300}
    plain, compact = (solve(f, state, Picard(), compact=compact, **options) for compact in (False, True))
    for name in ("status", "num_steps", "residual", "change", "error_estimate"):
        assert torch.equal(getattr(plain, name), getattr(compact, name)), name
    assert torch.equal(plain.value["a"], compact.value["a"])


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(memory=20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_precision_floor_has_its_own_status(solver, dtype):
    eps = torch.finfo(dtype).eps
    problem = BANK["tanh"](dtype if dtype != torch.bfloat16 else torch.float32)

    def f(z):
        return problem.f(z.to(problem.z0.dtype)).to(dtype)

    z0 = problem.z0.to(dtype)
    solution = solve(f, z0, solver, rtol=1e-3 * eps, atol=0, max_steps=300, on_failure="ignore")
    # A few samples may happen on a point that the map returns bit for bit.
    assert set(solution.status.tolist()) <= {Status.PRECISION_FLOOR, Status.CONVERGED}
    assert (solution.status == Status.PRECISION_FLOOR).any()
    assert (solution.residual <= 8 * eps).all()
    assert solution.num_evals < 150
    assert "as good as the dtype allows" in solution.summary()


def test_autocast_has_the_floor_of_its_own_dtype():
    weight = torch.randn(32, 32) / 12
    x = torch.randn(4, 32)

    def f(z):
        return torch.nn.functional.linear(z, weight).float() + x + 1e-3 * torch.sin(1e4 * z)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(f, x, Picard(), rtol=1e-6, atol=0, max_steps=300, on_failure="ignore")
    assert (solution.status == Status.PRECISION_FLOOR).all()
    assert solution.num_evals < 100


def test_patience_and_growth_can_be_set():
    planes = BANK["planes"](torch.float64)
    for patience in (5, 30):
        stopping = Stopping(rtol=1e-8, patience=patience)
        solution = solve(planes.f, planes.z0, Picard(), stopping=stopping, max_steps=400, on_failure="ignore")
        best = solution.num_steps - patience
        assert Status(int(solution.status)) is Status.STAGNATED
        assert 1 <= int(best) < 60
    for growth in (10.0, 1e3):
        stopping = Stopping(max_growth=growth)
        solution = solve(
            lambda z: 2 * z + 1, torch.zeros(1, 1), Picard(), stopping=stopping, max_steps=400, on_failure="ignore"
        )
        assert Status(int(solution.status)) is Status.DIVERGED
        # From 0, the k-th image is 2^k - 1 and the k-th error 2^(k - 1); at the start they are 1 and 1.
        assert int(solution.num_steps) == math.floor(math.log2(2 * growth)) + 2


@pytest.mark.parametrize(
    "name",
    [
        "linear 0.5",
        "linear 0.9",
        "linear 0.99",
        "tanh",
        pytest.param("imlp", marks=pytest.mark.long),
        "H-equation",
        "cos",
    ],
)
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=["picard", "anderson", "broyden"])
def test_the_error_estimate_is_of_the_size_of_the_error(name, solver):
    problem = BANK[name](torch.float64)
    solution = solve(problem.f, problem.z0, solver, rtol=1e-5, atol=0, max_steps=2000, on_failure="raise")
    error = NORMS["rms"](solution.value - problem.solution)
    ratio = (solution.error_estimate / error).log().mean().exp()
    assert 1 / 8 < float(ratio) < 8


def test_the_error_estimate_of_one_dimension_is_exact():
    rate = torch.tensor([[0.5], [-0.5], [0.99], [-2.0]], dtype=torch.float64)
    solution = solve(
        lambda z: rate * z + 1, torch.zeros_like(rate), Picard(), rtol=1e-3, max_steps=40, on_failure="ignore"
    )
    error = (solution.value - 1 / (1 - rate)).abs().squeeze(1)
    assert solution.error_estimate.tolist() == pytest.approx(error.tolist(), rel=1e-6)


def test_what_is_known_of_the_error_after_one_step():
    solution = solve(lambda z: torch.stack((z[0], z[1] + 1)), torch.ones(2, 3), max_steps=1, on_failure="ignore")
    assert solution.error_estimate.tolist() == pytest.approx([0.0, math.nan], nan_ok=True)
    fixed = solve(torch.cos, torch.ones(2, 3), rtol=None, atol=None, history=True)
    assert fixed.error_estimate is None
    assert fixed.change is not None


def test_gradients_flow_to_samples_that_stop_one_after_the_other():
    """A sample that stops while others go on keeps its history, whenever its value is put together."""
    rate = torch.linspace(0.05, 0.9, 12, dtype=torch.float64).unsqueeze(1)
    shift = torch.ones(12, 3, dtype=torch.float64, requires_grad=True)
    solution = solve(
        lambda z: rate * z + shift, torch.zeros(12, 3, dtype=torch.float64), Picard(), rtol=1e-8, max_steps=400
    )
    (gradient,) = torch.autograd.grad(solution.value.sum(), shift)
    steps = solution.num_steps.unsqueeze(1)
    assert torch.allclose(gradient, ((1 - rate**steps) / (1 - rate)).expand(12, 3), rtol=1e-12)


BAD_STOPPING = [
    ({"norm": "l1"}, ValueError, '"rms", "max" or "l2", got \'l1\''),
    ({"rtol": -1.0}, ValueError, "rtol must be a number >= 0 or None"),
    ({"atol": {"a": "small"}}, ValueError, "atol must be a number >= 0 or None, or a pytree of such, got 'small'"),
    ({"patience": 0}, ValueError, "Stopping\\(patience=...\\) must be a positive integer"),
    ({"max_growth": 1.0}, ValueError, "must be a number > 1"),
    ({"tol": 1e-3}, TypeError, "no option 'tol'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_STOPPING, ids=lambda value: str(value)[:20])
def test_unfit_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Stopping(**options)


def test_unfit_combinations_are_named():
    z0 = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="not to both: got rtol=0.1"):
        solve(torch.cos, z0, stopping=Stopping(), rtol=0.1)
    with pytest.raises(TypeError, match="must be a solvers.Stopping or None, got 0.1"):
        solve(torch.cos, z0, stopping=0.1)
    with pytest.raises(ValueError, match="rtol must be a number or have the structure of the state"):
        solve(torch.cos, z0, rtol={"a": 1e-3})
    with pytest.raises(ValueError, match="not to both"):
        FixedPointLayer(torch.cos, stopping=Stopping(), atol=0.0)


def test_a_layer_takes_a_stopping():
    layer = FixedPointLayer(lambda z, x: 0.5 * z + x, solver="picard", stopping=Stopping(rtol=1e-2, norm="max"))
    z, solution = layer(torch.ones(2, 3), return_solution=True)
    assert "stopping=Stopping(rtol=0.01" in repr(layer)
    assert solution.num_steps.tolist() == [7, 7]
    assert torch.allclose(z, torch.full((2, 3), 2.0), rtol=2e-2)
