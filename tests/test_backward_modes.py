"""Every backward mode against its formula, written out with dense matrices in float64."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from implicit import (
    JFB,
    SHINE,
    AutoBackward,
    Checkpointed,
    FixedPointLayer,
    Implicit,
    Phantom,
    Unrolled,
    fixed_point,
    get_backward,
)
from solvers import Anderson, Broyden, ConvergenceError, ConvergenceWarning, NewtonKrylov, Picard, Status, Stopping
from solvers.linear import GMRES, NeumannSeries, Richardson

pytestmark = pytest.mark.usefixtures("double")

SOLVERS = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}
TIGHT = {"rtol": 1e-14, "atol": 1e-14, "max_steps": 200, "on_failure": "ignore"}
FIXED = {"rtol": None, "atol": None, "max_steps": 80}
NAMES = ["unrolled", "checkpointed", "implicit", "phantom", "jfb", "neumann", "shine", "auto"]

all_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
all_modes = pytest.mark.parametrize("backward", NAMES)


def tensor_map(z, x, w):
    return torch.tanh(z @ w.T + x)


def pytree_map(z, x, w):
    a, b = z["a"], z["b"]
    return {"a": torch.sin(a @ w[:2, :2]) + 0.2 * b + x[:, :2], "b": 0.5 * torch.cos(b) + a @ w[:2, 2:]}


def problem(kind):
    """The map, its start, its inputs and an incoming gradient."""
    inputs = (torch.randn(4, 3, requires_grad=True), (torch.randn(3, 3) / 4).requires_grad_())
    if kind == "tensor":
        return tensor_map, torch.zeros(4, 3), inputs, torch.randn(4, 3)
    z0 = {"a": torch.zeros(4, 2), "b": torch.zeros(4, 1)}
    return pytree_map, z0, inputs, tree_map(torch.randn_like, z0)


def flat(tree):
    """(B, D), as the solvers see it."""
    return torch.cat(tree_leaves(tree), dim=1)


def unflat(matrix, like):
    parts = iter(matrix.split([leaf.shape[1] for leaf in tree_leaves(like)], dim=1))
    return tree_map(lambda _: next(parts), like)


def dense(f, z, inputs, w, adjoint):
    """(df/dt)' u for each input, u = adjoint(J', w) sample by sample, with J' (B, D, D) and w (B, D, 1) dense."""
    rows = flat(z)
    full = torch.autograd.functional.jacobian(lambda rows: flat(f(unflat(rows, z), *inputs)), rows)
    j = torch.stack([full[i, :, i] for i in range(len(rows))])
    u = adjoint(j.mT, flat(w).unsqueeze(2)).squeeze(2)
    return torch.autograd.grad(flat(f(z, *inputs)), inputs, u)


def exact(jt, w):
    return torch.linalg.solve(torch.eye(jt.shape[1]) - jt, w)


def series(terms, damping=1.0):
    def adjoint(jt, w):
        step = damping * jt + (1 - damping) * torch.eye(jt.shape[1])
        return damping * sum(torch.linalg.matrix_power(step, k) @ w for k in range(terms))

    return adjoint


def gradients(backward, kind, solver, options=TIGHT):
    """The gradients found, the problem's f, z and inputs, the incoming gradient, and the solution."""
    f, z0, inputs, w = problem(kind)
    z, solution = fixed_point(f, z0, *inputs, solver=solver, backward=backward, return_solution=True, **options)
    found = torch.autograd.grad(tree_leaves(z), inputs, tree_leaves(w))
    return found, (f, tree_map(torch.Tensor.detach, z), inputs, w), solution


def assert_close(found, expected, rtol=1e-9):
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=1e-11)


# The modes that are exact, some of them in the limit.
EXACT = {
    "unrolled": Unrolled(),
    "checkpointed": Checkpointed(),
    "implicit, gmres": Implicit(linear_solver=GMRES(rtol=1e-13)),
    "implicit, richardson": Implicit(linear_solver=Richardson(rtol=1e-13)),
    "implicit, long series": Implicit(linear_solver=NeumannSeries(terms=120)),
    "phantom, many steps": Phantom(steps=120),
    "phantom, many damped steps": Phantom(steps=200, damping=0.6),
    "shine, refined": SHINE(fallback=GMRES(rtol=1e-13), max_residual=0.0),
}
TRUNCATED = {
    "phantom 1": (Phantom(steps=1), series(1)),
    "phantom 4": (Phantom(steps=4), series(4)),
    "phantom 3, damped": (Phantom(steps=3, damping=0.4), series(3, 0.4)),
    "jfb": (JFB(), lambda _, w: w),
    "neumann 1": (get_backward("neumann", terms=1), series(1)),
    "neumann 6": (get_backward("neumann", terms=6), series(6)),
}


