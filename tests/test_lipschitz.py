"""Lipschitz bounds: activation constants against their slopes, compositions against maps, and what is refused."""

import math
import warnings
from decimal import Decimal

import pytest
import torch
from torch import nn

from implicit import lipschitz_bound, spectral_norm

ACTIVATIONS = [
    nn.CELU(0.7),
    nn.ELU(),
    nn.ELU(1.5),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.Hardtanh(),
    nn.Identity(),
    nn.LeakyReLU(),
    nn.LeakyReLU(-3.0),
    nn.LogSigmoid(),
    nn.Mish(),
    nn.PReLU(init=-1.5),
    nn.RReLU(1.5, 1.5),
    nn.ReLU(),
    nn.ReLU6(),
    nn.SELU(),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Softplus(beta=2.0),
    nn.Softshrink(),
    nn.Softsign(),
    nn.Tanh(),
    nn.Tanhshrink(),
]


def norm_of(module, *shape):
    """The spectral norm of a linear module on inputs of this shape, from its dense matrix."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return torch.linalg.matrix_norm((module(basis) - module(torch.zeros_like(basis))).flatten(1), 2).item()


@pytest.mark.parametrize("module", ACTIVATIONS, ids=repr)
def test_activation_constants_are_the_largest_slopes(module):
    x = torch.linspace(-30, 30, 2_000_001, dtype=torch.float64, requires_grad=True)
    module = module.double()
    slope = torch.autograd.grad(module(x[:, None]).sum(), x)[0].abs().max().item()
    bound = lipschitz_bound(module).item()
    # PyTorch's slopes have constants in float32; LogSigmoid's supremum is a limit.
    assert slope * (1 - 5e-8) <= bound <= slope * (1 + 1e-4)


@pytest.mark.parametrize(
    ("module", "constant"),
    [
        (nn.GELU(), "1.12890414518515478634"),
        (nn.GELU("tanh"), "1.12899306865877176546"),
        (nn.Hardsigmoid(), "0.16666666666666666667"),
        (nn.Mish(), "1.08849816125125786123"),
        (nn.SELU(), "1.75809934084737685994"),
        (nn.SiLU(), "1.09983932012886691696"),
    ],
    ids=repr,
)
def test_constants_are_rounded_up_from_full_precision(module, constant):
    excess = Decimal(lipschitz_bound(module).item()) - Decimal(constant)  # a float is a decimal exactly
    assert 0 < excess < Decimal("5e-16")


def test_softmax():
    jacobian = torch.autograd.functional.jacobian(nn.Softmax(dim=0), torch.tensor([0.0, 0.0, -40.0]).double())
    assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(lipschitz_bound(nn.Softmax(dim=0)).item())


def test_layers_have_the_norm_of_their_operator():
    linear = nn.Linear(7, 5).double()
    assert lipschitz_bound(linear).item() == pytest.approx(norm_of(linear, 7), rel=1e-12)
    assert lipschitz_bound(linear).item() >= norm_of(linear, 7)
    conv = nn.Conv1d(2, 3, 3, stride=2, padding=1).double()
    assert norm_of(conv, 2, 40) <= lipschitz_bound(conv).item() <= 1.03 * norm_of(conv, 2, 40)
    norm = nn.BatchNorm2d(3).double().eval()
    norm.running_var.copy_(torch.tensor([0.5, 2.0, 4.0]))
    norm.weight.data.copy_(torch.tensor([0.1, -2.0, 2.0]))
    assert lipschitz_bound(norm).item() == pytest.approx(norm_of(norm, 3, 2, 2), rel=1e-12)
    for same in (nn.Flatten(), nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Unflatten(1, (2, 2))):
        assert norm_of(same, 4, 2, 2) == lipschitz_bound(same).item() == 1


@pytest.mark.parametrize("threshold", [-800.0, 0.0, 2.0, 10.0, 13.0, 14.0, 20.0, 100.0])
@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_softplus_has_a_bound_if_its_drop_at_the_threshold_is_below_rounding(beta, threshold):
    softplus = nn.Softplus(beta, threshold)
    at = torch.tensor(threshold / beta, dtype=torch.float64)
    near = 1e-12 * (1 + at.abs())
    below, above = softplus(at - near), softplus(at + near)
    if below - above > 1e-10 + 2**-23 * below.abs():
        with pytest.raises(ValueError, match=f"Softplus with threshold={threshold} has no Lipschitz constant"):
            lipschitz_bound(softplus)
    else:
        assert lipschitz_bound(softplus).item() == 1


def test_dropout():
    dropout = nn.Dropout(0.5)
    assert lipschitz_bound(dropout).item() == norm_of(dropout, 50) == 2
    assert lipschitz_bound(dropout.eval()).item() == 1
    assert lipschitz_bound(nn.Dropout(1.0)).item() == 0


def test_sequential_multiplies():
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.SiLU(), nn.Linear(8, 4)), nn.Sigmoid()).double()
    expected = norm_of(net[0], 6) * 1.0998393201288669 * norm_of(net[1][1], 8) / 4
    assert lipschitz_bound(net).item() == pytest.approx(expected, rel=1e-12)
    x = torch.randn(200, 6).double()
    jacobians = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), x).transpose(0, 1)  # (200, 4, 6)
    assert torch.linalg.matrix_norm(jacobians, 2).max() <= lipschitz_bound(net)
    assert lipschitz_bound(nn.Sequential()).item() == 1


def test_the_bound_of_normalized_layers_is_certified():
    for method in ("gram", "exact"):
        layer = spectral_norm(nn.Linear(30, 30), coeff=0.8, method=method)
        layer.weight = torch.randn(30, 30)
        assert lipschitz_bound(nn.Sequential(layer, nn.ReLU())).item() <= 0.8
    # Power iteration is not advanced by being looked at, and not believed.
    layer = spectral_norm(nn.Linear(30, 30), coeff=0.8, n_power_iterations=1)
    layer.parametrizations.weight.original.data.normal_()
    before = layer.parametrizations.weight[0].u.clone()
    assert lipschitz_bound(layer).item() > 0.9
    assert torch.equal(layer.parametrizations.weight[0].u, before)
    assert all(module.training for module in layer.modules())


def test_differentiable():
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = lipschitz_bound(net)
    for _ in range(3):
        optimizer.zero_grad()
        lipschitz_bound(net).backward()
        optimizer.step()
    assert lipschitz_bound(net) < 0.8 * before


class Residual(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def test_constants_of_other_modules():
    net = nn.Sequential(nn.ReLU(), Residual(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"does not know the module '1', a Residual.*known={Residual: ...}"):
        lipschitz_bound(net)
    assert lipschitz_bound(net, known={Residual: 7}).item() == 7
    found = lipschitz_bound(net, known={Residual: lambda m: 1 + lipschitz_bound(m.branch)})
    assert found.item() == pytest.approx(1 + norm_of(net[1].branch.double(), 3), rel=1e-6)
    assert lipschitz_bound(net, known={Residual: 2, nn.ReLU: 0.5}).item() == 1


def test_a_subclass_counts_if_it_keeps_the_forward():
    class Named(nn.Tanh):
        pass

    class Doubled(nn.Tanh):
        def forward(self, x):
            return 2 * super().forward(x)

    assert lipschitz_bound(Named()).item() == 1
    with pytest.raises(TypeError, match="does not know the module a Doubled"):
        lipschitz_bound(Doubled())


def test_refusals():
    with pytest.raises(ValueError, match="LayerNorm has no useful Lipschitz constant"):
        lipschitz_bound(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="BatchNorm1d with the statistics of the batch"):
        lipschitz_bound(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="CELU with alpha=-1.0 < 0"):
        lipschitz_bound(nn.CELU(-1.0))
    with pytest.raises(ValueError, match="no certified bound .* padding_mode='reflect'"):
        lipschitz_bound(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(TypeError, match="does not know the module a ConvTranspose2d"):
        lipschitz_bound(nn.ConvTranspose2d(2, 2, 3))


def test_a_layer_that_is_used_twice_counts_twice():
    layer = nn.Linear(2, 2, bias=False)
    nn.init.eye_(layer.weight).data.mul_(3.0)
    assert abs(float(lipschitz_bound(nn.Sequential(layer, nn.Tanh(), layer)).detach()) - 9.0) < 1e-6


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_a_layer_without_inputs_or_outputs_has_the_constant_zero(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, that there is nothing to initialize
        layer = nn.Linear(*shape)
    assert lipschitz_bound(layer) == 0
