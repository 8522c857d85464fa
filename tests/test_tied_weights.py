"""Symmetric couplings: each weight is there once, and the solution is where the energy is stationary."""

import copy

import pytest
import torch
from small_models import relative_error, small, trained_somewhat
from torch import nn
from torch.nn import functional as F

from imixer import IMLP


def tied(hidden_layers=2, **options):
    return IMLP(5, 6, hidden_layers=hidden_layers, h_ratio=1.5, tied=True, **options)


@pytest.mark.parametrize("norm", ["spectral", "none", "weight"])
@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_each_weight_is_kept_once(norm, hidden_layers):
    imlp = tied(hidden_layers, norm=norm)
    num_weights = 5 * 6 + [0, 6 * 9, 9 * 9][:hidden_layers][-1] + (6 * 9 if hidden_layers == 3 else 0)
    num_biases = 6 + 9 * (hidden_layers - 1) + 5
    scales = 9 * (hidden_layers - 1) if norm == "weight" else 0
    assert sum(parameter.numel() for parameter in imlp.parameters()) == num_weights + num_biases + scales
    fresh = tied(hidden_layers, norm=norm).eval()
    fresh.load_state_dict(imlp.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(fresh(x), imlp.eval()(x))
    assert torch.equal(copy.deepcopy(imlp)(x), imlp(x))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", ["spectral", "none", "weight"])
@pytest.mark.parametrize("hidden_solve", ["nested", "joint"])
def test_gradients_are_those_of_both_uses_of_a_weight(norm, hidden_solve):
    """An untied iMLP with the same weights and the missing biases zero: its gradients, added where they belong."""
    imlp = tied(3, norm=norm, hidden_solve=hidden_solve, n_iter=3).eval()
    untied = IMLP(5, 6, hidden_layers=3, h_ratio=1.5, norm="none", hidden_solve=hidden_solve, n_iter=3)
    with torch.no_grad():
        for number in (1, 3):
            up, ours = untied.get_submodule(f"fc_sn{number}"), imlp.get_submodule(f"fc_sn{number}")
            up.weight.copy_(ours.weight)
            up.bias.copy_(ours.bias)
            down = untied.get_submodule(f"fc_sn{number + 1}")
            down.weight.copy_(ours.weight.t())
            down.bias.zero_()
        untied.fc1.load_state_dict(imlp.fc1.state_dict())
        untied.fc2.weight.copy_(imlp.fc1.weight.t())
        untied.fc2.bias.copy_(imlp.fc2.bias)
    x = torch.randn(4, 5)
    weights = [layer.weight for layer in imlp.normalized_layers]
    output, expected = imlp(x), untied(x)
    assert relative_error(output, expected) < 1e-12
    output.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(imlp.fc1.weight.grad, untied.fc1.weight.grad + untied.fc2.weight.grad.t()) < 1e-12
    assert relative_error(imlp.fc2.bias.grad, untied.fc2.bias.grad) < 1e-12
    for number, weight in zip((1, 3), weights, strict=True):
        up, down = untied.get_submodule(f"fc_sn{number}"), untied.get_submodule(f"fc_sn{number + 1}")
        layer = imlp.get_submodule(f"fc_sn{number}")
        parameters = [parameter for name, parameter in layer.named_parameters() if "weight" in name]
        both = up.weight.grad + down.weight.grad.t()
        pulled_back = torch.autograd.grad(weight, parameters, both)  # through the normalization
        for parameter, gradient in zip(parameters, pulled_back, strict=True):
            assert relative_error(parameter.grad, gradient) < 1e-12


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("hidden_layers", [2, 3, 4])
def test_the_solution_is_stationary_for_the_energy(hidden_layers):
    """With activation tanh, the gradient of the Lagrangian sum(log cosh); without symmetry there is no such energy."""
    gradients = {}
    for is_tied in (True, False):
        torch.manual_seed(0)
        options = {"act_layer": nn.Tanh, "hidden_solve": "joint", "n_iter": 200, "coeff": 0.5}
        imlp = IMLP(5, 6, hidden_layers=hidden_layers, h_ratio=1.5, tied=is_tied, **options).eval()
        y = imlp.fc1(torch.randn(3, 5))
        couplings = imlp.couplings()
        z = imlp.fixed_point(y, *couplings)
        state = z if isinstance(z, tuple) else (z,)
        # The layers between those of the state, from their neighbours.
        layers = [None] * hidden_layers
        layers[::2] = state
        for k in range(1, hidden_layers, 2):
            above = couplings[k].from_above(layers[k + 1].tanh()) if k + 1 < hidden_layers else 0
            layers[k] = couplings[k - 1].from_below(layers[k - 1].tanh()) + above
        layers = [layer.detach().requires_grad_() for layer in layers]
        active = [layer.tanh() for layer in layers]
        currents = [y.detach(), *(coupling.up_bias for coupling in couplings)]
        energy = sum(
            (a * h).sum() - h.cosh().log().sum() - (b * a).sum()
            for a, h, b in zip(active, layers, currents, strict=True)
        )
        for coupling, below, above in zip(couplings, active[:-1], active[1:], strict=True):
            energy = energy - (above * F.linear(below, coupling.up)).sum()
        gradients[is_tied] = max(gradient.abs().max().item() for gradient in torch.autograd.grad(energy, layers))
    assert gradients[True] < 1e-12
    assert gradients[False] > 1e-2


@pytest.mark.parametrize("options", [{}, {"hidden_layers": 3, "hidden_solve": "joint"}, {"norm": "weight"}])
@pytest.mark.parametrize("backward", ["unrolled", "implicit"])
def test_every_parameter_of_a_tied_model_gets_a_gradient(options, backward):
    model = trained_somewhat(small(tied=True, backward=backward, n_iter=30, rtol=1e-2, coeff=0.5, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("original0"):  # lengths of rows under weight normalization, which bounds nothing
                parameter.mul_(0.2)
    F.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_initial_weights_of_tied_models():
    torch.manual_seed(0)
    imlp = small(tied=True, embed_dim=96).blocks[0].mlp_tokens
    assert 0.2e-6 < imlp.fc2.bias.std() < 5e-6
    weight = imlp.fc_sn1.parametrizations.weight.original
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    without = tied(bias=False)
    without.init_weights()
    assert without.fc2.bias is None
    assert without(torch.randn(2, 5)).shape == (2, 5)


def test_refusals():
    with pytest.raises(ValueError, match="as many outputs as inputs, got 5 and 4"):
        IMLP(5, 6, 4, tied=True)
    with pytest.raises(ValueError, match="tied=True needs another norm than 'batch'"):
        small(tied=True, norm="batch")