def skip_without_inverse(backward, solver):
    if isinstance(backward, SHINE) and not solver.estimates_inverse:
        pytest.skip("refused when the layer is built, as test_refusals shows")


@pytest.mark.parametrize("kind", ["tensor", "pytree"])
@pytest.mark.parametrize("backward", EXACT.values(), ids=EXACT.keys())
@all_solvers
def test_exact_modes_against_the_dense_gradient(solver, backward, kind):
    skip_without_inverse(backward, solver)
    found, rest, _ = gradients(backward, kind, solver)
    assert_close(found, dense(*rest, exact), rtol=1e-7 if backward == EXACT["unrolled"] else 1e-9)


@pytest.mark.parametrize("kind", ["tensor", "pytree"])
@pytest.mark.parametrize(("backward", "adjoint"), TRUNCATED.values(), ids=TRUNCATED.keys())
@all_solvers
def test_truncated_modes_against_their_formula(solver, backward, adjoint, kind):
    found, rest, _ = gradients(backward, kind, solver)
    assert_close(found, dense(*rest, adjoint))
    assert not torch.allclose(found[0], dense(*rest, exact)[0], rtol=1e-6)  # it is no limit already


@pytest.mark.parametrize("kind", ["tensor", "pytree"])
def test_shine_against_its_formula(kind):
    found, rest, solution = gradients(SHINE(fallback=None), kind, "broyden")
    unit = torch.eye(3).expand(4, 3, 3)
    h = torch.stack([solution.state.inverse.mv(unit[:, i]) for i in range(3)], dim=2)  # (B, D, D)
    assert not torch.allclose(h, -torch.eye(3).expand(4, 3, 3), atol=0.1)
    assert_close(found, dense(*rest, lambda _, w: -h.mT @ w))

    def residual(jt, w):
        return (w + h.mT @ w - jt @ h.mT @ w).norm(dim=1) / w.norm(dim=1)

    expected = []
    dense(*rest, lambda jt, w: expected.append(residual(jt, w)) or w)
    assert torch.allclose(solution.adjoint.residual, expected[0].squeeze(1))
    assert (solution.adjoint.status == Status.UNTESTED).all()


def test_shine_falls_back_sample_by_sample():
    """The samples whose estimate is poor get the exact gradient, the others keep the estimate."""
    estimate = gradients(SHINE(fallback=None), "tensor", "broyden")
    residual = estimate[2].adjoint.residual
    middle = float(residual.median())
    mode = SHINE(fallback=GMRES(rtol=1e-13), max_residual=middle)
    torch.manual_seed(0)  # the same problem
    estimate = gradients(SHINE(fallback=None), "tensor", "broyden")
    torch.manual_seed(0)
    found, rest, solution = gradients(mode, "tensor", "broyden")
    kept = estimate[2].adjoint.residual <= middle
    assert 0 < kept.sum() < 4
    assert ((solution.adjoint.status == Status.UNTESTED) == kept).all()
    assert torch.equal(found[0][kept], estimate[0][0][kept])
    assert torch.allclose(found[0][~kept], dense(*rest, exact)[0][~kept], rtol=1e-9)


def test_shine_drops_an_estimate_that_is_worse_than_nothing():
    """Where the estimate is not finite, or far off, the fallback starts from zero."""

    class Wrong:
        def rmv(self, x):
            return torch.stack((x[0] * torch.nan, 1e3 * x[1], -x[2], -x[3]))

    torch.manual_seed(0)
    f, z0, inputs, w = problem("tensor")
    backward = SHINE(fallback=Richardson(rtol=1e-13))
    z, solution = fixed_point(f, z0, *inputs, solver="broyden", backward=backward, return_solution=True, **TIGHT)
    z.grad_fn.problem.adjoint_solver.inverses[:] = [Wrong()]
    found = torch.autograd.grad(z, inputs, w)
    assert torch.allclose(found[0][:2], dense(f, z.detach(), inputs, w, exact)[0][:2], rtol=1e-9)
    assert solution.adjoint.residual.isfinite().all()


