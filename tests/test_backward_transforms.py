"""Backward modes under torch.func: right, or refused."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from implicit import JFB, SHINE, AutoBackward, Checkpointed, FixedPointLayer, Implicit, Phantom, Unrolled, fixed_point
from solvers.linear import GMRES, NeumannSeries

pytestmark = pytest.mark.usefixtures("double")

TIGHT = {"rtol": 1e-14, "atol": 1e-14, "max_steps": 200, "on_failure": "ignore"}
FIXED = {"rtol": None, "atol": None, "max_steps": 80}


def tanh_map(z, x, w):
    return torch.tanh(z @ w.T + x)


def limit(x, w):
    z = torch.zeros(2, 3)
    for _ in range(80):
        z = tanh_map(z, x, w)
    return z


def steps_from_the_solution(steps, damping=1.0):
    """What the phantom modes differentiate: steps whose start is a constant."""

    def run(x, w):
        z = limit(x, w).detach()
        for _ in range(steps):
            z = z + damping * (tanh_map(z, x, w) - z)
        return z

    return run


def truncated(x, w):
    """Differentiates as the adjoint series of four terms does, once."""
    return steps_from_the_solution(4)(x, w)


# The mode, how the solve is stopped, and what it is to be the derivative of.
MODES = {
    "unrolled": (Unrolled(), FIXED, limit),
    "unrolled, to a tolerance": (Unrolled(), TIGHT, limit),
    "checkpointed": (Checkpointed(), FIXED, limit),
    "implicit": (Implicit(linear_solver=GMRES(rtol=1e-13)), TIGHT, limit),
    "neumann": (Implicit(linear_solver=NeumannSeries(terms=4)), TIGHT, truncated),
    "neumann, many terms": (Implicit(linear_solver=NeumannSeries(terms=80)), TIGHT, limit),
    "phantom": (Phantom(steps=3, damping=0.7), TIGHT, steps_from_the_solution(3, 0.7)),
    "phantom, many steps": (Phantom(steps=80), TIGHT, limit),
    "jfb": (JFB(), TIGHT, steps_from_the_solution(1)),
    "shine": (SHINE(fallback=GMRES(rtol=1e-13), max_residual=0.0), TIGHT, limit),
    "auto": (AutoBackward(), FIXED, limit),
}


def scalar(f):
    return lambda x, w: f(x, w).sin().sum()


SCALES = torch.tensor([0.5, 1.0])
TRANSFORMS = {
    "grad": lambda f: grad(scalar(f), argnums=(0, 1)),
    "vjp": lambda f: lambda x, w: vjp(f, x, w)[1](x.cos()),
    "vmap": lambda f: lambda x, w: vmap(lambda s: f(s * x, w))(SCALES),
    "vmap of grad": lambda f: lambda x, w: vmap(lambda s: grad(scalar(f), argnums=1)(s * x, w))(SCALES),
    "jacrev": lambda f: jacrev(f, argnums=1),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (x.cos(), w.cos()))[1],
    "hessian": lambda f: hessian(scalar(f), argnums=1),
}
NO_CHECKPOINT = r"Checkpointed\(.* torch.func transforms and forward mode do not support. Use Unrolled"
NO_ESTIMATE = "SHINE has an estimate of the inverse Jacobian for the gradient of one solve, and none for "
REFUSED = (
    {("checkpointed", transform): NO_CHECKPOINT for transform in TRANSFORMS}
    | {
        ("unrolled, to a tolerance", name): "cannot test for convergence under torch.func.vmap"
        for name in ("vmap", "vmap of grad")
    }
    | {("shine", name): NO_ESTIMATE + "torch.func.vmap" for name in ("vmap", "vmap of grad", "jacrev")}
    | {("shine", name): NO_ESTIMATE + "a forward-mode derivative" for name in ("jvp", "hessian")}
)
# A truncated series is no derivative of anything: what is derived from it is near the exact one, no more.
APPROXIMATE = {("neumann", "jvp"), ("neumann", "hessian")}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_transforms(mode, transform):
    backward, options, function = MODES[mode]
    x, w = torch.randn(2, 3), torch.randn(3, 3) / 4

    def solved(x, w):
        return fixed_point(tanh_map, torch.zeros(2, 3), x, w, solver="broyden", backward=backward, **options)

    apply = TRANSFORMS[transform]
    if (mode, transform) in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[mode, transform]):
            apply(solved)(x, w)
        return
    if (mode, transform) in APPROXIMATE:
        function, rtol = limit, 0.05
    else:
        rtol = 1e-9
    found, expected = tree_leaves(apply(solved)(x, w)), tree_leaves(apply(function)(x, w))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= rtol * b.norm()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "neumann"])
def test_second_derivatives_by_plain_autograd(mode):
    backward, options, function = MODES[mode]
    x, w = torch.randn(2, 3, requires_grad=True), (torch.randn(3, 3) / 4).requires_grad_()

    def second(f):
        first = torch.autograd.grad(f(x, w).sin().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))

    def solved(x, w):
        return fixed_point(tanh_map, torch.zeros(2, 3), x, w, solver="broyden", backward=backward, **options)

    if mode == "shine":
        with pytest.raises(RuntimeError, match=NO_ESTIMATE + "a second derivative"):
            second(solved)
        return
    for a, b in zip(second(solved), second(function), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "checkpointed"])
def test_functional_call_of_a_layer(mode):
    backward, options, _ = MODES[mode]
    layer = FixedPointLayer(Cell(), solver="broyden", backward=backward, **options)
    x = torch.randn(2, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = grad(lambda p: functional_call(layer, p, (x,)).sin().sum())(parameters)
    layer(x).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-10)


@pytest.mark.parametrize("mode", ["unrolled", "implicit", "phantom, many steps"])
def test_gradcheck_with_forward_mode(mode):
    backward, options, _ = MODES[mode]
    inputs = (torch.randn(2, 3, requires_grad=True), (torch.randn(3, 3) / 4).requires_grad_())

    def solved(x, w):
        return fixed_point(tanh_map, torch.zeros(2, 3), x, w, backward=backward, **options)

    assert gradcheck(solved, inputs, check_forward_ad=True)


@pytest.mark.parametrize("mode", ["phantom", "jfb", "implicit", "shine"])
def test_captured_tensors_are_refused(mode):
    backward, options, _ = MODES[mode]
    x, w = torch.randn(2, 3), torch.randn(3, 3) / 4

    def captured(w):
        f = lambda z: torch.tanh(z @ w.T + x)  # noqa: E731
        return fixed_point(f, torch.zeros(2, 3), solver="broyden", backward=backward, **options).sum()

    with pytest.raises(RuntimeError, match="Pass the tensor as an argument"):
        grad(captured)(w)
