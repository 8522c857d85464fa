"""Each parametrized weight is computed once a solve, however the map reaches its module, and only in its thread."""

import copy
import functools
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from implicit import FixedPointLayer, InvertibleResidual, fixed_point, power_iterations_advanced, spectral_norm
from implicit.autograd.torch_internals import weight_source
from implicit.diagnostics import spectral_radius
from implicit.training import iterates, jacobian_regularization

all_modes = pytest.mark.parametrize(
    "backward", ["unrolled", "checkpointed", "implicit", "neumann", "phantom", "jfb", "shine", "auto"]
)


class Counted(nn.Module):
    """A parametrization that counts its computations, and returns another weight each time."""

    def __init__(self, size=3):
        super().__init__()
        self.count = 0
        self.factor = nn.Parameter(torch.tensor(0.4))

    def forward(self, weight):
        self.count += 1
        return self.factor * (1 + 0.1 * self.count) * torch.tanh(weight)


def counted_linear():
    linear = nn.Linear(3, 3)
    parametrize.register_parametrization(linear, "weight", Counted())
    linear.parametrizations.weight[0].count = 0
    return linear


def helper(linear, z, x):
    return torch.tanh(linear(z) + x)


class Owner:
    def __init__(self, linear):
        self.parts = {"linear": linear}

    def method(self, z, x):
        return helper(self.parts["linear"], z, x)


class Module(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, z, x):
        return helper(self.linear, z, x)


def nested_function(linear):
    def inner(z, x):
        return helper(linear, z, x)

    def outer(z, x):
        return inner(z, x)

    return outer


def in_parts(parts, f):
    return lambda z, x: f(parts, z, x)


REACHED = {
    "module": Module,
    "lambda": lambda linear: lambda z, x: helper(linear, z, x),
    "helper": lambda linear: functools.partial(helper, linear),
    "method": lambda linear: Owner(linear).method,
    "nested function": nested_function,
    "dict": lambda linear: in_parts({"a": [linear]}, lambda parts, z, x: helper(parts["a"][0], z, x)),
    "dict of modules": lambda linear: in_parts({"a": Module(linear)}, lambda parts, z, x: parts["a"].forward(z, x)),
    "proxy": lambda linear: in_parts(types.MappingProxyType({1: linear}), lambda parts, z, x: helper(parts[1], z, x)),
    "module list": lambda linear: in_parts(nn.ModuleList([linear]), lambda parts, z, x: helper(parts[0], z, x)),
}
reached = pytest.mark.parametrize("reach", REACHED)


