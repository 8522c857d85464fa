"""The private names of PyTorch in use exist, behave as ``torch_internals`` says, and stand in that file only."""

import ast
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, stateless
from torch.nn.utils.parametrize import ParametrizationList

from implicit.autograd import torch_internals as internals

PACKAGE = Path(internals.__file__).parent.parent
PRIVATE_ROOTS = ("torch", "parametrize", "stateless", "forward_ad", "nn", "F")


def private_names(path):
    """Dotted accesses such as ``torch._C.f`` or ``forward_ad._current_level``."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            root, *rest = ast.unparse(node).split(".")
            if root in PRIVATE_ROOTS and any(part.startswith("_") for part in rest):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


# A documented optimizer primitive; and the pytrees, whose module has an underscore everywhere.
ALLOWED = {"torch._foreach_copy_"}


def test_private_names_stand_in_one_file():
    found = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if (names := set(private_names(path)) - ALLOWED)
    }
    assert list(found) == ["autograd/torch_internals.py"]


def test_every_private_name_is_listed():
    listed = internals.__doc__
    for name in set(private_names(Path(internals.__file__))):
        last = name.rpartition(".")[2]
        if last.startswith("_") and last != "_C" and not any(word in name for word in ("_functorch", "_vmapmode")):
            known = (
                "_parameters",
                "_buffers",
                "_remove_batch_dim",
                "_add_batch_dim",
                "_dispatch_keys",
                "_cache_enabled",
            )
            assert last in listed or last in known, name


def test_transforms_are_seen():
    seen = []

    def f(x):
        seen.append(internals.transform_active())
        return x.sin().sum()

    x = torch.ones(2)
    f(x)
    torch.func.grad(f)(x)
    torch.func.vmap(f)(x.expand(2, 2))
    torch.func.jvp(f, (x,), (x,))
    with forward_ad.dual_level():
        f(x)
    f(x)
    assert seen == [False, True, True, True, True, False]


def test_followed_tensors_and_levels():
    x = torch.ones(2)
    assert not internals.is_followed(x)
    assert internals.is_followed(x.clone().requires_grad_())
    found = []
    torch.func.grad(lambda x: found.append(internals.is_followed(x)) or x.sum())(x)
    torch.func.jvp(lambda x: found.append(internals.is_followed(x)) or x, (x,), (x,))
    torch.func.vmap(lambda x: found.append(internals.is_followed(x)) or x)(x)
    assert found == [True, True, False]
    levels = []
    torch.func.vmap(lambda x: levels.append(internals.vmap_levels(x)) or x)(x)
    torch.func.vmap(torch.func.grad(lambda x: levels.append(internals.vmap_levels(x)) or x))(x)
    assert [len(level) for level in levels] == [1, 1]
    assert internals.vmap_levels(x) == set()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert internals.is_followed(dual)
        assert not internals.is_followed(internals.without_tangent(dual))


def test_forward_mode_can_be_turned_on_again():
    x = torch.ones(2)
    with forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(False), internals.forward_mode_enabled():
        assert forward_ad.unpack_dual(forward_ad.make_dual(x, x).sin()).tangent is not None


BACKWARD_PASSES: list[tuple[bool, bool]] = []


class Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        BACKWARD_PASSES.append((internals.in_backward_pass(), internals.backward_pass_keeps_graph()))
        return g


def test_the_backward_pass_is_seen():
    x = torch.ones(2, requires_grad=True)
    assert not internals.in_backward_pass()
    BACKWARD_PASSES.clear()
    Spy.apply(x).sum().backward()
    y = Spy.apply(x).sum()
    y.backward(retain_graph=True)
    torch.autograd.grad(y, x, create_graph=True)
    assert BACKWARD_PASSES == [(True, False), (True, True), (True, True)]


def test_one_vector_at_a_time():
    shapes = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @internals.one_vector_at_a_time
        def backward(ctx, g):
            shapes.append(tuple(g.shape))
            assert not bool((g == 7).all())  # a decision, which a hidden dimension does not allow
            return (2 * g,)

    x = torch.ones(3, requires_grad=True)
    many = torch.eye(3)
    assert torch.equal(torch.autograd.grad(Double.apply(x), x, many, is_grads_batched=True)[0], 2 * many)
    assert shapes == [(3,)] * 3


class Source:
    def weight_of(self, parametrization):
        return torch.full((2, 2), 5.0) + 0 * internals.computed_weight(parametrization)


def parametrized():
    linear = nn.Linear(2, 2)
    parametrize.register_parametrization(linear, "weight", nn.Tanh())
    return linear


def test_weights_are_read_from_the_source_of_the_thread():
    linear = parametrized()
    plain = linear.weight
    token = internals.weight_source.set(Source())
    try:
        assert (linear.weight == 5).all()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(linear.weight))
        thread.start()
        thread.join()
        assert torch.equal(elsewhere[0], plain)
    finally:
        internals.weight_source.reset(token)
    assert torch.equal(linear.weight, plain)
    assert ParametrizationList.forward is not internals.computed_weight
    assert ParametrizationList.forward.__wrapped__ is internals.computed_weight
    assert internals.originals_of(linear.parametrizations.weight) == (linear.parametrizations.weight.original,)


def test_a_parametrized_module_is_scripted_as_before():
    scripted = torch.jit.script(parametrized())
    with pytest.raises(torch.jit.Error, match="Parametrization is not working with scripting"):
        scripted(torch.ones(1, 2))


def test_weights_in_the_cache():
    linear = parametrized()
    parametrization = linear.parametrizations.weight
    assert internals.cached_weights() == {}
    with parametrize.cached():
        weight = linear.weight
        assert internals.cached_weights()[parametrization] is weight
        other = torch.zeros(2, 2)
        with internals.in_cache({parametrization: other}):
            assert linear.weight is other
        assert linear.weight is weight
        internals.put_in_cache({parametrization: other})
        assert linear.weight is other
        saved = internals.copy_of_cache()
    assert linear.weight is not other
    with internals.reading_from_cache(saved):
        assert linear.weight is other


def test_loans_are_noted_and_repeated():
    tied = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": tied, "b": tied})
    lent = torch.ones(2, 2)
    seen = []

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            seen.extend(internals.current_loans())

    call = Call()
    torch.func.functional_call(call, {"model.a.weight": lent}, ())
    (loan,) = seen
    assert loan.module is call
    assert {name: tensor is lent for name, tensor in loan.tensors.items()} == {
        "model.a.weight": True,
        "model.b.weight": True,
    }
    assert internals.current_loans() == []
    own = tied.weight
    with internals.lending([loan]):
        assert tied.weight is lent
    assert tied.weight is own
    assert stateless._functional_call.__wrapped__ is internals._functional_call
