"""Spectral norms of convolutions, against the dense matrices of their operators."""

import copy
import math

import pytest
import torch
from torch import nn

from implicit import lipschitz_bound, spectral_norm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# The weights of the tables below.
torch.manual_seed(0)

# A layer, and the size of its inputs.
CERTIFIABLE = {
    "1d": (nn.Conv1d(3, 4, 3), (20,)),
    "1d, padded": (nn.Conv1d(3, 4, 5, padding=2), (20,)),
    "1d, padded by more than the kernel": (nn.Conv1d(2, 3, 3, padding=6), (9,)),
    "1d, even kernel": (nn.Conv1d(3, 4, 4, padding="same"), (15,)),
    "1d, one tap": (nn.Conv1d(5, 4, 1), (7,)),
    "1d, input shorter than the kernel": (nn.Conv1d(2, 2, 7, padding=6), (3,)),
    "1d, circular": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (12,)),
    "1d, circular, even kernel": (nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular"), (12,)),
    "1d, circular, less than the kernel": (nn.Conv1d(3, 4, 7, padding=2, padding_mode="circular"), (12,)),
    "1d, circular, longer than the input": (nn.Conv1d(3, 4, 7, padding=3, padding_mode="circular"), (4,)),
    "1d, circular, strided": (nn.Conv1d(3, 4, 3, stride=3, padding=1, padding_mode="circular"), (13,)),
    "1d, strided": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (21,)),
    "1d, stride beyond the kernel": (nn.Conv1d(3, 4, 2, stride=3), (20,)),
    "1d, dilated": (nn.Conv1d(3, 4, 3, dilation=3, padding="same"), (20,)),
    "1d, dilated and strided": (nn.Conv1d(3, 4, 4, dilation=3, stride=2, padding=3), (21,)),
    "1d, in groups": (nn.Conv1d(6, 4, 3, groups=2), (11,)),
    "2d": (nn.Conv2d(3, 4, 3, padding=1), (8, 7)),
    "2d, circular": (nn.Conv2d(3, 4, (3, 5), padding="same", padding_mode="circular"), (6, 8)),
    "2d, unequal": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=(1, 3), padding=(1, 0)), (9, 8)),
    "2d, patches": (nn.Conv2d(3, 8, 4, stride=4), (8, 12)),
    "2d, each channel by itself": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (6, 6)),
    "3d": (nn.Conv3d(2, 3, 3, padding=1), (4, 4, 4)),
    "3d, strided": (nn.Conv3d(2, 2, (2, 3, 1), stride=2, padding=(1, 1, 0)), (5, 4, 4)),
}
OTHERS = {
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (5, 6)),
    "replicate": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="replicate"), (6,)),
    "circular, repeated": (nn.Conv1d(2, 3, 3, padding=4, padding_mode="circular"), (6,)),
}


def norm_of(layer, size, weight=None):
    """The spectral norm of the layer's operator on inputs of this size, from its dense matrix in float64."""
    layer = copy.deepcopy(layer).double()
    layer.bias = None
    if weight is not None:
        layer.weight.data.copy_(weight)
    shape = (layer.in_channels, *size)
    dense = layer(torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)).flatten(1)
    return torch.linalg.matrix_norm(dense, 2).item()


@pytest.mark.parametrize(("layer", "size"), CERTIFIABLE.values(), ids=CERTIFIABLE.keys())
def test_certified_for_every_input(layer, size):
    for smaller in (size, tuple(max(1, n - 1) for n in size)):
        assert norm_of(layer, smaller) <= lipschitz_bound(layer).item()
    for method in ("gram", "exact"):
        normalized = spectral_norm(copy.deepcopy(layer), coeff=0.1, method=method)
        assert norm_of(layer, size, weight=normalized.weight.detach()) <= 0.1


def test_adversarial_kernels_do_not_exceed_the_bound():
    """Kernels whose response peaks between the frequencies of the grid."""
    layer = nn.Conv1d(1, 1, 7, padding="same", padding_mode="circular").double()
    for frequency in torch.rand(20, dtype=torch.float64) * math.pi:
        layer.weight.data.copy_(torch.cos(frequency * (torch.arange(7) - 3)).view(1, 1, 7))
        norm = norm_of(layer, (150,))
        assert norm <= lipschitz_bound(layer).item() <= 1.022 * norm


TIGHT = {
    "1d": (nn.Conv1d(2, 3, 3, padding=1), (120,)),
    "1d, strided": (nn.Conv1d(2, 3, 3, stride=2), (160,)),
    "1d, dilated and strided": (nn.Conv1d(2, 3, 3, stride=2, dilation=3), (200,)),
    "2d": (nn.Conv2d(1, 2, 3, padding=1), (28, 28)),
    "2d, circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (20, 20)),
}


@pytest.mark.parametrize(("layer", "size"), TIGHT.values(), ids=TIGHT.keys())
def test_tight_for_large_inputs(layer, size):
    assert lipschitz_bound(layer).item() <= 1.03 * norm_of(layer, size)


ONE_SIZE = OTHERS | {
    name: CERTIFIABLE[name]
    for name in (
        "1d, even kernel",
        "1d, circular",
        "1d, dilated and strided",
        "1d, in groups",
        "2d, unequal",
        "3d, strided",
    )
}


@pytest.mark.parametrize(("layer", "size"), ONE_SIZE.values(), ids=ONE_SIZE.keys())
def test_power_iteration_finds_the_norm_for_one_size(layer, size):
    norm, plain = norm_of(layer, size), layer
    layer = spectral_norm(copy.deepcopy(layer).double(), coeff=0.1, input_size=size)
    power = layer.parametrizations.weight[0]
    power.settle(layer.parametrizations.weight.original)
    assert 0.98 * norm <= power.sigma(layer.parametrizations.weight.original).item() <= norm * (1 + 1e-12)
    assert norm_of(plain, size, weight=layer.weight.detach()) == pytest.approx(0.1, rel=0.02)


def test_power_iteration_of_a_convolution_in_training():
    layer = spectral_norm(nn.Conv2d(3, 4, 3, padding=1), coeff=0.5, input_size=(8, 8), n_power_iterations=2)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    x, y = torch.randn(16, 3, 8, 8), torch.randn(16, 4, 8, 8)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()
        used = layer.weight.detach()
    assert norm_of(plain, (8, 8), weight=layer.parametrizations.weight.original.detach()) > 0.6
    assert norm_of(plain, (8, 8), weight=used) == pytest.approx(0.5, rel=0.03)
    fresh = spectral_norm(nn.Conv2d(3, 4, 3, padding=1), coeff=0.5, input_size=(8, 8)).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer.eval()(x))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, layer.eval().weight)
