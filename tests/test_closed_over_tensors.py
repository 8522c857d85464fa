"""Gradients of tensors that a map refers to without taking them as arguments, wherever it uses them."""

import functools
import types
import warnings

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, InvertibleResidual, differentiable, fixed_point, root
from implicit.autograd.modules_used import references_of

pytestmark = pytest.mark.usefixtures("double")
OPTIONS = {"solver": "picard", "rtol": 1e-10, "max_steps": 200}


class Experts:
    """Two experts, and routers that send the start z = 0 to the first one and all later states to the second one."""

    def __init__(self):
        self.both = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(2))
        self.named = {"first": self.both[0], "second": self.both[1]}
        self.spare = nn.Linear(3, 3).double()
        weights = [expert.weight for expert in self.both]
        self.leaves = [weight.detach().clone().requires_grad_() for weight in weights]
        # Intermediate results, of which one shares its leaf with the other.
        self.results = (self.leaves[0] * 2, self.leaves[1] * 2 + self.leaves[0])

    def route(self, z, x):
        return routed(z, x, list(self.both))

    def __call__(self, z, x):
        return self.route(z, x)


def routed(z, x, experts):
    index = (z.sum(1) > 0.1).long()
    out = torch.zeros_like(z)
    for i, expert in enumerate(experts):
        rows = (index == i).nonzero().squeeze(1)
        if len(rows):
            call = expert if isinstance(expert, nn.Module) else functools.partial(nn.functional.linear, weight=expert)
            out = out.index_put((rows,), 0.2 * torch.tanh(call(z[rows])))
    return out + x


GLOBAL = Experts()


def global_route(z, x):
    return routed(z, x, list(GLOBAL.both))


def by_another_function(z, x):
    return global_route(z, x)


def closing_over(experts):
    return lambda z, x: routed(z, x, experts)


class Closing(nn.Module):
    """A module that does not have the experts itself: what its class, a list of it and its forward refer to counts."""

    shared = GLOBAL.leaves

    def __init__(self, experts=None):
        super().__init__()
        self.listed = experts

    @property
    def of_class(self):
        return self.shared

    def helper(self, z, x):
        return routed(z, x, self.of_class)

    def forward(self, z, x):
        return self.helper(z, x) if self.listed is None else routed(z, x, self.listed)


class Inheriting(Closing):
    def forward(self, z, x):
        return super().helper(z, x) if self.listed is None else super().forward(z, x)


class Static(nn.Module):
    @staticmethod
    def expert(z, x):
        return by_another_function(z, x)

    @classmethod
    def of_class(cls, z, x):
        return cls.expert(z, x)

    def forward(self, z, x):
        return self.expert(z, x)


class Slots:
    __slots__ = ("both", "other")

    def __init__(self, both):
        self.both = both


class GlobalForward(nn.Module):
    def forward(self, z, x):
        return by_another_function(z, x)


class Inherited(Experts):
    def __init__(self, experts):
        vars(self).update(vars(experts))

    def __call__(self, z, x):
        return super().__call__(z, x)


def with_forward(forward):
    module = nn.Identity()
    module.forward = forward
    return module


def closing_over_module(module):
    return lambda z, x: module(z, x)


def with_slots(held):
    return lambda z, x: routed(z, x, list(held.both))


def nested_in(f):
    inner = FixedPointLayer(f, init=torch.zeros_like, **OPTIONS)
    return lambda z, x: 0.2 * inner(z) + x


# A map of the experts, by how it refers to them; the last ones to tensors.
REFERENCES = {
    "closure": lambda e: closing_over(e.both),
    "list": lambda e: closing_over(list(e.both)),
    "dict": lambda e: lambda z, x: routed(z, x, [*e.named.values()]),
    "partial": lambda e: functools.partial(routed, experts=(e.both[0], e.both[1])),
    "global": lambda e: global_route,
    "function": lambda e: by_another_function,
    "defaults": lambda e: lambda z, x, experts=e.both, *, _=e.named: routed(z, x, experts),
    "comprehension": lambda e: lambda z, x: routed(z, x, [e.both[i] for i in range(2)]),
    "method": lambda e: e.route,
    "object": lambda e: e,
    "attribute": lambda e: lambda z, x: e.route(z, x),
    "super": lambda e: Inherited(e),
    "slots": lambda e: with_slots(Slots(e.both)),
    "static method": lambda e: lambda z, x: Static.expert(z, x),
    "class method": lambda e: lambda z, x: Static.of_class(z, x),
    "module, static method": lambda e: Static(),
    "module, method of the base": lambda e: Inheriting(),
    "module, global": lambda e: GlobalForward(),
    "module, list": lambda e: Closing(list(e.both)),
    "module in a function": lambda e: closing_over_module(Closing(list(e.both))),
    "module, forward of its own": lambda e: with_forward(closing_over(list(e.both))),
    "module, super": lambda e: Inheriting(e.leaves),
    "module, class": lambda e: Closing(),
    "nested layer": lambda e: nested_in(closing_over(list(e.both))),
    "leaves": lambda e: closing_over(e.leaves),
    "results": lambda e: closing_over(e.results),
    "one result": lambda e: closing_over([e.leaves[0], e.results[1]]),
}


