"""Soft spectral normalization: its bound under training, its gradient, and how it travels with a module."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrize

from implicit import spectral_norm


def sigma(weight):
    return torch.linalg.matrix_norm(weight.detach().double(), 2).item()


def original(layer):
    return layer.parametrizations.weight.original


def test_normalized_at_once_and_in_eval_mode():
    """The singular vectors are settled at construction, so that no training step is needed."""
    for shape in ((40, 60), (60, 40), (64, 64)):
        layer = nn.Linear(*shape)
        nn.init.normal_(layer.weight)
        layer = spectral_norm(layer.eval(), coeff=0.9)
        assert sigma(layer.weight) == pytest.approx(0.9, rel=0.01)


def test_soft():
    layer = nn.Linear(20, 20)
    before = layer.weight.detach() * (0.5 / sigma(layer.weight))
    layer.weight.data.copy_(before)
    spectral_norm(layer, coeff=0.9)
    assert torch.equal(layer.weight, before)
    original(layer).data.mul_(10)
    assert sigma(layer.weight) == pytest.approx(0.9, rel=0.01)


def test_sigma_is_tracked_under_training():
    torch.manual_seed(1)
    layer = spectral_norm(nn.Linear(64, 96), coeff=0.9, n_power_iterations=8)
    layer.weight = torch.randn(96, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x, y = torch.randn(256, 64), torch.randn(256, 96)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()
        used = layer.weight.detach()
    assert sigma(original(layer)) > 1
    assert sigma(used) == pytest.approx(0.9, rel=0.02)


def test_power_iteration_advances_in_training_only():
    layer = spectral_norm(nn.Linear(8, 8), n_power_iterations=1)
    original(layer).data.normal_()
    norm = layer.parametrizations.weight[0]
    before = norm.u.clone()
    layer.eval()
    layer(torch.ones(1, 8))
    assert torch.equal(norm.u, before)
    layer.train()
    layer(torch.ones(1, 8))
    assert not torch.equal(norm.u, before)


def test_gradient():
    layer = spectral_norm(nn.Linear(4, 5).double(), coeff=0.5).eval()
    weight = original(layer).detach().clone().requires_grad_()
    norm = layer.parametrizations.weight[0]
    norm.settle(weight)

    def exact(w):
        return w / (torch.linalg.matrix_norm(w, 2) / 0.5).clamp_min(1.0)

    assert gradcheck(norm, (weight,))
    found = torch.autograd.grad(norm(weight).square().sum(), weight)[0]
    expected = torch.autograd.grad(exact(weight).square().sum(), weight)[0]
    assert torch.allclose(found, expected, rtol=1e-6)


def test_two_forwards_before_one_backward():
    layer = spectral_norm(nn.Linear(6, 6))
    original(layer).data.mul_(10)
    x = torch.randn(3, 6)
    (layer(x).sum() + layer(x).square().sum()).backward()
    assert original(layer).grad.isfinite().all()
    loss = layer.eval()(x).sum()
    layer.train()(x)
    loss.backward()


def test_copies_dtypes_and_state_dicts():
    layer = spectral_norm(nn.Linear(6, 7))
    layer.weight = torch.randn(7, 6)
    layer.eval()
    x = torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert original(twin) is not original(layer)
    fresh = spectral_norm(nn.Linear(6, 7)).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    double = copy.deepcopy(layer).double()
    assert double.weight.dtype == torch.float64
    assert torch.allclose(double(x.double()), layer(x).double(), atol=1e-6)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    assert sigma(half.weight) == pytest.approx(0.9, rel=0.02)
    assert torch.allclose(half.train()(x.bfloat16()).float(), layer(x), atol=0.05)


def test_sigma_is_float32_under_autocast():
    layer = spectral_norm(nn.Linear(32, 32))
    layer.weight = torch.randn(32, 32)
    layer.eval()
    expected = layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, expected)
        assert layer(torch.ones(1, 32)).dtype == torch.bfloat16


def test_assignment_settles_the_singular_vectors():
    layer = spectral_norm(nn.Linear(10, 12)).eval()
    weight = torch.randn(12, 10)
    layer.weight = weight
    assert torch.equal(original(layer), weight)
    assert sigma(layer.weight) == pytest.approx(0.9, rel=0.01)


def test_removal_leaves_the_normalized_weight():
    layer = spectral_norm(nn.Linear(5, 5))
    original(layer).data.mul_(10)
    layer.eval()
    used = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, used)


def test_zero_weight():
    layer = nn.Linear(3, 3)
    layer.weight.data.zero_()
    assert torch.equal(spectral_norm(layer).weight, torch.zeros(3, 3))


def test_compiles():
    layer = spectral_norm(nn.Linear(6, 6)).eval()
    x = torch.randn(2, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)


def test_refusals():
    with pytest.raises(TypeError, match="of an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, got a ConvTranspose2d"):
        spectral_norm(nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(ValueError, match=r"coeff=...\) must be > 0, got 0"):
        spectral_norm(nn.Linear(2, 2), coeff=0)
    with pytest.raises(ValueError, match="n_power_iterations=.* must be a positive integer, got 0"):
        spectral_norm(nn.Linear(2, 2), n_power_iterations=0)
    with pytest.raises(ValueError, match="normalized already"):
        spectral_norm(spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="must be 'power', 'gram' or 'exact', got 'svd'"):
        spectral_norm(nn.Linear(2, 2), method="svd")
    with pytest.raises(ValueError, match="n_gram_iterations=.* must be a positive integer, got 0"):
        spectral_norm(nn.Linear(2, 2), method="gram", n_gram_iterations=0)
    with pytest.raises(ValueError, match=r"depends on the size .* got input_size=None. Give input_size, .* 2 integers"):
        spectral_norm(nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match=r"only for convolutions, got \(4,\) with an nn.Linear"):
        spectral_norm(nn.Linear(2, 2), input_size=(4,))
    with pytest.raises(ValueError, match=r"input_size=\(4, 4\) is for method='power'"):
        spectral_norm(nn.Conv2d(2, 2, 3), method="gram", input_size=(4, 4))
    with pytest.raises(ValueError, match="padding_mode='reflect', which repeats a part of the input"):
        spectral_norm(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), method="exact")
    with pytest.raises(ValueError, match=r"circular padding \(\(2, 2\),\) of a kernel that reaches \(2,\)"):
        spectral_norm(nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"), method="exact")
