"""Certified contraction: bounds that hold for the weights as they really are, and what `certify` says of a model."""

import math

import pytest
import torch
from small_models import small, trained_somewhat
from torch import nn
from torch.nn import functional as F

import imixer
from imixer import IMLP, certify
from imixer.contraction import joint_bound, layer_bound, nested_bound
from imixer.contractive_block import Coupling
from implicit import record_solutions
from solvers import Anderson

GELU_SLOPE = 1.1289041451851549
SHAPES = [(2, "nested", False), (2, "nested", True), (3, "nested", False), (4, "joint", False), (4, "joint", True)]


def certified(hidden_layers=2, hidden_solve="nested", tied=False, **options):
    options = {"contraction": "certified", **options}
    return IMLP(7, 8, hidden_layers=hidden_layers, hidden_solve=hidden_solve, tied=tied, **options)


def lip_g(imlp):
    """The bound on Lip(g) by singular values of the real weights in float64."""
    bound = 0.0
    for coupling in reversed(imlp.couplings()):
        up, down = (float(torch.linalg.svdvals(w.detach().double())[0]) for w in (coupling.up, coupling.down))
        bound = GELU_SLOPE**2 * up * down / (1 - bound)
        assert bound > 0
    return bound


def lip_all_layers(imlp):
    """The same for the map of all layers, each from its neighbours, twice: a matrix with the couplings as blocks."""
    couplings = imlp.couplings()
    norms = torch.zeros(len(couplings) + 1, len(couplings) + 1, dtype=torch.float64)
    for k, coupling in enumerate(couplings):
        norms[k + 1, k], norms[k, k + 1] = (
            torch.linalg.svdvals(weight.detach().double())[0] for weight in (coupling.up, coupling.down)
        )
    return float(torch.linalg.svdvals(GELU_SLOPE * norms)[0]) ** 2


@pytest.mark.parametrize(("hidden_layers", "hidden_solve", "tied"), SHAPES)
@pytest.mark.parametrize("coeff", [0.5, 0.9, 0.99])
def test_certified_contraction_holds_whatever_the_weights(hidden_layers, hidden_solve, tied, coeff):
    imlp = certified(hidden_layers, hidden_solve, tied, coeff=coeff)

    def check():
        for mode in (True, False):
            imlp.train(mode)
            assert lip_g(imlp) <= coeff
            assert lip_all_layers(imlp) <= coeff

    check()
    optimizer = torch.optim.SGD(imlp.parameters(), lr=0.5)
    for growth in (1e-3, 1, 30, 1e4):
        for layer in imlp.normalized_layers:
            layer.weight = growth * torch.randn_like(layer.weight)
        check()
        for _ in range(3):
            imlp.train()
            optimizer.zero_grad()
            (imlp(torch.randn(16, 7)) - 1).square().mean().backward()
            optimizer.step()
            check()


def test_the_bound_is_used():
    """Not more than Gram iteration costs: large weights come within 5% of what is allowed."""
    imlp = certified()
    for layer in imlp.normalized_layers:
        layer.weight = 10 * torch.randn_like(layer.weight)
    assert 0.85 < lip_g(imlp) <= 0.9


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("hidden_layers", "hidden_solve", "tied"), SHAPES)
def test_certified_maps_contract(hidden_layers, hidden_solve, tied):
    """By the norm of the Jacobian of the map that is iterated, at points as bad as a search finds."""
    imlp = certified(hidden_layers, hidden_solve, tied, n_iter=4).eval()
    for layer in imlp.normalized_layers:
        layer.weight = 10 * torch.randn_like(layer.weight)
    y = torch.randn(1, 8)
    couplings = [Coupling(*(None if x is None else x.detach() for x in coupling)) for coupling in imlp.couplings()]
    start = imlp.fixed_point.start(y, *couplings)
    leaves = start if isinstance(start, tuple) else (start,)
    sizes = [leaf.shape[1] for leaf in leaves]

    def flat(z):
        state = z.unsqueeze(0).split(sizes, dim=1)
        image = imlp.fixed_point.f(state if isinstance(start, tuple) else state[0], y, *couplings)
        return torch.cat(image, dim=1).squeeze(0) if isinstance(start, tuple) else image.squeeze(0)

    z = torch.randn(sum(sizes), requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.2)
    norms = []
    for _ in range(15):
        jacobian = torch.autograd.functional.jacobian(flat, z, create_graph=True)
        norm = torch.linalg.matrix_norm(jacobian, 2)
        norms.append(norm.item())
        optimizer.zero_grad()
        (-norm).backward()
        optimizer.step()
    assert norms[0] < max(norms) <= 0.9


