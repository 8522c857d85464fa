"""Hierarchical Hopfield networks: the energy, the adiabatic limit, and the mixers that follow from them."""

import dataclasses
import itertools
import sys
from functools import partial

import pytest
import torch
from timm.layers import Mlp
from timm.models.mlp_mixer import MixerBlock
from torch import nn
from torch.nn import functional as F

from imixer import IMLP
from imixer.hopfield import (
    GELU,
    CentredNorm,
    HierarchicalHopfield,
    Identity,
    Lagrangian,
    ReLU,
    Softmax,
)
from implicit import Implicit, fixed_point
from solvers import ConvergenceError, ConvergenceWarning, Status, solve
from solvers.linear import GMRES

pytestmark = pytest.mark.usefixtures("double")

# Sizes and Lagrangians of layers whose energy is monotone, by depth.
CONVEX = {
    2: ((5, 8), (CentredNorm(), Softmax(beta=3.0))),
    3: ((6, 5, 4), (Identity(), ReLU(), Softmax(beta=3.0))),
    4: ((6, 5, 4, 3), (CentredNorm(), Softmax(beta=3.0), ReLU(), Identity())),
}
GELUS = {depth: (sizes, (CentredNorm(), *[GELU()] * (depth - 1))) for depth, (sizes, _) in CONVEX.items()}
EXACT = {"backward": Implicit(linear_solver=GMRES(rtol=1e-13)), "rtol": 1e-13}
seeds = pytest.mark.parametrize("seed", range(3))
depths = pytest.mark.parametrize("depth", CONVEX)


def network(kind, seed=0, *, norm=0.6, **options):
    """Couplings of the given spectral norm, and a start well away from rest."""
    torch.manual_seed(seed)
    sizes, lagrangians = kind
    couplings = [torch.randn(upper, lower) for lower, upper in itertools.pairwise(sizes)]
    couplings = [norm * xi / torch.linalg.matrix_norm(xi, 2) for xi in couplings]
    return HierarchicalHopfield(couplings, lagrangians, **options), [2 * torch.randn(2, n) for n in sizes]


@seeds
@depths
def test_energy_never_increases(depth, seed):
    """With couplings that do not contract, and time constants that differ."""
    model, start = network(CONVEX[depth], seed, norm=1.5, time_constants=[1.0, 0.4, 2.0, 0.2][:depth], decay=0.5)
    trajectory = model.integrate(start, 8.0, rtol=1e-10, atol=1e-12)
    energy = model.energy(trajectory.states)  # (T, 2)
    assert trajectory.times[-1] == 8
    assert (energy[0] - energy[-1] > 0.1).all()
    assert (energy.diff(dim=0) <= 1e-12).all()
    assert (model.energy_rate(trajectory.states) <= 1e-12).all()


@pytest.mark.parametrize("kind", [*CONVEX.values(), *GELUS.values()], ids=str)
def test_energy_rate_is_the_chain_rule(kind):
    depth = len(kind[0])
    model, states = network(kind, time_constants=[1.0, 0.4, 2.0, 0.2][:depth], decay=0.3)
    velocity = model.velocity(states)
    _, expected = torch.func.jvp(lambda *states: model.energy(states), tuple(states), tuple(velocity))
    assert torch.allclose(model.energy_rate(states), expected, rtol=1e-12)


@seeds
def test_energy_can_increase_with_gelu(seed):
    """Where its slope is negative and the visible layer has nothing left to lose."""
    model = HierarchicalHopfield([torch.tensor([[-2.0, 2.0]])], [CentredNorm(), GELU()])
    start = [torch.tensor([1.0, -1.0]), torch.tensor([-0.9 - 0.3 * seed])]
    trajectory = model.integrate(start, 20.0, rtol=1e-10, atol=1e-12)
    energy = model.energy(trajectory.states)
    assert (energy.diff(dim=0) > -1e-12).all()
    assert energy[-1] - energy[0] > 0.03
    assert model.energy_rate(start) > 0
    # It comes to rest at a maximum of the energy, seen from the hidden layer.
    rest = [x[-1] for x in trajectory.states]
    assert torch.allclose(rest[1], torch.tensor([-2 * 2**0.5]), atol=1e-6)
    assert all(model.energy([rest[0], rest[1] + d]) < model.energy(rest) for d in (-0.1, 0.1))


@seeds
@pytest.mark.parametrize("depth", [2, 3])
def test_energy_falls_in_the_adiabatic_limit_also_with_gelu(depth, seed):
    """Settled layers are at a stationary point of the energy, so that the visible Lagrangian alone has to be convex."""
    model, start = network(GELUS[depth], seed, decay=0.5)
    energy = model.energy(model.integrate(start, 4.0, adiabatic=True, rtol=1e-9, atol=1e-11).states)
    assert (energy.diff(dim=0) < 0).all()
    assert (energy[0] - energy[-1] > 5e-4).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [CONVEX[2], CONVEX[4], GELUS[3]], ids=str)
