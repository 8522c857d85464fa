"""torch.func transforms of FixedPointLayer through functional_call, and of states and arguments of every shape."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from implicit import FixedPointLayer, Implicit, fixed_point, spectral_norm
from solvers.linear import GMRES

pytestmark = pytest.mark.usefixtures("double")

EXACT = {
    "backward": Implicit(linear_solver=GMRES(rtol=1e-13)),
    "rtol": 1e-14,
    "atol": 1e-14,
    "max_steps": 200,
    "on_failure": "ignore",
}
STEPS = {"backward": "unrolled", "solver": "picard", "rtol": None, "atol": None, "max_steps": 90}
both_modes = pytest.mark.parametrize("options", [EXACT, STEPS], ids=["implicit", "unrolled"])


class TanhMap(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("shift", torch.randn(3))
        with torch.no_grad():
            self.linear.weight.mul_(0.6 / torch.linalg.matrix_norm(self.linear.weight, 2))
        if norm:
            spectral_norm(self.linear, coeff=0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x + self.shift)


def long_iteration(f, x):
    z = torch.zeros_like(x)
    for _ in range(90):
        z = f(z, x)
    return z


class LongIteration(nn.Module):
    """The same map and names of parameters as the layer, by plain iteration."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return long_iteration(self.f, x)


def assert_close(found, expected):
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def loss(call):
    return lambda p, x: call(p, x).sin().sum()


# Each takes call(parameters, x), parameters and x.
TRANSFORMS = {
    "grad": lambda call, p, x: grad(loss(call), argnums=(0, 1))(p, x),
    "vjp": lambda call, p, x: vjp(call, p, x)[1](x.cos()),
    "jvp": lambda call, p, x: jvp(call, (p, x), (tree_map(torch.cos, p), x.cos()))[1],
    "jacrev": lambda call, p, x: jacrev(call, argnums=(0, 1))(p, x),
    "jacfwd": lambda call, p, x: jacfwd(call, argnums=(0, 1))(p, x),
    "hessian": lambda call, p, x: hessian(loss(call))(p, x),
    "third order": lambda call, p, x: jacfwd(hessian(loss(call), argnums=1), argnums=1)(p, x),
    "vmap over inputs": lambda call, p, x: vmap(call, (None, 0))(p, torch.stack((x, 2 * x))),
    "per-sample gradients": lambda call, p, x: vmap(grad(loss(call)), (None, 0))(p, x.unsqueeze(1)),
}


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalized"])
@both_modes
@pytest.mark.parametrize("name", TRANSFORMS)
def test_layers_agree_with_unrolling(name, options, norm):
    layer = FixedPointLayer(TanhMap(norm), **options).eval()
    reference = LongIteration(layer.f).eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(2, 3)
    found, expected = (
        TRANSFORMS[name](lambda p, x, module=module: functional_call(module, p, (x,)), parameters, x)
        for module in (layer, reference)
    )
    assert_close(found, expected)


@both_modes
@pytest.mark.parametrize("in_dims", [(0, 0, None), (0, 0, 0)], ids=["parameters", "parameters and inputs"])
def test_ensembles(options, in_dims):
    layers = [FixedPointLayer(TanhMap(), **options) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    x = torch.randn(3, 2, 3)
    batch = x if in_dims[2] == 0 else x[0]

    def gradient(p, b, x):
        return grad(lambda p: functional_call(base, (p, b), (x,)).sin().sum())(p)

    outputs = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), in_dims)(parameters, buffers, batch)
    gradients = vmap(gradient, in_dims)(parameters, buffers, batch)
    for i, layer in enumerate(layers):
        z = layer(x[i] if in_dims[2] == 0 else x[0])
        assert_close(outputs[i], z)
        z.sin().sum().backward()
        assert_close({name: g[i] for name, g in gradients.items()}, {n: p.grad for n, p in layer.named_parameters()})


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)], ids=["0", "1", "2"])
def test_batch_dims(shape):
    x, w = torch.randn(shape), torch.randn(3, 3) / 4

    def solved(x, w):
        return fixed_point(
            lambda z, x, w: torch.tanh(z @ w.T + x), torch.zeros(shape), x, w, batch_dims=len(shape) - 1, **EXACT
        )

    def iterated(x, w):
        return long_iteration(lambda z, x: torch.tanh(z @ w.T + x), x)

    for transform in (
        lambda f: jacrev(f, argnums=(0, 1))(x, w),
        lambda f: jacfwd(f, argnums=(0, 1))(x, w),
        lambda f: vmap(f, in_dims=(None, 1))(x, torch.stack((w, w / 2), 1)),
        lambda f: hessian(lambda x: f(x, w).sin().sum())(x),
    ):
        assert_close(transform(solved), transform(iterated))


