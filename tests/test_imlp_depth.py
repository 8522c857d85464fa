"""iMLPs of any depth: nested and joint solves find the network's state of rest, and cost what the docs say."""

import copy
import math

import pytest
import torch
from small_models import SMALL, relative_error, small, trained_somewhat
from timm.layers import Mlp
from timm.models import MlpMixer
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from imixer import IMLP
from implicit import JFB, Checkpointed, Implicit, Phantom, checked_maps, record_solutions
from solvers import Anderson, Broyden, ConvergenceWarning, NewtonKrylov, Status
from solvers.linear import GMRES, NeumannSeries

TIGHT = {"n_iter": 200, "rtol": 1e-11}
EXACT = Implicit(linear_solver=GMRES(rtol=1e-13))
# Deep networks contract by less a layer, so that all depths take about as many steps.
COEFF = {1: 0.6, 2: 0.6, 3: 0.5, 4: 0.4, 5: 0.2}


def deep(hidden_layers, **options):
    """An iMLP of 5 inputs with biases of some size; the same weights for every way to solve."""
    torch.manual_seed(0)
    imlp = IMLP(5, 6, hidden_layers=hidden_layers, h_ratio=1.5, coeff=COEFF[hidden_layers], **options)
    with torch.no_grad():
        for parameter in imlp.parameters():
            parameter.normal_()
    for layer in imlp.normalized_layers:
        layer.weight = torch.randn_like(layer.weight)
    return imlp.eval()


def inputs():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)


def output_and_gradients(imlp, function=None):
    x = inputs()
    output = (imlp if function is None else function)(x)
    return [output, *torch.autograd.grad(output.sin().sum(), [x, *imlp.parameters()])]


def at_rest(imlp, steps=150):
    """The network's equations, iterated as they stand: every layer from its neighbours."""
    couplings = [
        (up.weight, up.bias, down.weight, down.bias)
        for up, down in zip(imlp.normalized_layers[::2], imlp.normalized_layers[1::2], strict=True)
    ]

    def function(x):
        y = imlp.fc1(x)
        layers = [y] + [y.new_zeros(len(y), len(up)) for up, *_ in couplings]
        for _ in range(steps):
            below = [y] + [F.linear(imlp.act(h), c[0], c[1]) for h, c in zip(layers[:-1], couplings, strict=True)]
            above = [F.linear(imlp.act(h), c[2], c[3]) for h, c in zip(layers[1:], couplings, strict=True)] + [0]
            layers = [b + a for b, a in zip(below, above, strict=True)]
        return imlp.fc2(imlp.act(layers[0]))

    return output_and_gradients(imlp, function)


def worst_error(found, expected):
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