def test_fast_hidden_layers_tend_to_the_adiabatic_limit(kind, nested):
    """The error is of the order of the hidden time constants: all alike, or each layer faster than the one below."""
    model, start = network(kind, rtol=1e-12, decay=0.2)
    start = [start[0], *model.settle(start[0])]
    options = {"times": torch.linspace(0, 3, 7), "rtol": 1e-9, "atol": 1e-11}
    limit = model.integrate(start, 3.0, adiabatic=True, **options)
    errors = []
    for tau in (1.0, 0.1, 0.01, 0.001):
        taus = [tau ** (layer if nested else min(layer, 1)) for layer in range(len(start))]
        path = dataclasses.replace(model, time_constants=taus).integrate(start, 3.0, **options)
        errors.append((path.states[0] - limit.states[0]).abs().max())
    assert errors[0] > 0.001
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.3)
    assert errors[3] / errors[2] == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "newton_krylov", "auto"])
@depths
def test_settled_layers_are_at_rest(depth, solver):
    model, states = network(GELUS[depth], solver=solver, rtol=1e-12, on_failure="raise")
    hidden, solution = model.settle(states[0], return_solution=True)
    assert (solution.status == Status.CONVERGED).all()
    for velocity in model.velocity([states[0], *hidden])[1:]:
        assert velocity.abs().max() < 1e-11
    alone = model.settle(states[0][1])
    assert all(torch.allclose(one, x[1], atol=1e-11) for one, x in zip(alone, hidden, strict=True))


def test_joint_equilibrium_is_the_nested_one():
    """F_3 inside F_2, as layers are eliminated from the top."""
    model, states = network(GELUS[4], **EXACT)
    xi1, xi2, xi3 = model.couplings
    gelu = F.gelu

    def inverse(f, drive):
        """The solution of z - f(z) = drive."""
        return fixed_point(lambda z, drive: drive + f(z), drive, drive, atol=0.0, **EXACT)

    def f3(x):
        return gelu(gelu(x) @ xi3.mT) @ xi3

    def f2(x):
        return gelu(inverse(f3, gelu(x) @ xi2.mT)) @ xi2

    visible = states[0].requires_grad_()
    nested = inverse(f2, CentredNorm().activation(visible) @ xi1.mT)
    joint = model.settle(visible)[0]
    assert torch.allclose(joint, nested, rtol=0, atol=1e-11)
    weight = torch.randn_like(nested)
    gradients = [torch.autograd.grad((x * weight).sum(), visible)[0] for x in (joint, nested)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-11)


def test_joint_solve_takes_the_steps_of_the_nested_one():
    """Twice as many if all layers were updated at once."""
    model, states = network(GELUS[3], norm=0.85, solver="picard", rtol=1e-8)
    _, solution = model.settle(states[0], return_solution=True)
    drive = CentredNorm().activation(states[0]) @ model.couplings[0].mT
    xi = model.couplings[1]
    nested = solve(lambda h: drive + F.gelu(F.gelu(h) @ xi.mT) @ xi, drive, "picard", rtol=1e-8, atol=0.0)
    assert nested.num_evals > 5
    assert abs(solution.num_evals - nested.num_evals) <= 1


def test_settle_is_differentiable_in_all_tensors():
    model, states = network(GELUS[3], **EXACT)

    def settle(visible, *couplings):
        return dataclasses.replace(model, couplings=couplings).settle(visible)

    inputs = [x.requires_grad_() for x in (states[0], *model.couplings)]
    assert torch.autograd.gradcheck(settle, inputs)