OF_THE_FILE = {"global", "function", "static method", "class method"}
OF_THE_FILE |= {"module, global", "module, class", "module, static method", "module, method of the base"}


def gradients(f, experts, x, **options):
    """The gradients to the experts, by all the ways that a map takes them."""
    tensors = [*experts.both.parameters(), *experts.leaves]
    z = FixedPointLayer(f, **options, **OPTIONS)(x)
    every = [*tensors, *experts.spare.parameters()]
    found = torch.autograd.grad(z.sin().sum(), every, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=False)], found


@pytest.mark.parametrize("backward", ["implicit", "neumann"])
@pytest.mark.parametrize("reference", REFERENCES)
def test_tensors_that_are_used_away_from_the_start_only_get_their_gradients(reference, backward):
    experts = GLOBAL if reference in OF_THE_FILE else Experts()
    x = torch.rand(4, 3) + 1
    f = REFERENCES[reference](experts)
    expected, _ = gradients(f, experts, x, backward="unrolled")
    found, every = gradients(f, experts, x, backward=backward)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert any(map(torch.any, found))
    assert every[-1] is every[-2] is None  # of the expert that is not used


@pytest.mark.parametrize("shared", [False, True])
def test_the_history_of_an_intermediate_result_counts_once(shared):
    """A result of one part of a module that the map closes over, beside the whole of it or another part."""
    net = nn.ModuleDict({"inject": nn.Linear(3, 3), "cell": nn.Linear(3, 3)})
    x = torch.rand(2, 3)

    def gradient(backward):
        h = net["inject"](x)
        cell = net if shared else net["cell"]

        def f(z):
            linear = cell["cell"] if shared else cell
            return 0.2 * torch.tanh(linear(z) + h)

        z = fixed_point(f, torch.zeros(2, 3), backward=backward, **OPTIONS)
        return torch.autograd.grad(z.sum(), [*net.parameters()])

    torch.testing.assert_close(gradient("implicit"), gradient("unrolled"), rtol=1e-6, atol=1e-9)


def test_results_that_the_map_keeps_change_nothing():
    """Those of its own calls, also of an earlier solve, whose history a backward pass has freed."""
    kept = []

    def gradient(backward):
        weight, before = torch.full((3,), 0.3, requires_grad=True), torch.ones(3, requires_grad=True)
        h = 2 * before

        def f(z):
            kept.append(torch.tanh(weight * z + h))
            return kept[-1]

        z = fixed_point(f, torch.zeros(2, 3), backward=backward, **OPTIONS)
        return torch.autograd.grad(z.sum(), (weight, before))

    expected = gradient("unrolled")
    for _ in range(3):
        torch.testing.assert_close(gradient("implicit"), expected, rtol=1e-6, atol=1e-9)


def test_only_what_the_code_names_counts():
    """A frozen cell of a module of which other parts are trained needs no backward pass."""
    net = nn.Module()
    net.cell, net.head, net.scale = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3), 0.2
    x = torch.rand(2, 3, requires_grad=True)
    z = fixed_point(lambda z: 0.2 * net.cell(z) + torch.ones(x.shape), torch.zeros(2, 3), **OPTIONS)
    assert not z.requires_grad
    assert references_of(lambda z: net.scale * net.cell(z)) == [net.cell]
    assert references_of(lambda z: net.forward(z)) == [net]
    assert references_of(net.zero_grad) == [net]


class Plain:
    """Not a module: what its method reads of it counts."""

    def __init__(self) -> None:
        self.weight, self.other = torch.ones(1), torch.ones(1)

    def after_a_store(self, z):
        return [y := torch.tanh(z), self.weight * y][1]

    def after_another_variable(self, z):
        return z * self.weight

    def within_a_comprehension(self, z):
        return sum(self.weight * part for part in [z])


@pytest.mark.parametrize("name", ["after_a_store", "after_another_variable", "within_a_comprehension"])
def test_what_a_method_reads_of_its_owner_counts(name):
    """Versions of Python differ in which instructions load a variable."""
    plain = Plain()
    assert references_of(getattr(plain, name)) == [plain.weight]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backward", ["implicit", "neumann", "auto", "shine", "jfb", "phantom", "checkpointed"])