SOLVES = {
    "unrolled": {"n_iter": 40},
    "unrolled anderson": {**TIGHT, "solver": "anderson"},
    "checkpointed": {"backward": Checkpointed(), "n_iter": 40},
    "implicit picard": {**TIGHT, "backward": EXACT},
    "implicit anderson": {**TIGHT, "backward": EXACT, "solver": Anderson(memory=4)},
    "implicit broyden": {**TIGHT, "backward": EXACT, "solver": Broyden()},
    "implicit newton": {**TIGHT, "backward": EXACT, "solver": NewtonKrylov()},
    "implicit, looser": {"n_iter": 30, "rtol": 1e-9, "backward": Implicit(linear_solver=GMRES(rtol=1e-10))},
}
# Nested solves take the power of the steps: of these, those to a tolerance for deeper networks.
CASES = [
    *[(3, "nested", name) for name in SOLVES if name != "checkpointed"],
    *[(4, "nested", name) for name in ("unrolled anderson", "implicit broyden")],
    (5, "nested", "implicit, looser"),
    *[(hidden_layers, "joint", name) for hidden_layers in (3, 4, 5) for name in SOLVES if name != "implicit, looser"],
]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("hidden_layers", "hidden_solve", "name"), CASES)
def test_all_find_the_state_of_rest_and_its_gradients(hidden_layers, hidden_solve, name):
    imlp = deep(hidden_layers, hidden_solve=hidden_solve, **SOLVES[name])
    # The derivative of accelerated steps arrives some steps after the value.
    tolerance = 1e-7 if name == "unrolled anderson" else 1e-8
    assert worst_error(output_and_gradients(imlp), at_rest(imlp)) < tolerance


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("hidden_layers", "hidden_solve"), [(2, "nested"), (3, "nested"), (3, "joint"), (4, "joint"), (5, "joint")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_linear_networks_are_solved_as_by_linear_algebra(hidden_layers, hidden_solve, tied):
    options = {**TIGHT, "solver": "anderson", "backward": EXACT}
    imlp = deep(hidden_layers, hidden_solve=hidden_solve, tied=tied, act_layer=nn.Identity, **options)

    def dense(x):
        """(1 - T) h = b, all layers side by side."""
        sizes = [6] + [9] * (hidden_layers - 1)
        rows = [[torch.zeros(m, n) for n in sizes] for m in sizes]
        rhs = [imlp.fc1(x)] + [torch.zeros(len(x), n) for n in sizes[1:]]
        for k, (up, up_bias, down, down_bias) in enumerate(imlp.couplings()):
            rows[k + 1][k], rows[k][k + 1] = up, down
            rhs[k + 1] = rhs[k + 1] + up_bias
            rhs[k] = rhs[k] if down_bias is None else rhs[k] + down_bias
        operator = torch.eye(sum(sizes)) - torch.cat([torch.cat(row, dim=1) for row in rows])
        lowest = torch.linalg.solve(operator, torch.cat(rhs, dim=1).t()).t()[:, :6]
        return F.linear(lowest, imlp.fc1.weight.t() if tied else imlp.fc2.weight, imlp.fc2.bias)

    assert worst_error(output_and_gradients(imlp), output_and_gradients(imlp, dense)) < 1e-8


def test_one_hidden_layer_is_mixers_mlp():
    imlp = deep(1, drop=0.0)
    mlp = Mlp(5, 6)
    assert mlp.state_dict().keys() == imlp.state_dict().keys()
    mlp.load_state_dict(imlp.state_dict())
    for found, expected in zip(output_and_gradients(imlp), output_and_gradients(mlp), strict=True):
        assert torch.equal(found, expected)
    mixer = MlpMixer(**SMALL)
    assert small(hidden_layers=1).state_dict().keys() == mixer.state_dict().keys()


@pytest.mark.parametrize("hidden_solve", ["nested", "joint"])
def test_two_hidden_layers_are_the_papers_model_bit_for_bit(hidden_solve):
    general = {"hidden_layers": 2, "tied": False, "norm": "spectral", "contraction": "paper"}
    found = []
    for options in ({}, {**general, "hidden_solve": hidden_solve}):
        torch.manual_seed(0)
        model = small(**options)
        drawn = torch.rand(3)
        model.head.weight.data.normal_()
        loss = model(torch.randn(2, 3, 16, 16)).square().sum()
        loss.backward()
        found.append((model.state_dict(), {n: p.grad for n, p in model.named_parameters()}, {"": drawn, "loss": loss}))
    for ours, theirs in zip(*found, strict=True):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("hidden_layers", [3, 4, 5])
def test_one_step_of_both_is_the_same(hidden_layers):
    nested, joint = (deep(hidden_layers, hidden_solve=way, n_iter=1) for way in ("nested", "joint"))
    assert worst_error(output_and_gradients(joint), output_and_gradients(nested)) < 1e-5


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hidden_layers", [2, 3, 4])
@pytest.mark.parametrize("n_iter", [1, 2, 5])
def test_counts_of_matrix_products(hidden_layers, n_iter):
    counts = {}
    for hidden_solve in ("nested", "joint"):
        with torch.no_grad(), Products() as products:
            deep(hidden_layers, hidden_solve=hidden_solve, n_iter=n_iter)(inputs())
        counts[hidden_solve] = products.count - 2  # fc1 and fc2
    assert counts["nested"] == 2 * sum(n_iter**k for k in range(1, hidden_layers))
    assert counts["joint"] == 2 * (hidden_layers - 1) * n_iter + 2 * (hidden_layers - 2)


BACKWARDS = {
    "unrolled, one step": {"n_iter": 1},
    "unrolled": {},
    "checkpointed": {"backward": "checkpointed"},
    "auto": {"backward": "auto"},
    **{
        backward: {"backward": backward, "solver": "broyden", "n_iter": 30, "rtol": 1e-2}
        for backward in ("implicit", "phantom", "jfb", "neumann", "shine")
    },
}


@pytest.mark.parametrize(("hidden_layers", "hidden_solve"), [(3, "nested"), (5, "joint")])
@pytest.mark.parametrize("options", BACKWARDS.values(), ids=BACKWARDS.keys())
def test_every_parameter_of_a_deep_model_gets_a_gradient(hidden_layers, hidden_solve, options):
    if hidden_solve == "joint" and options.get("backward") == "jfb":
        pytest.skip("refused, see below")
    model = small(hidden_layers=hidden_layers, hidden_solve=hidden_solve, coeff=0.5, **options)
    trained_somewhat(model)
    F.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("hidden_solve", ["nested", "joint"])
def test_one_more_layer_is_one_more_coupling(hidden_solve):
    two, three = small(), small(hidden_layers=3, hidden_solve=hidden_solve)
    added = {name.rpartition(".mlp_tokens.")[2] for name in three.state_dict().keys() - two.state_dict().keys()}
    assert {name.partition(".")[0] for name in added} == {"fc_sn3", "fc_sn4"}
    assert not two.state_dict().keys() - three.state_dict().keys()
    inner = 24  # twice the state's 12
    num_added = sum(p.numel() for p in three.parameters()) - sum(p.numel() for p in two.parameters())
    assert num_added == 2 * 2 * (inner * inner + inner)


@pytest.mark.parametrize("hidden_solve", ["nested", "joint"])
def test_copies_and_files_of_deep_models(hidden_solve):
    options = {"hidden_layers": 4, "hidden_solve": hidden_solve}
    model = trained_somewhat(small(**options)).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    fresh = small(**options).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("hidden_solve", ["nested", "joint"])
def test_the_maps_of_deep_models_are_pure(hidden_solve):
    imlp = deep(3, hidden_solve=hidden_solve).train()
    with checked_maps(imlp):
        imlp(inputs())


def test_every_level_of_nested_solves_is_recorded_and_more_accurate_than_the_one_around_it():
    model = trained_somewhat(small(hidden_layers=4, solver="anderson", n_iter=50, rtol=1e-3)).eval()
    with torch.no_grad(), record_solutions(model) as record:
        model(torch.randn(2, 3, 16, 16))
    for level, name in enumerate(["fixed_point", "fixed_point.f.inner", "fixed_point.f.inner.f.inner"]):
        solutions = record[f"blocks.0.mlp_tokens.{name}"]
        assert all((solution.status == Status.CONVERGED).all() for solution in solutions)
        assert 1e-5 * 10**-level < max(solution.residual.max() for solution in solutions) <= 1.001e-3 * 10**-level


def test_an_inner_solve_that_fails_is_reported():
    imlp = deep(3, n_iter=2, rtol=1e-6)
    imlp.fixed_point.on_failure = "ignore"
    with pytest.warns(ConvergenceWarning), torch.no_grad():
        imlp(inputs())


@pytest.mark.parametrize("hidden_solve", ["nested", "joint"])
def test_deep_models_compile_to_one_graph(hidden_solve):
    imlp = deep(3, hidden_solve=hidden_solve)
    compiled = torch.compile(imlp, backend="aot_eager", fullgraph=True)
    found, expected = output_and_gradients(imlp, compiled), output_and_gradients(imlp)
    assert worst_error(found, expected) < 1e-5


@pytest.mark.parametrize("hidden_layers", [3, 4, 5, 6])
def test_backward_modes_that_do_not_reach_all_weights_of_a_joint_solve_are_refused(hidden_layers):
    needed = math.ceil(hidden_layers / 2)
    enough, too_few = (
        (Phantom(steps=steps), Implicit(linear_solver=NeumannSeries(terms=steps))) for steps in (needed, needed - 1)
    )
    options = {"hidden_layers": hidden_layers, "hidden_solve": "joint", "n_iter": 10}
    for backward in enough:
        imlp = IMLP(4, backward=backward, **options)
        imlp(torch.randn(3, 4)).square().sum().backward()
        assert all(parameter.grad.any() for parameter in imlp.parameters())
    for backward in (*too_few, JFB()):
        with pytest.raises(ValueError, match=f"too few calls of the joint map.*which takes {needed}"):
            IMLP(4, backward=backward, **options)
        with pytest.raises(ValueError, match="too few calls"):
            imlp.set_solver(backward=backward)
        assert imlp.fixed_point.backward == enough[1]
        IMLP(4, backward=backward, **{**options, "hidden_solve": "nested"})


def test_refusals():
    for hidden_layers in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match=f"hidden_layers must be a positive integer, got {hidden_layers!r}"):
            IMLP(4, hidden_layers=hidden_layers)
    with pytest.raises(ValueError, match="hidden_solve must be one of 'nested', 'joint', got 'both'"):
        IMLP(4, hidden_solve="both")
    with pytest.raises(ValueError, match="forward mode, which PyTorch cannot do through nested solves of 4"):
        IMLP(4, hidden_layers=4, solver="newton_krylov", backward="implicit")
    with pytest.raises(ValueError, match='Use hidden_solve="joint"'):
        IMLP(4, hidden_layers=4, backward="implicit").set_solver(solver=NewtonKrylov())
    with pytest.raises(TypeError, match="hidden_layer"):
        small(hidden_layer=3)