@pytest.mark.parametrize("hidden_solve", ["nested", "joint"])
@pytest.mark.parametrize("hidden", [2, 3])
def test_the_update_is_an_imlp(hidden, hidden_solve):
    """With tied weights, no bias, and spectral norms that leave the normalization inactive."""
    sizes = (6, 8, 5, 5)[: hidden + 1]
    norm = {2: 0.8, 3: 0.6}[hidden]  # contracts
    model, states = network((sizes, (CentredNorm(), *[GELU()] * hidden)), norm=norm, decay=0.0, **EXACT)
    visible, *couplings = tensors = [x.requires_grad_() for x in (states[0], *model.couplings)]
    depth = {"hidden_layers": hidden, "hidden_solve": hidden_solve}
    imlp = IMLP(6, 8, tied=True, bias=False, h_ratio=5 / 8, solver="anderson", n_iter=100, **depth, **EXACT).eval()
    with torch.no_grad():
        imlp.fc1.weight.copy_(couplings[0])
        for layer, xi in zip(imlp.normalized_layers, couplings[1:], strict=True):
            layer.weight = xi

    found = model.update(visible)
    expected = visible + imlp(CentredNorm().activation(visible))
    assert (expected - visible).abs().max() > 0.01
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)

    cotangent = torch.randn_like(visible)
    found = torch.autograd.grad(found, tensors, cotangent)
    expected = torch.autograd.grad(expected, [visible, *imlp.parameters()], cotangent)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_two_layers_make_mixers_block():
    model, states = network(((6, 9), (CentredNorm(), GELU())), decay=0.0)
    (xi,) = model.couplings
    mlp = Mlp(6, 9, bias=False)
    with torch.no_grad():
        mlp.fc1.weight.copy_(xi / 6**0.5)
        mlp.fc2.weight.copy_(xi.mT)
    visible = states[0]
    expected = visible + mlp(F.layer_norm(visible, (6,), eps=0.0))
    assert torch.allclose(model.update(visible), expected, rtol=0, atol=1e-14)


class TokenNorms(Lagrangian):
    """The sum of the centred norms of tokens with four channels, which are laid out one after the other."""

    def value(self, x):
        return CentredNorm().value(x.unflatten(-1, (-1, 4))).sum(-1)

    def activation(self, x):
        return CentredNorm().activation(x.unflatten(-1, (-1, 4))).flatten(-2)

    def hvp(self, x, direction):
        return CentredNorm().hvp(*[t.unflatten(-1, (-1, 4)) for t in (x, direction)]).flatten(-2)


@torch.no_grad()
def test_three_layers_make_the_token_mixing_of_a_block():
    """LayerNorm acts along the channels, and the couplings along the tokens, alike for all channels."""
    model, states = network(((6, 8, 5), (CentredNorm(), GELU(), GELU())), norm=0.8)
    norm_layer = partial(nn.LayerNorm, eps=0.0, elementwise_affine=False)
    mlp_layer = partial(IMLP, bias=False, h_ratio=5 / 8, solver="anderson", n_iter=100, **EXACT)
    block = MixerBlock(4, 6, (2.0, 1.0), mlp_layer=mlp_layer, norm_layer=norm_layer).eval()
    xi1, xi2 = model.couplings
    imlp = block.mlp_tokens
    imlp.fc1.weight.copy_(xi1 / 2)  # LayerNorm gives sqrt(4) times the activation
    imlp.fc2.weight.copy_(xi1.mT)
    imlp.fc_sn1.weight, imlp.fc_sn2.weight = xi2, xi2.mT
    nn.init.zeros_(block.mlp_channels.fc2.weight)

    couplings = [torch.kron(xi, torch.eye(4)) for xi in (xi1, xi2)]
    hopfield = HierarchicalHopfield(couplings, [TokenNorms(), GELU(), GELU()], decay=0.0, **EXACT)
    x = torch.randn(3, 6, 4)  # tokens and channels
    expected = block(x)
    assert (expected - x).abs().max() > 0.01
    assert torch.allclose(hopfield.update(x.flatten(1)), expected.flatten(1), rtol=0, atol=1e-10)
    states = [x.flatten(1), *hopfield.settle(x.flatten(1))]
    rates = [dataclasses.replace(hopfield, decay=decay).energy_rate(states) for decay in (0.0, 2.0)]
    assert (rates[0] < 0).all()
    assert torch.allclose(*rates)


def test_two_layers_with_softmax_make_attention():
    """The visible state is the query, the stored patterns are keys and values."""
    model, states = network(((6, 9), (Identity(), Softmax(beta=0.7))))
    (patterns,) = model.couplings
    expected = F.scaled_dot_product_attention(states[0], patterns, patterns, scale=0.7)
    assert torch.allclose(model.update(states[0]), expected)


def test_decay_does_not_move_the_activation_of_a_centred_norm():
    model, states = network(GELUS[2], decay=0.0)
    velocities = [dataclasses.replace(model, decay=decay).velocity(states)[0] for decay in (0.0, 3.0)]
    assert not torch.allclose(*velocities)
    assert torch.allclose(*[CentredNorm().hvp(states[0], v) for v in velocities])
    assert torch.allclose(model.energy(states), dataclasses.replace(model, decay=3.0).energy(states))


