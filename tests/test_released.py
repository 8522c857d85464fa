"""Nothing outlives its use: what a layer keeps for the backward pass goes through autograd, and goes with it."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from implicit import JFB, SHINE, Checkpointed, FixedPointLayer, Implicit, Phantom, Unrolled, fixed_point, spectral_norm
from solvers.linear import GMRES

MODES = {
    "unrolled": Unrolled(),
    "checkpointed": Checkpointed(),
    "implicit": Implicit(),
    "gmres": Implicit(linear_solver=GMRES()),
    "phantom": Phantom(steps=2),
    "jfb": JFB(),
    "shine": SHINE(),
    "shine, refined": SHINE(max_residual=0.0),
}
all_modes = pytest.mark.parametrize("mode", MODES)


class Cell(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = spectral_norm(nn.Linear(size, size), coeff=0.5)

    def forward(self, z, inputs):
        return torch.tanh(self.linear(z) + inputs["x"] + inputs["y"][0])


class Watched:
    """Makes tensors, and tells which of them are alive."""

    def __init__(self):
        self.references = {}

    def __call__(self, name, tensor):
        self.references[name] = weakref.ref(tensor)
        return tensor

    def alive(self):
        gc.collect()
        return [name for name, reference in self.references.items() if reference() is not None]


def output_of(mode, watched, order=1):
    """The output of a layer after its backward pass, and nothing else of it."""
    layer = FixedPointLayer(Cell(), solver="broyden", backward=MODES[mode], init=lambda inputs: torch.zeros(3, 4))
    fast = {}
    for name, parameter in layer.named_parameters():
        lent = parameter - 0.1 * parameter.detach() if "bias" in name else parameter.detach().clone().requires_grad_()
        fast[name] = watched(name, lent)
    leaf = watched("leaf", torch.randn(3, 4, requires_grad=True))
    inputs = {"x": watched("x", leaf.sin()), "y": [watched("y", leaf * 2)]}
    z = functional_call(layer, fast, (inputs,))
    if order == 1:
        z.sum().backward()
    else:
        gradient = torch.autograd.grad(z.sin().sum(), leaf, create_graph=True)[0]
        (gradient.square().sum() + z.sum()).backward()
    return z


@all_modes
def test_nothing_is_alive_after_the_backward_pass(mode):
    watched = Watched()
    z = output_of(mode, watched)
    # The leaves of a graph belong to it.
    assert not {"x", "y[0]", "y", "f.linear.bias"} & set(watched.alive())
    assert z.grad_fn is not None


@pytest.mark.parametrize("mode", ["implicit", "gmres", "phantom", "unrolled"])
def test_nothing_is_alive_after_a_second_backward_pass(mode):
    watched = Watched()
    z = output_of(mode, watched, order=2)
    assert not {"x", "y", "f.linear.bias"} & set(watched.alive())
    assert z.grad_fn is not None


@all_modes
def test_what_a_function_closes_over_is_let_go_of(mode):
    watched = Watched()

    def output():
        x = watched("x", torch.randn(3, 4, requires_grad=True).sin())
        plain = watched("constant", torch.randn(3, 4))
        z = fixed_point(
            lambda z: 0.5 * torch.tanh(z) + x + plain, torch.zeros(3, 4), solver="broyden", backward=MODES[mode]
        )
        z.sum().backward()
        return z

    z = output()
    assert watched.alive() == []
    assert z.grad_fn is not None


@all_modes
def test_a_graph_that_is_kept_can_be_used_again(mode):
    layer = FixedPointLayer(Cell(), solver="broyden", backward=MODES[mode], init=lambda inputs: torch.zeros(3, 4))
    x = torch.randn(3, 4, requires_grad=True)
    z = layer({"x": x, "y": [x]})
    first, second = (torch.autograd.grad(z.sum(), x, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z.sum(), x)


@all_modes
def test_hooks_on_saved_tensors_see_all_that_is_kept(mode):
    """Every tensor that is needed can be moved away; what stays alive without hooks is what they were shown."""
    layer = FixedPointLayer(Cell(), solver="broyden", backward=MODES[mode], init=lambda inputs: torch.zeros(3, 4))
    x = torch.randn(3, 4, requires_grad=True)

    def gradients(order):
        fast = {name: p * 0.9 for name, p in layer.named_parameters()}
        layer.eval()
        z = functional_call(layer, fast, ({"x": x.sin(), "y": [x.cos()]},))
        sources = [x, *layer.parameters()]
        found = torch.autograd.grad(z.sin().sum(), sources, create_graph=order == 2)
        return found if order == 1 else torch.autograd.grad(sum(g.square().sum() for g in found), sources)

    for order in (1, 2) if not mode.startswith("shine") else (1,):
        expected = gradients(order)
        seen = 0

        def pack(tensor):
            nonlocal seen
            seen += 1
            return tensor.detach().clone().numpy(), tensor.requires_grad

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: torch.from_numpy(packed[0])):
            found = gradients(order)
        assert seen
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        with torch.autograd.graph.save_on_cpu():
            found = gradients(order)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "unrolled"])
def test_only_what_hooks_saw_is_alive_before_the_backward_pass(mode):
    """With the saved tensors moved away, the inputs themselves are free."""
    watched = Watched()
    layer = FixedPointLayer(Cell(), solver="broyden", backward=MODES[mode], init=lambda inputs: torch.zeros(3, 4))

    def output():
        leaf = torch.randn(3, 4, requires_grad=True)
        inputs = {"x": watched("x", leaf.sin()), "y": [watched("y", leaf.cos())]}
        fast = {name: watched(name, p * 0.9) for name, p in layer.named_parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            return functional_call(layer, fast, (inputs,))

    z = output()
    assert watched.alive() == []
    z.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_weights_in_the_cache_of_pytorch_go_with_it():
    watched = Watched()
    cell = Cell()
    layer = FixedPointLayer(cell, init=lambda inputs: torch.zeros(3, 4))
    x = torch.randn(3, 4)
    with parametrize.cached():
        watched("weight", cell.linear.weight)
        z = layer({"x": x, "y": [x]})
    z.sum().backward()
    assert watched.alive() == []
    assert z.grad_fn is not None


@all_modes
def test_the_variables_of_callers_go_when_they_are_deleted(mode):
    """Also those that have nothing to do with the layer, which looks for its name in the model that calls it."""
    watched = Watched()
    layer = FixedPointLayer(Cell(), solver="broyden", backward=MODES[mode], init=lambda inputs: torch.zeros(3, 4))
    model = nn.ModuleDict({"layer": layer})
    unrelated = watched("unrelated", torch.ones(3))
    model["layer"]({"x": torch.ones(3, 4), "y": [torch.ones(3, 4)]}).sum().backward()
    del unrelated
    assert watched.alive() == []