def test_the_papers_mode_is_not_certified():
    """0.9 a weight allows (0.9 x 1.12890)^2 = 1.0323, and power iteration, from below, lets weights exceed 0.9."""
    torch.manual_seed(0)
    imlp = IMLP(49, 32, n_power=1)
    for layer in imlp.normalized_layers:
        layer.weight = 10 * torch.randn_like(layer.weight)
    assert lip_g(imlp.eval()) == pytest.approx(1.0323, abs=1e-3)
    for layer in imlp.normalized_layers:  # as by an optimizer, which tells the power iteration nothing
        layer.parametrizations.weight.original.data.normal_()
    imlp.train()(torch.randn(2, 49))
    assert lip_g(imlp.eval()) > 1.1
    model = small().eval()
    assert all(row.bound > 1.03 for row in certify(model, show=False))


@pytest.mark.parametrize("hidden_layers", range(2, 9))
@pytest.mark.parametrize("coeff", [0.1, 0.5, 0.9, 0.99])
def test_the_bound_of_a_layer_makes_the_bound_of_the_map(hidden_layers, coeff):
    norms = [layer_bound(coeff, GELU_SLOPE, hidden_layers)] * (hidden_layers - 1)
    assert joint_bound(norms, norms, GELU_SLOPE) == pytest.approx(coeff)
    nested = nested_bound(norms, norms, GELU_SLOPE)
    assert nested == pytest.approx(coeff) if hidden_layers == 2 else nested < coeff
    # At the point where one bound reaches 1, so does the other.
    critical = [layer_bound(1.0, GELU_SLOPE, hidden_layers)] * (hidden_layers - 1)
    assert nested_bound(critical, critical, GELU_SLOPE) == pytest.approx(1.0)
    beyond = [1.01 * norm for norm in critical]
    assert nested_bound(beyond, beyond, GELU_SLOPE) > 1
    assert joint_bound(beyond, beyond, GELU_SLOPE) > 1


def test_no_bound_where_an_inner_solve_has_none():
    assert nested_bound([0.5, 1.0], [0.5, 1.0], 1.0) == math.inf
    assert nested_bound([0.5, 0.5], [0.4, 0.8], 1.0) == pytest.approx(0.2 / 0.6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": Anderson(memory=3), "n_iter": 4},
        {"hidden_layers": 3},
        {"hidden_layers": 3, "solver": "anderson", "rtol": 1e-2, "n_iter": 20},
        {"hidden_layers": 3, "hidden_solve": "joint"},
        {"hidden_layers": 4, "hidden_solve": "joint", "tied": True, "n_iter": 5},
    ],
)
def test_certify_on_images(options):
    """Its bounds hold for what the model really computes, measured against a solve to float64's accuracy."""
    model = trained_somewhat(small(contraction="certified", **options)).double().train()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    rows = certify(model, images, show=False)
    assert model.training
    model.eval()
    with torch.no_grad(), record_solutions(model) as record:
        model(images)
    for row in rows:
        imlp = model.get_submodule(row.name)
        bound = lip_all_layers(imlp) if options.get("hidden_solve") == "joint" else lip_g(imlp)
        assert row.bound == pytest.approx(bound, rel=1e-6) or row.bound < bound  # odd layers alone
        assert 0 < row.rate < row.bound <= 0.9
    # The first iMLP's injection is the same when it is solved longer.
    name = rows[0].name
    reached = record[f"{name}.fixed_point"][0].value
    model.set_solver(n_iter=300, rtol=1e-12, solver="picard")
    with torch.no_grad(), record_solutions(model) as record:
        model(images)
    exact = record[f"{name}.fixed_point"][0].value
    if isinstance(exact, tuple):
        reached, exact = torch.cat(reached, dim=1), torch.cat(exact, dim=1)
    error = (reached - exact).square().mean(dim=1).sqrt().max().item()
    assert 0 < error <= rows[0].error_bound < 100 * error