def test_failures_are_reported():
    model, states = network(((6, 5, 4), (Identity(), Identity(), Identity())), norm=2.0, solver="picard")
    with pytest.warns(ConvergenceWarning, match="DIVERGED"):
        model.settle(states[0])
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        dataclasses.replace(model, on_failure="raise").update(states[0])
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        model.integrate(states, 1.0, adiabatic=True)
    silent = dataclasses.replace(model, on_failure="ignore")
    _, solution = silent.settle(states[0], return_solution=True)
    assert (solution.status == Status.DIVERGED).all()


class Cubic(Identity):
    """Grows so fast that the states reach infinity in finite time."""

    def activation(self, x):
        return x**3


class NotANumber(Identity):
    """Some integrators never come back from a velocity like this one's."""

    def activation(self, x):
        return torch.where(x > 1, torch.nan, x)


@pytest.mark.parametrize(
    ("lagrangian", "method", "complaint"),
    [
        (Cubic(), "DOP853", "did not get to time 5, the last state is that at 0.203: "),
        (Cubic(), "BDF", "did not get to time 5, the last state is that at 0.203: "),
        (NotANumber(), "DOP853", r"velocity at time \S+ is not finite"),
        (NotANumber(), "LSODA", r"velocity at time \S+ is not finite"),
    ],
    ids=str,
)
def test_integration_that_does_not_arrive_is_an_error(lagrangian, method, complaint):
    model = HierarchicalHopfield([3 * torch.eye(2)], [lagrangian, lagrangian])
    with pytest.raises(RuntimeError, match=complaint):
        model.integrate([torch.ones(2), torch.ones(2)], 5.0, method=method)


def test_trajectories():
    model, states = network(CONVEX[3])
    trajectory = model.integrate([x.float() for x in states], 2.0, times=[0.0, 0.5, 2.0])
    assert trajectory.times.tolist() == [0.0, 0.5, 2.0]
    assert [tuple(x.shape) for x in trajectory.states] == [(3, 2, 6), (3, 2, 5), (3, 2, 4)]
    assert all(x.dtype == torch.float64 for x in trajectory.states)
    assert torch.equal(trajectory.states[0][0], states[0].float().double())
    halfway = [x[1] for x in trajectory.states]
    again = model.integrate(halfway, 1.5)
    assert torch.allclose(again.states[0][-1], trajectory.states[0][-1], atol=1e-7)


def test_refusals(monkeypatch):
    model, states = network(CONVEX[3])
    xi = model.couplings
    with pytest.raises(ValueError, match=r"K - 1 couplings, got 3 and 1"):
        HierarchicalHopfield(xi[:1], model.lagrangians)
    with pytest.raises(ValueError, match=r"K - 1 couplings, got 1 and 0"):
        HierarchicalHopfield([], [Identity()])
    with pytest.raises(TypeError, match="sequence of Lagrangian objects such as GELU"):
        HierarchicalHopfield(xi, [GELU, GELU, GELU])
    with pytest.raises(ValueError, match=r"\[\(4, 5\), \(5, 6\)\]"):
        HierarchicalHopfield(xi[::-1], model.lagrangians)
    with pytest.raises(ValueError, match=r"must be 3 positive numbers, got \(1, 0, 1\)"):
        HierarchicalHopfield(xi, model.lagrangians, time_constants=[1, 0, 1])
    with pytest.raises(ValueError, match="decay must be a number >= 0, got -1"):
        HierarchicalHopfield(xi, model.lagrangians, decay=-1)
    with pytest.raises(ValueError, match=r"have \[6, 5, 4\] units.*Got the shapes \[\(2, 6\), \(2, 5\)\]"):
        model.energy(states[:2])
    with pytest.raises(ValueError, match=r"Got the shapes \[\(6,\), \(2, 5\), \(2, 4\)\]"):
        model.integrate([states[0][0], *states[1:]], 1.0)
    with pytest.raises(ValueError, match=r"visible layer has 6 units, got a state of shape \(2, 5\)"):
        model.settle(states[1])
    with pytest.raises(ValueError, match="duration must be a positive number, got -1.0"):
        model.integrate(states, -1.0)
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match=r"implicit-layers\[scipy\]"):
        model.integrate(states, 1.0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-30), (torch.float32, 1e25), (torch.float64, 1e200)])
def test_centred_norm_of_all_sizes(dtype: torch.dtype, scale: float) -> None:
    x = torch.randn(3, 5, dtype=dtype)
    torch.testing.assert_close(CentredNorm().activation(scale * x), CentredNorm().activation(x))
    torch.testing.assert_close(CentredNorm().value(scale * x) / scale, CentredNorm().value(x))
    v = torch.randn(3, 5, dtype=dtype)
    torch.testing.assert_close(CentredNorm().hvp(scale * x, v) * scale, CentredNorm().hvp(x, v), rtol=1e-5, atol=1e-5)
