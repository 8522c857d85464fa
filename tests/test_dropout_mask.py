"""One dropout mask a solve: the same in every call of the map, forward and backward."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from implicit import FixedPointLayer, Implicit, dropout_mask
from solvers.linear import GMRES

BACKWARDS = {"unrolled": "unrolled", "implicit": Implicit(linear_solver=GMRES(rtol=1e-13))}
TIGHT = {"rtol": 1e-13, "atol": 1e-13, "max_steps": 200}
all_backwards = pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())

pytestmark = pytest.mark.usefixtures("double")


class Cell(nn.Module):
    """A map with two dropouts inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight.mul_(0.4 / torch.linalg.matrix_norm(layer.weight, 2))
        self.seen = []

    def forward(self, z, x, masks):
        self.seen.append(masks["in"])
        return self.b(masks["hidden"] * torch.tanh(self.a(masks["in"] * z))) + x


class Model(nn.Module):
    def __init__(self, backward):
        super().__init__()
        self.layer = FixedPointLayer(Cell(), backward=backward, **TIGHT)

    def forward(self, x):
        hidden = x.new_empty(len(x), 8)
        masks = {
            "in": dropout_mask(x, 0.5, training=self.training),
            "hidden": dropout_mask(hidden, 0.2, training=self.training),
        }
        return self.layer(x, masks)


def test_the_mask():
    like = torch.randn(100, 200, dtype=torch.float32, requires_grad=True)
    mask = dropout_mask(like, 0.2)
    assert mask.dtype == torch.float32
    assert not mask.requires_grad
    assert mask.unique().tolist() == [0, 1.25]
    assert abs((mask == 0).float().mean() - 0.2) < 0.02
    assert not torch.equal(dropout_mask(like, 0.2), mask)
    assert torch.equal(dropout_mask(like, 0.2, training=False), torch.ones(100, 200))
    assert torch.equal(dropout_mask(like, 0.0), torch.ones(100, 200))
    assert not dropout_mask(like, 1.0).any()
    with pytest.raises(ValueError, match="between 0 and 1, but got 1.5"):
        dropout_mask(like, 1.5)


@all_backwards
def test_one_mask_in_every_call_of_a_solve(backward):
    """Two solves before one backward pass: each is differentiated with its own mask."""
    model, x, y = Model(backward), torch.randn(6, 4), torch.randn(6, 4)
    seen = model.layer.f.seen
    z = model(x)
    first, calls = seen[0], len(seen)
    assert calls > 3
    assert all(torch.equal(mask, first) for mask in seen)
    other = model(y)
    assert not torch.equal(seen[-1], first)
    start = len(seen)
    z.sum().backward()
    assert all(torch.equal(mask, first) for mask in seen[start:])
    other.sum().backward()


@all_backwards
def test_derivatives_are_those_of_the_masked_map(backward):
    x = torch.randn(2, 4, requires_grad=True)
    masks = {"in": dropout_mask(x, 0.5), "hidden": dropout_mask(x.new_empty(2, 8), 0.5)}
    layer = FixedPointLayer(Cell(), backward=backward, **TIGHT)
    assert gradcheck(lambda x, *_: layer(x, masks), (x, *layer.parameters()))
    assert gradgradcheck(lambda x: layer(x, masks), (x,))


def test_vmap():
    """A mask of its own, or the same, for each lane, and per-sample gradients under it."""
    model, x = Model(BACKWARDS["implicit"]), torch.randn(1, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def run(_):
        return functional_call(model, parameters, (x,))

    lanes = vmap(run, randomness="different")(torch.zeros(5))
    assert not any(torch.equal(lanes[0], lane) for lane in lanes[1:])
    lanes = vmap(run, randomness="same")(torch.zeros(5))
    assert all(torch.allclose(lanes[0], lane) for lane in lanes)

    def loss(p, x, mask):
        masks = {"in": mask.unsqueeze(0), "hidden": torch.ones(1, 8)}
        return functional_call(model.layer, p, (x.unsqueeze(0), masks)).sum()

    layer_parameters = {name: p.detach() for name, p in model.layer.named_parameters()}
    xs, each = torch.randn(3, 4), dropout_mask(torch.empty(3, 4))
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(layer_parameters, xs, each)
    model.layer(xs, {"in": each, "hidden": torch.ones(3, 8)}).sum().backward()
    for name, parameter in model.layer.named_parameters():
        assert torch.allclose(per_sample[name].sum(0), parameter.grad)


def test_compiles_to_one_graph():
    mask = torch.compile(lambda x: dropout_mask(x, 0.2), fullgraph=True, backend="aot_eager")(torch.randn(50, 20))
    assert torch.equal(mask.unique(), torch.tensor([0, 1.25]))


@all_backwards
def test_autocast_and_eval_mode(backward):
    model, x = Model(backward).float(), torch.randn(6, 4, dtype=torch.float32)
    model.layer.rtol, model.layer.atol = 1e-2, 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(x)
    z.sum().backward()
    assert z.dtype == torch.float32
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model.layer.f.seen[-1], torch.ones(6, 4))