def test_steps_follow_from_the_factors():
    row = imixer.IMLPCertificate("", 0.5, 0.1, 1e-3)
    assert [row.steps_by_bound(t) for t in (1e-3, 1e-6)] == [10, 20]
    assert [row.steps_by_rate(t) for t in (1e-2, 1e-6)] == [2, 6]
    unknown = imixer.IMLPCertificate("", 1.0)
    assert unknown.steps_by_bound(1e-3) is None
    assert unknown.steps_by_rate(1e-3) is None


def test_certify_prints_a_table_and_changes_nothing(capsys):
    model = trained_somewhat(small(num_blocks=1)).train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = certify(model, torch.randn(2, 3, 16, 16))
    head, rule, line, legend = capsys.readouterr().out.splitlines()
    assert head == "iMLP                 bound   rate  steps to 1e-03  steps to 1e-06  error bound"
    assert rule == "-" * len(head)
    assert line.startswith(f"blocks.0.mlp_tokens  {rows[0].bound:5.3f}  {rows[0].rate:5.3f}           - / ")
    assert line.endswith("none")
    assert len(line) == len(head)
    assert legend.endswith("steps are by the bound / by the rate.")
    assert rows[0].error_bound is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.norm.training
    certify(small(num_blocks=1, contraction="certified"))
    line = capsys.readouterr().out.splitlines()[2]
    assert " ".join(line.split()) == "blocks.0.mlp_tokens 0.900 - 66 / - 132 / - none"


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def test_refusals():
    with pytest.raises(TypeError, match=r"No Lipschitz constant is known for the activation Sine\(\).*Choose one"):
        certified(act_layer=Sine)
    with pytest.raises(ValueError, match=r"The slope of PReLU\(num_parameters=1\) changes with its parameters"):
        certified(act_layer=nn.PReLU)
    for coeff, reason in (
        (1.0, "bounds Lip.g. by coeff, in .0, 1.; got 1.0"),
        (0.0, "coeff must be a positive number, got 0.0"),
        (-0.5, "coeff must be a positive number, got -0.5"),
    ):
        with pytest.raises(ValueError, match=reason):
            certified(coeff=coeff)
    with pytest.raises(ValueError, match="needs norm=\"spectral\", got 'weight'"):
        small(contraction="certified", norm="weight")
    with pytest.raises(ValueError, match="contraction must be one of 'paper', 'certified', got 'sure'"):
        small(contraction="sure")
    with pytest.raises(ValueError, match="no IMLP with two hidden layers or more"):
        certify(small(hidden_layers=1))
    assert certify(nn.Sequential(IMLP(4, act_layer=Sine)), show=False)[0].bound == math.inf
    assert certify(IMLP(4, act_layer=nn.PReLU), show=False)[0].bound < 1


def test_certified_models_train_and_take_checkpoints_of_the_papers_mode(tmp_path):
    paper, model = trained_somewhat(small()), small(contraction="certified")
    model.load_state_dict(paper.state_dict())
    path = tmp_path / "paper.pt"
    torch.save(paper.state_dict(), path)
    again = small(contraction="certified")
    imixer.load_checkpoint(again, path)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), paper.parameters(), strict=True))
    F.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