# Most of the samples converge long before the last.
SPREAD = torch.tensor([[0.05], [0.5], [0.9], [0.2], [0.0], [0.7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"rtol": 1e-6}, {"rtol": None, "atol": None}], ids=["tolerance", "fixed"])
@pytest.mark.parametrize("segments", [None, 1, 3, 40, 1000])
@all_solvers
def test_checkpointed_is_unrolled_bit_for_bit(solver, segments, options, dtype):
    x, w, z0 = torch.randn(6, 3), torch.randn(3, 3) / 3, torch.randn(6, 3)
    inputs = [t.to(dtype).requires_grad_() for t in (x, w, z0)]

    def run(backward):
        z, solution = fixed_point(
            lambda z, x, w: SPREAD.to(dtype) * torch.sin(z @ w.T) + x,
            inputs[2],
            *inputs[:2],
            solver=solver,
            backward=backward,
            max_steps=40,
            history=True,
            return_solution=True,
            **options,
        )
        facts = (solution.status, solution.num_steps, solution.residual, solution.history, solution.state.z)
        return [z, *torch.autograd.grad(z.sin().sum(), inputs), *facts, torch.tensor(solution.num_evals)]

    for a, b in zip(run(Checkpointed(segments=segments)), run(Unrolled()), strict=True):
        assert torch.equal(a, b)
    if options["rtol"] is not None:
        assert len(run(Unrolled())[5].unique()) > 2


def test_checkpointed_differentiates_twice_and_reports_failures():
    f, z0, inputs, _ = problem("tensor")
    options = {"solver": "anderson", "backward": Checkpointed(segments=3)}

    def run(*inputs):
        return fixed_point(f, z0, *inputs, **options, rtol=None, atol=None, max_steps=9)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)
    with pytest.raises(ConvergenceError):
        fixed_point(f, z0, *inputs, **options, rtol=1e-12, max_steps=4, on_failure="raise")
    with pytest.warns(ConvergenceWarning):
        fixed_point(f, z0, *inputs, **options, rtol=1e-12, max_steps=4)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


@all_modes
def test_gradients_depend_on_grad_mode_alone(backward):
    layer = FixedPointLayer(Cell(), solver="broyden", backward=backward)
    x = torch.randn(2, 3)

    def run():
        layer.zero_grad()
        z, solution = layer(x, return_solution=True)
        z.sum().backward()
        assert solution.backward is not None
        return [p.grad for p in layer.parameters()]

    training = run()
    layer.eval()
    assert all(map(torch.equal, training, run()))
    with torch.no_grad():
        z, solution = layer(x, return_solution=True)
    assert not z.requires_grad
    assert solution.backward is solution.adjoint is None


@all_modes
def test_the_start_gets_a_gradient_from_the_unrolled_modes_alone(backward):
    z0 = torch.ones(2, 3, requires_grad=True)
    x = torch.randn(2, 3, requires_grad=True)
    options = {"solver": "broyden", "backward": backward, "rtol": None, "atol": None, "max_steps": 3}
    z = fixed_point(tensor_map, z0, x, torch.eye(3) / 2, **options)
    found = torch.autograd.grad(z.sum(), (z0, x), allow_unused=True)
    assert (found[0] is not None) == (backward in ("unrolled", "checkpointed", "auto"))
    assert found[1] is not None