def test_pytree_states_with_integer_and_other_arguments():
    order, flags = torch.tensor([2, 0, 1]), {"gain": 0.5, "on": True}

    def f(z, x, w, order, flags):
        a, b = z["a"], z["b"][0]
        return {"a": flags["gain"] * torch.tanh(b[:, order] @ w), "b": [torch.cos(a) / 2 + x if flags["on"] else b]}

    def solved(x, w, order=order):
        zero = torch.zeros(2, 3)
        return fixed_point(f, {"a": zero, "b": [zero]}, x, w, order, flags, **EXACT)

    def iterated(x, w, order=order):
        z = {"a": torch.zeros(2, 3), "b": [torch.zeros(2, 3)]}
        for _ in range(90):
            z = f(z, x, w, order, flags)
        return z

    x, w = torch.randn(2, 3), torch.randn(3, 3) / 4
    for transform in (
        lambda f: jacrev(f, argnums=(0, 1))(x, w),
        lambda f: jacfwd(f, argnums=(0, 1))(x, w),
        lambda f: jvp(f, (x, w), (x, w))[1],
        lambda f: vmap(f, in_dims=(None, None, 0))(x, w, torch.stack((order, order.flip(0)))),
        lambda f: hessian(lambda w: sum(leaf.sin().sum() for leaf in tree_leaves(f(x, w))))(w),
    ):
        assert_close(transform(solved), transform(iterated))


def solved(x, w):
    return fixed_point(lambda z, x, w: torch.tanh(z @ w.T + x), torch.zeros(4, 3), x, w, **EXACT)


def leaves(*shapes):
    return [(torch.randn(shape) / 4).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (3,)], ids=str)
def test_gradcheck_of_all_modes_with_inputs_broadcast(shape):
    """Forward and reverse mode, both also batched as PyTorch's older vmap does it."""
    assert gradcheck(
        solved, leaves(shape, (3, 3)), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


def test_second_and_third_derivatives():
    inputs = leaves((1, 3), (3, 3))
    assert gradgradcheck(
        solved, inputs, gen_non_contig_grad_outputs=True, check_fwd_over_rev=True, check_batched_grad=True
    )
    assert gradgradcheck(lambda *t: torch.autograd.grad(solved(*t).sin().sum(), t, create_graph=True), inputs)


def test_higher_derivatives_of_closures():
    """Plain autograd, with the tensors that matter captured: leaves and results, to the third order."""

    def captured(x, w):
        y = 2 * x.sin()
        return fixed_point(lambda z: torch.tanh(z @ w.T + y), torch.zeros(4, 3), **EXACT)

    inputs = leaves((1, 3), (3, 3))
    for call in (captured, lambda *t: torch.autograd.grad(captured(*t).sin().sum(), t, create_graph=True)):
        assert gradgradcheck(call, inputs)


@both_modes
def test_many_cotangents_at_once(options):
    x, w = leaves((4, 3), (3, 3))
    z = fixed_point(lambda z, x: torch.tanh(z @ w.T + x), torch.zeros(4, 3), x, **options)  # w is captured
    many = torch.randn(5, 4, 3)
    found = torch.autograd.grad(z, (x, w), many, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(z, (x, w), one, retain_graph=True) for one in many]
    assert_close(found, [torch.stack(column) for column in zip(*each, strict=True)])


def test_unrolling_to_a_tolerance_says_what_vmap_cannot_do():
    options = {**EXACT, "backward": "unrolled"}
    x = torch.randn(2, 4, 3)
    with pytest.raises(RuntimeError, match="cannot test for convergence under torch.func.vmap.*Take a fixed number"):
        vmap(lambda x: fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, torch.zeros(4, 3), x, **options))(x)