@all_modes
@reached
def test_computed_once_a_pass_and_differentiated(reach, backward):
    linear = counted_linear()
    f = REACHED[reach](linear)
    counter = linear.parametrizations.weight[0]
    x = torch.randn(5, 3, requires_grad=True)
    options = {"solver": "broyden", "backward": backward, "rtol": 1e-6}
    for passes in (1, 2):
        z = fixed_point(f, torch.zeros(5, 3), x, **options)
        z.sin().sum().backward()
        assert counter.count == passes
    with torch.no_grad():
        fixed_point(f, torch.zeros(5, 3), x, **options)
    assert counter.count == 3
    # The weight of the last pass, computed by hand.
    for parameter in linear.parameters():
        parameter.grad = None
    counter.count = 0
    fixed_point(f, torch.zeros(5, 3), x, **options).sin().sum().backward()
    found = [parameter.grad for parameter in linear.parameters()]
    counter.count = 0
    weight = linear.weight
    exact = fixed_point(
        lambda z, x, w, b: torch.tanh(z @ w.T + b + x), torch.zeros(5, 3), x, weight, linear.bias, **options
    )
    expected = torch.autograd.grad(exact.sin().sum(), list(linear.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@all_modes
@reached
def test_power_iteration_advances_once_a_pass(reach, backward):
    linear = spectral_norm(nn.Linear(3, 3), coeff=0.5, n_power_iterations=1)
    f = REACHED[reach](linear)
    norm = linear.parametrizations.weight[0]
    with torch.no_grad():
        norm.u.copy_(torch.nn.functional.normalize(torch.randn(3), dim=0))
    twin = spectral_norm(nn.Linear(3, 3), coeff=0.5, n_power_iterations=1)
    twin.load_state_dict(linear.state_dict())
    x = torch.randn(5, 3, requires_grad=True)
    for _ in range(2):
        fixed_point(f, torch.zeros(5, 3), x, solver="broyden", backward=backward).sum().backward()
        _ = twin.weight
        assert torch.equal(norm.u, twin.parametrizations.weight[0].u)
        assert torch.equal(norm.v, twin.parametrizations.weight[0].v)


def test_computed_once_by_the_other_users_of_a_map():
    linear = counted_linear()
    counter = linear.parametrizations.weight[0]
    f = REACHED["method"](linear)
    x = torch.randn(5, 3)
    calls = [
        lambda: iterates(f, torch.zeros(5, 3), x, steps=(1, 3)),
        lambda: jacobian_regularization(f, x, x).sum().backward(),
        lambda: spectral_radius(f, x, x),
        lambda: InvertibleResidual(lambda x: f(x, 0.0)).inverse(x).sum().backward(),
        lambda: InvertibleResidual(lambda x: f(x, 0.0)).log_det(x).sum().backward(),
        lambda: FixedPointLayer(f).iterates(x, steps=(2, 3))[1].sum().backward(),
    ]
    for call in calls:
        counter.count = 0
        call()
        assert counter.count == 1


@pytest.mark.parametrize("inner", ["implicit", "unrolled", "phantom"])
@pytest.mark.parametrize("outer", ["implicit", "unrolled", "phantom", "checkpointed"])
def test_a_solve_in_a_map_shares_the_weights_of_the_outer_solve(outer, inner):
    linear = counted_linear()
    counter = linear.parametrizations.weight[0]

    def f(z, x):
        y = fixed_point(lambda y, z: helper(linear, y, z), torch.zeros(5, 3), z, backward=inner, rtol=1e-6)
        return 0.3 * y + x

    x = torch.randn(5, 3, requires_grad=True)
    fixed_point(f, torch.zeros(5, 3), x, backward=outer, rtol=1e-6).sum().backward()
    assert counter.count == 1
    assert linear.parametrizations.weight.original.grad.abs().sum() > 0
    assert counter.factor.grad.abs() > 0


def test_a_weight_that_is_computed_from_another_one():
    """Gradients reach through both parametrizations."""

    class FromOther(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = counted_linear()

        def forward(self, weight):
            return 0.2 * weight + self.other.weight

    linear = nn.Linear(3, 3)
    parametrize.register_parametrization(linear, "weight", FromOther())
    other = linear.parametrizations.weight[0].other
    x = torch.randn(5, 3)
    found = []
    for backward in ("implicit", "unrolled"):
        linear.zero_grad()
        other.parametrizations.weight[0].count = 0
        fixed_point(lambda z, x: helper(linear, z, x), x, x, backward=backward, rtol=1e-7).sum().backward()
        assert other.parametrizations.weight[0].count == 1
        found.append([p.grad for p in linear.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@all_modes
def test_a_map_that_lends_its_module_other_tensors_in_each_call(backward):
    """One module, two weights in one map."""
    linear = counted_linear().requires_grad_(False)
    linear.parametrizations.weight[0].forward = lambda weight: 0.3 * torch.tanh(weight)
    name = "parametrizations.weight.original"
    a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(2))

    def f(z, x):
        return sum(torch.tanh(torch.func.functional_call(linear, {name: w}, z)) for w in (a, b)) / 2 + x

    x = torch.randn(5, 3)
    options = {"solver": "broyden", "rtol": 1e-6}
    fixed_point(f, x, x, backward=backward, **options).sum().backward()
    bias = linear.bias

    def plain(z, x):
        return sum(torch.tanh(z @ (0.3 * w.tanh()).T + bias) for w in (a, b)) / 2 + x

    expected = torch.autograd.grad(fixed_point(plain, x, x, backward=backward, **options).sum(), (a, b))
    for w, e in zip((a, b), expected, strict=True):
        assert torch.allclose(w.grad, e, rtol=1e-3, atol=1e-5)


@all_modes
def test_weights_cached_by_the_user(backward):
    """``parametrize.cached()`` around a layer: one weight for all, also where its graph is used elsewhere."""
    layer = FixedPointLayer(Module(counted_linear()), solver="broyden", backward=backward)
    counter = layer.f.linear.parametrizations.weight[0]
    x = torch.randn(5, 3)
    with parametrize.cached():
        loss = layer(x).sum() + layer(2 * x).sum() + layer.f.linear.weight.square().sum()
    loss.backward()
    assert counter.count == 1
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for call in (lambda: layer(x), lambda: layer(2 * x), lambda: layer.f.linear.weight.square()):
        counter.count = 0
        call().sum().backward()
    for a, p in zip(found, layer.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-6)


def test_several_originals():
    """Weight normalization has two; and the weights of a recurrent cell."""
    layer = FixedPointLayer(Module(parametrizations.weight_norm(nn.Linear(3, 3))), rtol=1e-7)
    with torch.no_grad():
        layer.f.linear.parametrizations.weight.original0.mul_(0.5)
    x = torch.randn(5, 3)
    layer(x).sum().backward()
    found = [p.grad for p in layer.parameters()]
    reference = FixedPointLayer(layer.f, rtol=1e-7, backward="unrolled")
    layer.zero_grad()
    reference(x).sum().backward()
    for a, p in zip(found, layer.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-6)


# PyTorch's checkpoints do not allow torch.func in what they repeat.
@pytest.mark.parametrize("backward", ["unrolled", "implicit", "neumann", "phantom", "jfb"])
def test_a_weight_that_is_first_read_inside_a_transform(backward):
    """The map is the gradient of an energy; power iteration writes to buffers, which a transform forbids."""
    linear = spectral_norm(nn.Linear(3, 3), coeff=0.5, n_power_iterations=1)
    norm = linear.parametrizations.weight[0]
    with torch.no_grad():
        norm.u.copy_(torch.nn.functional.normalize(torch.randn(3), dim=0))
    twin = copy.deepcopy(linear)
    x = torch.randn(5, 3, requires_grad=True)

    def f(z, x):
        return 0.5 * torch.func.grad(lambda z: torch.nn.functional.softplus(linear(z)).sum())(z) + x

    fixed_point(f, torch.zeros(5, 3), x, solver="broyden", backward=backward, rtol=1e-6).sum().backward()
    weight = twin.weight
    assert torch.equal(norm.u, twin.parametrizations.weight[0].u)

    def plain(z, x):
        return 0.5 * torch.sigmoid(z @ weight.T + twin.bias) @ weight + x

    fixed_point(plain, torch.zeros(5, 3), x, solver="broyden", backward=backward, rtol=1e-6).sum().backward()
    for p, q in zip(linear.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5)


# Threads.


def in_thread(function):
    """Run it in another thread to its end; re-raise its error."""
    errors = []

    def run():
        try:
            function()
        except BaseException as error:  # handed to the caller
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@all_modes
def test_other_threads_see_nothing_of_a_solve(backward):
    """In every call of the map another thread serves the layer and reads a weight, as it happens to be scheduled."""
    linear, unrelated = counted_linear(), counted_linear()
    quiet = counted_linear()
    counter, events = linear.parametrizations.weight[0], []
    layer = FixedPointLayer(lambda z, x: helper(linear, z, x), rtol=1e-4)

    def serve():
        before = counter.count
        with torch.no_grad():
            layer(torch.ones(2, 3))
        assert counter.count == before + 1
        counter.count = before  # as if it had not been here
        assert weight_source.get() is None
        a, b = unrelated.weight, unrelated.weight
        assert not torch.equal(a, b)
        assert a.requires_grad
        events.append(1)

    def f(z, x):
        in_thread(serve)
        return helper(linear, z, x)

    x = torch.randn(5, 3)
    fixed_point(f, torch.zeros(5, 3), x, solver="broyden", backward=backward).sum().backward()
    assert len(events) > 3
    assert counter.count == 1
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in linear.parameters())
    assert not torch.equal(quiet.weight, quiet.weight)


def test_one_thread_trains_while_another_serves():
    """Every pass gets its gradients, and they are those of a process with one thread."""
    layer = FixedPointLayer(lambda z, x: helper(linear, z, x), rtol=1e-6)
    linear = spectral_norm(nn.Linear(3, 3), coeff=0.5).eval()
    x = torch.randn(5, 3)
    expected = torch.autograd.grad(layer(x).sum(), list(linear.parameters()))
    stop = threading.Event()

    def serve():
        with torch.no_grad():
            while not stop.is_set():
                layer(x)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(60):
            found = torch.autograd.grad(layer(x).sum(), list(linear.parameters()))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        stop.set()
        thread.join()


def test_power_iterations_that_were_advanced_together_are_so_in_their_thread_only():
    linear = spectral_norm(nn.Linear(3, 3), coeff=0.5, n_power_iterations=1)
    norm = linear.parametrizations.weight[0]
    advanced = []
    with power_iterations_advanced(linear):
        assert norm.advanced_vectors() is not None
        in_thread(lambda: advanced.append(norm.advanced_vectors()))
    assert advanced == [None]
    assert norm.advanced_vectors() is None


def test_the_backward_pass_in_another_thread():
    """As on a GPU, whose backward passes run in threads of their own."""
    linear = counted_linear()
    x = torch.randn(5, 3)
    for backward in ("implicit", "checkpointed", "shine", "phantom"):
        linear.zero_grad()
        linear.parametrizations.weight[0].count = 0
        z = fixed_point(lambda z, x: helper(linear, z, x), x, x, solver="broyden", backward=backward)
        in_thread(lambda z=z: z.sum().backward())
        assert linear.parametrizations.weight[0].count == 1
        assert all(p.grad.abs().sum() > 0 for p in linear.parameters())
