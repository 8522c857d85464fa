"""torch.func transforms and forward mode through fixed_point, against unrolling."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from implicit import FixedPointLayer, Implicit, fixed_point, root
from solvers.linear import GMRES

OPTIONS = {
    "backward": Implicit(linear_solver=GMRES(rtol=1e-13)),
    "rtol": 1e-14,
    "atol": 1e-14,
    "max_steps": 200,
    "on_failure": "ignore",
}


pytestmark = pytest.mark.usefixtures("double")


class TanhMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        with torch.no_grad():
            self.a.weight.mul_(0.6 / torch.linalg.matrix_norm(self.a.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.a(z) + x)


def tanh_map(z, x, w):
    return torch.tanh(z @ w.T + x)


def unrolled_limit(x, w):
    z = torch.zeros(2, 3)
    for _ in range(80):
        z = tanh_map(z, x, w)
    return z


def implicit_limit(x, w):
    return fixed_point(tanh_map, torch.zeros(2, 3), x, w, **OPTIONS)


def scalar(f):
    return lambda x, w: f(x, w).sin().sum()


TRANSFORMS = {
    "jacrev": lambda f: jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: jacfwd(f, argnums=(0, 1)),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (x.cos(), w.cos()))[1],
    "hessian": lambda f: hessian(scalar(f), argnums=(0, 1)),
    "reverse over reverse": lambda f: jacrev(jacrev(scalar(f), argnums=1), argnums=(0, 1)),
    "forward over forward": lambda f: jacfwd(jacfwd(scalar(f), argnums=1), argnums=(0, 1)),
    "reverse over forward": lambda f: jacrev(jacfwd(scalar(f), argnums=1), argnums=(0, 1)),
    "third order": lambda f: jacfwd(hessian(scalar(f), argnums=1), argnums=0),
    "vmap over inputs": lambda f: lambda x, w: vmap(lambda s: f(s * x, w))(torch.tensor([0.5, 1, 2])),
    "vmap over weights": lambda f: lambda x, w: vmap(lambda s: f(x, s * w))(torch.tensor([0.5, 1, 0.2])),
    "vmap of vjp": lambda f: (
        lambda x, w: vmap(lambda s: vjp(lambda w: f(x, w), s * w)[1](x))(torch.tensor([0.5, 1, 0.2]))
    ),
    "vmap of jvp": lambda f: (
        lambda x, w: vmap(lambda s: jvp(lambda w: f(x, w), (s * w,), (w,))[1])(torch.tensor([0.5, 1]))
    ),
    "vmap over a last dimension": lambda f: (
        lambda x, w: vmap(f, in_dims=(None, 2))(x, torch.stack((w, w / 2, w / 3), 2))
    ),
    "vmap of grad": lambda f: lambda x, w: vmap(lambda s: grad(scalar(f), argnums=1)(s * x, w))(torch.tensor([0.5, 1])),
    "grad of vmap": lambda f: grad(
        lambda x, w: vmap(lambda s: f(s * x, w))(torch.tensor([0.5, 1])).sin().sum(), argnums=1
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_agree_with_unrolling(transform):
    x, w = torch.randn(2, 3), torch.randn(3, 3) / 4
    found, expected = transform(implicit_limit)(x, w), transform(unrolled_limit)(x, w)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck_with_forward_mode():
    inputs = (torch.randn(2, 3, requires_grad=True), (torch.randn(3, 3) / 4).requires_grad_())
    assert gradcheck(implicit_limit, inputs, check_forward_ad=True)
    assert gradgradcheck(implicit_limit, inputs, check_fwd_over_rev=True)


def test_functional_call():
    layer = FixedPointLayer(TanhMap(), **OPTIONS)
    x = torch.randn(2, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = grad(lambda p: functional_call(layer, p, (x,)).sin().sum())(parameters)
    layer(x).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-10)
    stacked = {name: torch.stack((p, p * 0.5)) for name, p in parameters.items()}
    ensemble = vmap(lambda p: functional_call(layer, p, (x,)))(stacked)
    assert torch.allclose(ensemble[0], layer(x), rtol=1e-10)


def test_captured_tensors_are_refused_under_transforms():
    x, w = torch.randn(2, 3), torch.randn(3, 3) / 4

    def captured(w):
        return fixed_point(lambda z: torch.tanh(z @ w.T + x), torch.zeros(2, 3), **OPTIONS).sum()

    message = "not among its arguments, so its derivative would be lost. Pass the tensor as an argument"
    for run in (lambda: grad(captured)(w), lambda: jvp(captured, (w,), (w,)), lambda: vmap(captured)(w.unsqueeze(0))):
        with pytest.raises(RuntimeError, match=message):
            run()


@pytest.mark.parametrize("backward", ["implicit", "phantom", "unrolled"])
@pytest.mark.parametrize("solve", [fixed_point, root])
def test_a_single_number_under_vmap(solve, backward):
    """What is said of its shape is that of one entry, as the caller sees it."""

    def of_one(x, **options):
        solver = "picard" if solve is fixed_point else "broyden"
        return solve(lambda z, x: z / 3 + x if solve is fixed_point else 2 * z / 3 - x, x, x, solver=solver, **options)

    x = torch.rand(3, 2)
    with pytest.raises(
        ValueError, match=r"batch_dims=1 but a state tensor has shape \(\)\. Lower batch_dims \(0 means"
    ):
        vmap(vmap(lambda x: of_one(x, backward=backward)))(x)
    if backward != "unrolled":
        z = vmap(vmap(lambda x: of_one(x, backward=backward, batch_dims=0, rtol=1e-8)))(x)
        assert torch.allclose(z, 1.5 * x)
