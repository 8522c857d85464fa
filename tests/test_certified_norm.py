"""Upper bounds of the spectral norm: they hold in floating point, are tight, and travel like any parametrization."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from implicit import spectral_norm
from implicit.spectral.singular_value_bounds import exact_bound, gram_bound

METHODS = ["gram", "exact"]


def sigma(weight):
    return torch.linalg.matrix_norm(weight.detach().double(), 2).item()


def original(layer):
    return layer.parametrizations.weight.original


# Matrices whose norm is known, as a float that it is exactly.
KNOWN = {
    "identity": (torch.eye(40), 1.0),
    "one of many equal": (torch.eye(30, 50).flip(0) * 3, 3.0),
    "rank one": (torch.ones(9, 16), 12.0),
    "wide": (torch.ones(1, 64), 8.0),
    "tall": (torch.ones(64, 1), 8.0),
    "scalar": (torch.tensor([[-0.7]], dtype=torch.float64), 0.7),
    "zero": (torch.zeros(5, 7), 0.0),
    "Jordan block": (torch.eye(20).roll(1, dims=0).triu(), 1.0),
    "graded": (torch.diag(torch.logspace(0, -30, 31, dtype=torch.float64)), 1.0),
    "huge": (torch.eye(6, 4) * 2.0**120, 2.0**120),
    "tiny": (torch.eye(6, 4) * 2.0**-120, 2.0**-120),
}


@pytest.mark.parametrize(("matrix", "norm"), KNOWN.values(), ids=KNOWN.keys())
def test_never_below_and_close(matrix, norm):
    rank = min(matrix.shape)
    for iterations in range(1, 12):
        bound = gram_bound(matrix, iterations).item()
        assert norm <= bound <= norm * rank ** (0.5 ** (iterations + 1)) * (1 + 1e-10) + 1e-300
    assert norm <= exact_bound(matrix).item() <= norm * (1 + 1e-10) + 1e-300


def test_never_below_on_random_matrices():
    for shape in ((3, 3), (17, 90), (90, 17), (64, 64)):
        batch = torch.randn(20, *shape, dtype=torch.float64)
        exact = torch.linalg.svdvals(batch)[:, 0]
        complex_batch = torch.complex(batch, batch.roll(1, dims=0))
        assert (exact_bound(batch) >= exact * (1 - 1e-15)).all()
        assert (exact_bound(batch) <= exact * (1 + 1e-11)).all()
        assert (gram_bound(batch, 6) >= exact).all()
        assert (gram_bound(batch, 6) <= 1.03 * exact).all()
        assert (gram_bound(complex_batch, 12) <= exact_bound(complex_batch) * 1.001).all()
        assert torch.allclose(exact_bound(complex_batch), torch.linalg.svdvals(complex_batch)[:, 0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_normalized_weight_never_exceeds_coeff(method, dtype):
    for shape in ((64, 64), (50, 20), (1, 1)):
        layer = spectral_norm(nn.Linear(*shape), coeff=0.9, method=method).to(dtype)
        for scale in (0.1, 1.0, 30.0):
            original(layer).data.normal_().mul_(scale)
            assert layer.weight.dtype == dtype
            assert sigma(layer.weight) <= 0.9
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert sigma(layer.weight) <= 0.9


@pytest.mark.parametrize("method", METHODS)
def test_soft_and_the_same_in_training(method):
    layer = nn.Linear(20, 20)
    nn.init.orthogonal_(layer.weight, gain=0.85)
    before = layer.weight.detach().clone()
    spectral_norm(layer, coeff=0.9, method=method)
    assert torch.equal(layer.weight, before)
    original(layer).data.mul_(10)
    assert sigma(layer.weight) == pytest.approx(0.9, rel=0.03)
    assert torch.equal(layer.train().weight, copy.deepcopy(layer).eval().weight)
    layer.weight = before
    assert torch.equal(original(layer), before)


@pytest.mark.parametrize(("method", "tolerance"), [("gram", 0.02), ("exact", 1e-9)])
def test_gradient(method, tolerance):
    layer = spectral_norm(nn.Linear(8, 6).double(), coeff=0.5, method=method, n_gram_iterations=12)
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    norm = layer.parametrizations.weight[0]
    assert torch.autograd.gradcheck(norm, (weight,))
    target = torch.randn(6, 8, dtype=torch.float64)
    found = torch.autograd.grad((norm(weight) * target).sum(), weight)[0]
    exact = weight / (torch.linalg.matrix_norm(weight, 2) / 0.5).clamp_min(1.0)
    expected = torch.autograd.grad((exact * target).sum(), weight)[0]
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("method", METHODS)
def test_finite_gradients_where_singular_values_coincide_or_vanish(method):
    for weight in (2 * torch.eye(5), torch.zeros(5, 5), 2 * torch.eye(5).roll(1, 0), torch.ones(5, 5)):
        layer = spectral_norm(nn.Linear(5, 5), method=method)
        layer.weight = weight
        layer.weight.square().sum().backward()
        assert original(layer).grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_no_buffers_and_loads_checkpoints_of_power_iteration(method):
    layer = spectral_norm(nn.Linear(6, 7), method=method)
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}
    layer.load_state_dict(layer.state_dict())
    tracked = spectral_norm(nn.Linear(6, 7))
    layer.load_state_dict(tracked.state_dict())
    assert torch.equal(original(layer), original(tracked))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    assert original(twin) is not original(layer)


@pytest.mark.parametrize("method", METHODS)
def test_functional_call_and_meta(method):
    layer = spectral_norm(nn.Linear(6, 7), method=method)
    x = torch.randn(3, 6)
    other = {name: 3 * parameter.detach() for name, parameter in layer.named_parameters()}
    found = functional_call(layer, other, (x,))
    layer.load_state_dict(other)
    assert torch.equal(found, layer(x))
    with torch.device("meta"):
        meta = spectral_norm(nn.Conv2d(4, 6, 3), method=method)
        assert meta(torch.empty(2, 4, 8, 8)).shape == (2, 6, 6, 6)


@pytest.mark.parametrize("method", METHODS)
def test_compiles(method):
    for layer, x in ((nn.Linear(6, 6), torch.randn(2, 6)), (nn.Conv1d(2, 3, 3), torch.randn(2, 2, 9))):
        spectral_norm(layer, method=method)
        original(layer).data.mul_(10)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)
        expected = torch.autograd.grad(layer(x).sum(), original(layer))[0]
        assert torch.allclose(torch.autograd.grad(compiled(x).sum(), original(layer))[0], expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_never_exceeds_coeff_on_a_gpu_with_tensor_cores(method, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    layer = spectral_norm(nn.Linear(256, 256).cuda(), coeff=0.9, method=method)
    for _ in range(3):
        original(layer).data.normal_()
        assert 0.89 < sigma(layer.weight) <= 0.9
