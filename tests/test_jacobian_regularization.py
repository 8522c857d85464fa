"""The Jacobian's norm as a loss, against dense Jacobians."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, vmap

from implicit import FixedPointLayer, Implicit, jacobian_regularization, spectral_norm
from implicit.diagnostics import spectral_radius
from solvers.linear import GMRES

pytestmark = pytest.mark.usefixtures("double")


class TanhMap(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.a = nn.Linear(size, size)

    def forward(self, z, x):
        return torch.tanh(self.a(z) + x)


def dense_jacobians(f, z, *inputs):
    """(B, D, D) of each sample."""
    whole = torch.autograd.functional.jacobian(lambda z: f(z, *inputs), z, create_graph=True)
    return torch.stack([whole[i, :, i] for i in range(len(z))])


def test_unbiased_against_the_dense_norm():
    f, z, x = TanhMap(), torch.randn(3, 4), torch.randn(3, 4)
    samples = torch.stack([jacobian_regularization(f, z, x) for _ in range(1000)]).detach()
    expected = dense_jacobians(f, z, x).detach().square().sum(dim=(1, 2)) / 4
    assert ((samples.mean(0) - expected).abs() < 4 * samples.std(0) / 1000**0.5).all()
    # One call with many vectors is their mean.
    many = jacobian_regularization(f, z, x, num_samples=1000)
    assert ((many - expected).abs() < 4 * samples.std(0) / 1000**0.5).all()


def test_orthogonal_rows_need_one_vector():
    """Signs have no variance there; normal vectors would."""
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    scale = torch.tensor([[0.5], [2.0]])
    assert torch.allclose(
        jacobian_regularization(lambda z: scale * (z @ rotation), torch.randn(2, 5)), scale[:, 0] ** 2
    )


def test_gradients_of_the_exact_norm():
    """To the parameters, to z and to the inputs, where one vector is exact: an elementwise map."""
    w = torch.randn(4, requires_grad=True)
    z, x = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)

    def f(z, x, w):
        return torch.tanh(w * z + x)

    found = torch.autograd.grad(jacobian_regularization(f, z, x, w).sum(), (z, x, w))
    exact = dense_jacobians(lambda z: f(z, x, w), z).square().sum() / 4
    for a, b in zip(found, torch.autograd.grad(exact, (z, x, w)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    closure = jacobian_regularization(lambda z: f(z, x, w), z)
    for a, b in zip(torch.autograd.grad(closure.sum(), (z, x, w)), found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    assert gradcheck(lambda *inputs: jacobian_regularization(f, *inputs), (z, x, w))


def test_pytrees_and_batch_dimensions():
    """A pytree is one state; more batch dimensions are more samples; the same signs give the same numbers."""
    f, z, x = TanhMap(), torch.randn(6, 4), torch.randn(6, 4)

    def estimate(f, z, *inputs, **options):
        return jacobian_regularization(f, z, *inputs, generator=torch.Generator().manual_seed(1), **options)

    expected = estimate(f, z, x)

    def split(z, x):
        first, second = f(torch.cat((z["a"], z["b"][0]), dim=1), x).split([1, 3], dim=1)
        return {"a": first, "b": [second]}

    found = estimate(split, {"a": z[:, :1], "b": [z[:, 1:]]}, x)
    assert torch.allclose(found, expected)
    found = estimate(f, z.view(2, 3, 4), x.view(2, 3, 4), batch_dims=2)
    assert torch.allclose(found, expected.view(2, 3))


def test_through_a_layer():
    """The loss of an implicit layer and the term on its solution share one linear solve; the gradient is exact."""
    layer = FixedPointLayer(
        lambda z, w: torch.tanh(w * z + 1), backward=Implicit(linear_solver=GMRES(rtol=1e-12)), rtol=1e-13, atol=1e-13
    )

    def loss(w):
        z = layer(w)
        return z.square().sum() + jacobian_regularization(layer.f, z, w).sum()

    w = torch.rand(3, 4, requires_grad=True)
    assert gradcheck(loss, (w,))
    assert torch.allclose(grad(loss)(w.detach()), torch.autograd.grad(loss(w), w)[0])
    samples = vmap(grad(lambda w: loss(w.unsqueeze(0))), randomness="different")(w.detach())
    assert torch.allclose(samples, grad(loss)(w.detach()))


def test_functional_call():
    class Regularized(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FixedPointLayer(TanhMap(), rtol=1e-13, atol=1e-13, max_steps=100)

        def forward(self, x):
            z = self.layer(x)
            return jacobian_regularization(self.layer.f, z, x, generator=torch.Generator().manual_seed(0)).sum()

    with torch.no_grad():
        model, x = Regularized(), torch.randn(2, 4)
        model.layer.f.a.weight.mul_(0.5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = grad(lambda p: functional_call(model, p, (x,)))(parameters)
    model(x).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4)


def test_it_keeps_a_map_easy_to_solve():
    """Training towards large outputs makes the map stiff; the term does not let it."""

    def radius(weight):
        torch.manual_seed(0)
        f, x = TanhMap(16), 0.1 * torch.randn(32, 16)
        layer = FixedPointLayer(f, on_failure="ignore", backward=Implicit(linear_solver=GMRES(max_steps=30)))
        optimizer = torch.optim.Adam(f.parameters(), lr=0.02)
        for _ in range(30):
            z = layer(x)
            loss = (z[:, :1] - 0.5 * torch.sign(x[:, :1])).square().mean()
            optimizer.zero_grad()
            (loss + weight * jacobian_regularization(f, z, x).mean()).backward()
            optimizer.step()
        return float(spectral_radius(f, layer(x), x).value.mean())

    assert radius(weight=5.0) < 0.7 * radius(weight=0.0)


def test_dtypes_and_modes():
    f = TanhMap().bfloat16()
    z = torch.randn(3, 4, dtype=torch.bfloat16)
    assert jacobian_regularization(f, z, z).dtype == torch.float32
    f, z = TanhMap(), torch.randn(3, 4)
    exact = jacobian_regularization(f, z, z, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f, z = f.float(), z.float()
        rough = jacobian_regularization(f, z, z, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rough.double(), exact, rtol=0.1)
    with torch.no_grad():
        assert not jacobian_regularization(f, z, z).requires_grad


def test_compiles_to_one_graph():
    """A scaled rotation, for which any signs give the exact norm."""
    f = nn.Linear(5, 5)
    with torch.no_grad():
        f.weight.copy_(1.5 * torch.linalg.qr(torch.randn(5, 5))[0])
    compiled = torch.compile(lambda z: jacobian_regularization(f, z).sum(), fullgraph=True, backend="aot_eager")
    term = compiled(torch.randn(2, 5))
    assert torch.allclose(term, torch.tensor(2 * 1.5**2))
    term.backward()
    # Homogeneous of degree 2 in the weight.
    assert torch.allclose((f.weight.grad * f.weight).sum(), 2 * term)


def test_parametrized_weights_are_computed_once():
    f = spectral_norm(nn.Linear(4, 4))
    used = []

    def twice(z):
        used.extend(f.weight.detach().clone() for _ in range(2))
        return f(z)

    jacobian_regularization(twice, torch.randn(2, 4))
    assert len(used) == 2
    assert torch.equal(*used)


def test_one_bad_sample_marks_itself():
    z = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
    term = jacobian_regularization(torch.sin, z)
    assert torch.allclose(term[0], z[0].cos().square().mean())
    assert term[1].isnan()


def test_refusals():
    z = torch.randn(2, 3)
    with pytest.raises(ValueError, match="num_samples must be a positive integer, got 0"):
        jacobian_regularization(torch.sin, z, num_samples=0)
    with pytest.raises(ValueError, match="must return the shape of the state"):
        jacobian_regularization(lambda z: z[:, :1], z)