def test_hooks_of_tensors_run_once(backward, create_graph):
    """Those of leaves and of intermediate results, and what is retained of these."""

    def run(mode, hooked):
        torch.manual_seed(0)
        net, h = nn.Linear(3, 3), torch.full((2, 3), 0.1, requires_grad=True)
        h = 2 * h
        h.retain_grad()
        seen = []
        if hooked:
            for tensor in (net.weight, h):
                tensor.register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)
        options = {"solver": "broyden" if mode == "shine" else "picard", "rtol": 1e-12, "max_steps": 60}
        z = fixed_point(lambda z: 0.3 * torch.tanh(net(z)) + h, torch.zeros(2, 3), backward=mode, **options)
        z.square().sum().backward(create_graph=create_graph)
        return [net.weight.grad.detach(), net.bias.grad.detach(), h.grad.detach()], seen

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")  # PyTorch's
        plain, _ = run(backward, False)
        hooked, seen = run(backward, True)
    torch.testing.assert_close(hooked, [2 * plain[0], plain[1], 2 * plain[2]])
    assert len(seen) == 2
    torch.testing.assert_close(sorted(seen, key=len), sorted([plain[0], plain[2]], key=len))


@pytest.mark.parametrize("backward", ["implicit", "neumann", "auto", "jfb", "phantom", "unrolled"])
def test_parameters_may_be_frozen_before_the_backward_pass(backward):
    net, x = nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)
    gradients = []
    for freeze in (False, True):
        z = fixed_point(lambda z, x: 0.3 * torch.tanh(net(z)) + x, torch.zeros(2, 3), x, backward=backward, **OPTIONS)
        net.requires_grad_(not freeze)
        gradients += torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(*gradients)


class Odd(nn.Module):
    """What cannot be looked into is left alone: a forward that is no function or takes anything, and properties."""

    forward = functools.partialmethod(lambda self, factor, z, x: factor * torch.tanh(self.read * z) + x, 0.5)

    @property
    def read(self):
        return getattr(self, "value", 1.0)

    def __getattr__(self, name):
        raise AttributeError(name)


class WithoutSelf(nn.Module):
    def forward(*args):
        return 0.5 * torch.tanh(args[1]) + args[2]


class SuperProperty(WithoutSelf):
    @property
    def broken(self):
        raise RuntimeError

    def forward(self, z, x):
        return super().forward(z, x) + (super().broken if z is None else 0)


@pytest.mark.parametrize("make", [Odd, WithoutSelf, SuperProperty, lambda: torch.jit.script(nn.Tanh())])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_modules_that_cannot_be_looked_into(make):
    module, x = make(), torch.ones(2, 3, requires_grad=True)

    def f(z, x):
        return 0.5 * module(z) + x if isinstance(module, torch.jit.ScriptModule) else module(z, x)

    z = fixed_point(f, torch.zeros(2, 3), x, **OPTIONS)
    expected = fixed_point(f, torch.zeros(2, 3), x, backward="unrolled", **OPTIONS)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value in (z, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_functions_of_other_files_are_not_looked_into():
    module = types.ModuleType("elsewhere")
    exec("weight = None\ndef product(z):\n    return z * weight", vars(module))
    module.weight = torch.ones(1)
    product = module.product
    namespace = {"product": product, "torch": torch}
    exec("def f(z):\n    return torch.tanh(product(z))", namespace)
    assert references_of(namespace["f"]) == []
    assert references_of(lambda z: product(z)) == [module.weight]


@pytest.mark.parametrize("solve", ["root", "differentiable", "inverse"])
def test_other_solves_find_them_too(solve):
    weights = [torch.full((3,), 0.1, requires_grad=True), torch.full((3,), 0.3, requires_grad=True)]
    layers = nn.ParameterList(weights)
    x = torch.rand(2, 3) + 1

    def g(z):  # takes the first weights at z = 0 and the second ones elsewhere
        return z * (layers[1] if z.sum() > 0 else layers[0])

    if solve == "root":
        z = root(lambda z: z + g(z) - x, torch.zeros(2, 3))
    elif solve == "inverse":
        z = InvertibleResidual(lambda z, held=[layers]: g(z)).inverse(x)
    else:
        z = differentiable(optimality=lambda z, x: z + g(z) - x)(lambda x: x / 1.3)(x)
    z.sum().backward()
    torch.testing.assert_close(layers[1].grad, (-x / 1.69).sum(0), rtol=1e-5, atol=1e-8)


def test_nothing_is_looked_up_without_gradients(monkeypatch):
    def refuse(f):
        raise AssertionError

    monkeypatch.setattr("implicit.autograd.explicit_map.references_of", refuse)
    answer = differentiable(optimality=lambda z, x: z - x)(lambda x: x)
    with torch.no_grad():
        FixedPointLayer(global_route, **OPTIONS)(torch.ones(1, 3))
        answer(torch.ones(1, 3))