@all_modes
def test_captured_tensors_get_their_gradients(backward):
    """Leaves that the map closes over, results of other computations, and a module's parameters."""
    leaf, before = torch.randn(2, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    module = nn.Linear(3, 3, bias=False)
    result = before.sin() / 8
    # Not to the last digit, where rounding decides what SHINE shares.
    options = {"solver": "broyden", "backward": backward, "rtol": 1e-8, "max_steps": 60, "on_failure": "ignore"}
    captured = (leaf, before, module.weight)

    z = fixed_point(lambda z: torch.sin(z @ result + 0.2 * module(z) + leaf), torch.zeros(2, 3), **options)
    found = torch.autograd.grad(z.sum(), captured, retain_graph=True)
    explicit = fixed_point(
        lambda z, leaf, result, weight: torch.sin(z @ result + 0.2 * z @ weight.T + leaf),
        torch.zeros(2, 3),
        leaf,
        result,
        module.weight,
        **options,
    )
    assert_close(found, torch.autograd.grad(explicit.sum(), captured))


@pytest.mark.parametrize("backward", ["unrolled", "checkpointed", "implicit", "phantom", "jfb"])
def test_functional_call(backward):
    """With other parameters for one call: those get the gradient."""
    layer = FixedPointLayer(Cell(), backward=backward)
    x = torch.randn(2, 3)
    other = {name: (p * 0.7).detach().requires_grad_() for name, p in layer.named_parameters()}
    functional_call(layer, other, (x,)).sin().sum().backward()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(other[name])
    layer(x).sin().sum().backward()
    for name, p in layer.named_parameters():
        assert torch.allclose(other[name].grad, p.grad, rtol=1e-12)


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
@pytest.mark.parametrize(
    ("backward", "terms"),
    [
        (Unrolled(), 80),
        (Checkpointed(), 80),
        (Implicit(linear_solver=GMRES(rtol=1e-12)), 80),
        (SHINE(fallback=GMRES(rtol=1e-12), max_residual=0.0), 80),
        (Phantom(steps=5), 5),
        (JFB(), 1),
        (get_backward("neumann", terms=4), 4),
    ],
    ids=str,
)
def test_batch_dims(backward, terms, batch_dims):
    x = torch.randn(2, 2, 3, requires_grad=True)
    options = {"solver": "broyden", "backward": backward, "batch_dims": batch_dims}
    z = fixed_point(lambda z, x: 0.4 * torch.sin(z) + x, torch.zeros(2, 2, 3), x, **options, **TIGHT)
    found = torch.autograd.grad(z.sum(), x)[0]
    slope = 0.4 * torch.cos(z.detach())
    assert torch.allclose(found, sum(slope**k for k in range(terms)), rtol=1e-9)


def test_adjoint_is_reported_by_the_modes_that_solve_for_it():
    for name in NAMES:
        _, _, solution = gradients(name, "tensor", "broyden")
        assert (solution.adjoint is not None) == (name in ("implicit", "neumann", "shine", "auto"))
    f, z0, inputs, w = problem("tensor")
    poor = SHINE(fallback=GMRES(max_steps=1, rtol=1e-12), max_residual=0.0)
    with pytest.warns(ConvergenceWarning, match="linear solve of the derivative"):
        fixed_point(f, z0, *inputs, solver="broyden", backward=poor).backward(w)
    with pytest.raises(ConvergenceError, match="linear solve of the derivative"):
        fixed_point(f, z0, *inputs, solver="broyden", backward=poor, on_failure="raise").backward(w)


@pytest.mark.parametrize(
    ("solver", "options", "choice"),
    [
        ("anderson", {}, Implicit()),
        ("newton_krylov", {}, Implicit()),
        ("anderson", {"stopping": Stopping(rtol=1e-3)}, Implicit()),
        ("picard", {"rtol": None, "atol": None, "max_steps": 16}, Unrolled()),
        ("picard", {"rtol": None, "atol": None, "max_steps": 17}, Checkpointed()),
        ("newton_krylov", {"rtol": None, "atol": None, "max_steps": 3}, Implicit()),
    ],
)
def test_auto_says_what_it_chose(solver, options, choice):
    f, z0, inputs, w = problem("tensor")
    found = []
    for backward in (AutoBackward(), choice):
        z, solution = fixed_point(f, z0, *inputs, solver=solver, backward=backward, return_solution=True, **options)
        assert solution.backward == choice
        found.append(torch.autograd.grad(z, inputs, w))
    assert all(map(torch.equal, *found))


def test_refusals():
    for solver in (Picard(), Anderson(), NewtonKrylov()):
        with pytest.raises(ValueError, match=rf"SHINE\(.* and {type(solver).__name__}\(.* makes none. Use Broyden"):
            FixedPointLayer(torch.cos, solver=solver, backward="shine")
    with pytest.raises(ValueError, match=r"Checkpointed\(.*\) needs gradients through the steps .* of NewtonKrylov"):
        FixedPointLayer(torch.cos, solver="newton_krylov", backward="checkpointed")
    with pytest.raises(ValueError, match="segments=...\\) must be a positive integer or None, got 0"):
        Checkpointed(segments=0)
    with pytest.raises(ValueError, match="Phantom\\(steps=...\\) must be a positive integer, got 0"):
        Phantom(steps=0)
    with pytest.raises(ValueError, match="Phantom\\(damping=...\\) must be in \\(0, 1\\], got 2"):
        Phantom(damping=2)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        SHINE(max_residual=-1)
    with pytest.raises(TypeError, match="must be a linear solver such as .*, or None, got 'jfb'"):
        SHINE(fallback="jfb")
    with pytest.raises(ValueError, match="AutoBackward\\(max_unrolled=...\\) must be a positive integer"):
        AutoBackward(max_unrolled=0)
    with pytest.raises(TypeError, match="NeumannSeries has no option 'steps'.* Its options: terms"):
        get_backward("neumann", steps=3)
