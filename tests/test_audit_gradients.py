"""The audit of gradients, against biases that are computed by hand."""

import json
import math
import re

import pytest
import torch
from sick_maps import healthy
from torch import nn

from implicit import JFB, FixedPointLayer, Phantom, audit_gradients, spectral_norm
from implicit.diagnostics import USES

pytestmark = pytest.mark.usefixtures("double")


class Linear(nn.Module):
    """The map ``q z + w x`` with the parameters w and q."""

    def __init__(self, q):
        super().__init__()
        self.w, self.q = nn.Parameter(torch.ones(())), nn.Parameter(torch.tensor(q))

    def forward(self, z, x):
        return self.q * z + self.w * x


@pytest.mark.parametrize("q", [0.5, -0.5, 0.9])
def test_bias_of_jfb_by_hand(q):
    """The exact gradient is ``(df/dt)' w / (1 - q)``; JFB leaves the factor out, and Phantom the rest of its series."""
    layer = FixedPointLayer(Linear(q), solver="picard", rtol=1e-10, max_steps=1000)
    modes = {"jfb": JFB(), "three": Phantom(steps=3), "implicit": "implicit"}
    audit = audit_gradients(layer, torch.randn(4, 3), loss=lambda z: z.square().sum(), modes=modes)
    for group in ("f", "(inputs)"):
        jfb, three, exact = (audit.modes[mode].groups[group] for mode in modes)
        assert jfb.norm_ratio == pytest.approx(1 - q, rel=1e-6)
        assert three.norm_ratio == pytest.approx(1 - q**3, rel=1e-6)
        assert exact.norm_ratio == pytest.approx(1, rel=1e-6)
        assert all(found.cosine == pytest.approx(1, rel=1e-6) for found in (jfb, three, exact))
    assert audit.modes["jfb"].products == 1
    assert audit.modes["three"].products == 3


def test_cosine_of_jfb_by_hand():
    """With J = diag(0.9, 0) the exact gradient of w = (1, 1) to the input is (10, 1), and that of JFB (1, 1)."""
    rates = torch.tensor([0.9, 0.0])
    layer = FixedPointLayer(lambda z, x: rates * z + x, rtol=1e-10, max_steps=500)
    audit = audit_gradients(layer, torch.randn(1, 2), loss=torch.sum, modes=("jfb",))
    found = audit.modes["jfb"].groups["(inputs)"]
    assert found.cosine == pytest.approx(11 / math.sqrt(2 * 101))
    assert found.norm_ratio == pytest.approx(math.sqrt(2 / 101))
    assert audit.modes["jfb"].worst == found
    assert not audit.modes["jfb"].is_good_for("the beginning of training")
    assert audit.cheapest("the beginning of training") is None


def test_cheapest_mode_for_each_use():
    """A bias of a thousandth is good enough for training and not for exact derivatives."""
    layer = FixedPointLayer(lambda z, x: 0.01 * z + x, rtol=1e-8, solver="anderson")
    audit = audit_gradients(layer, torch.randn(2, 3), loss=lambda z: z.square().sum(), modes=("implicit", "jfb"))
    exact, training, _ = USES
    assert audit.cheapest(training) == "jfb"
    assert audit.cheapest(exact) == "implicit"
    assert "- for training to the end: jfb" in str(audit)


def test_fixed_number_of_steps_is_compared_with_its_own_derivative():
    layer = FixedPointLayer(lambda z, x: 0.5 * z + x, solver="picard", rtol=None, max_steps=2)
    audit = audit_gradients(layer, torch.randn(2, 3), loss=torch.sum, modes=("unrolled", "implicit"))
    ratios = {name: mode.groups["(inputs)"].norm_ratio for name, mode in audit.modes.items()}
    assert ratios["unrolled"] == pytest.approx(1)
    assert ratios["implicit"] == pytest.approx(2 / 1.5, rel=1e-6)
    assert audit.exact == "the gradient of the steps that are taken"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(3, 4)
        self.linear = spectral_norm(nn.Linear(4, 4))
        self.layer = FixedPointLayer(lambda z, x: torch.tanh(self.linear(z) + x), solver="broyden")
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.drop(self.layer(self.before(x))))


def test_model_is_left_as_it_was_and_groups_are_its_modules():
    model, x = Model(), torch.randn(5, 3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    backward, stopping = model.layer.backward, model.layer.stopping
    audit = audit_gradients(model, x, loss=lambda y: y.square().sum() + y[0, 0])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (model.layer.backward, model.layer.stopping, model.layer.on_failure) == (backward, stopping, "warn")
    assert "_solve" not in vars(model.layer)
    assert not x.requires_grad
    assert set(audit.modes["jfb"].groups) == {"before", "linear", "norm", "(inputs)"}
    # The same masks of dropout in every pass: implicit and unrolled derivatives agree.
    assert audit.modes["unrolled"].worst.cosine > 1 - 1e-5
    assert audit.modes["implicit"].worst.cosine > 1 - 1e-5
    assert not any(mode.error for mode in audit.modes.values())
    json.dumps(audit.to_dict(), allow_nan=False)


def test_costs_are_counted():
    layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x, solver="picard", rtol=None, max_steps=7)
    audit = audit_gradients(layer, torch.randn(2, 3), loss=torch.sum)
    calls = {name: (mode.calls, mode.products) for name, mode in audit.modes.items() if not mode.error}
    assert calls["unrolled"] == (7, 7)
    assert calls["jfb"] == (8, 1)
    assert calls["phantom"] == (12, 5)
    assert calls["neumann"][0] == 8
    assert audit.modes["unrolled"].peak_bytes > audit.modes["jfb"].peak_bytes > 0


def test_mode_that_does_not_go_with_the_solver_says_why():
    layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x, solver="newton_krylov")
    audit = audit_gradients(layer, torch.randn(2, 3), loss=torch.sum)
    assert {name for name, mode in audit.modes.items() if mode.error} == {"unrolled", "checkpointed", "shine"}
    assert "needs gradients through the steps" in audit.modes["unrolled"].error
    assert "unrolled: Unrolled() needs gradients" in str(audit)
    assert not audit.modes["unrolled"].is_good_for("training to the end")


def test_groups_of_an_imlp_belong_to_its_layer():
    patient = healthy("iMLP")
    audit = audit_gradients(nn.Sequential(patient.model), *patient.inputs, loss=torch.sum, modes=("jfb",))
    assert audit.layers == {"0.fixed_point": ("0.fc1", "0.fc_sn1", "0.fc_sn2", "0.fc2")}


def test_unfit_arguments_are_refused():
    layer = FixedPointLayer(lambda z, x: 0.5 * z + x)
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="loss must be a callable"):
        audit_gradients(layer, x, loss=None)
    for modes in ("jfb", JFB(), (JFB(),)):
        with pytest.raises(TypeError, match=re.escape(f"got {modes!r}.")):
            audit_gradients(layer, x, loss=torch.sum, modes=modes)
    with pytest.raises(ValueError, match=re.escape("got shape (2, 3)")):
        audit_gradients(layer, x, loss=lambda z: z)
    with pytest.raises(ValueError, match="scalar that depends"):
        audit_gradients(layer, x, loss=lambda z: torch.zeros(()))
    with pytest.raises(ValueError, match="unknown|not a known|backward mode"):
        audit_gradients(layer, x, loss=torch.sum, modes=("exact",))
    with pytest.raises(ValueError, match="no implicit layer"):
        audit_gradients(nn.Linear(3, 3), x, loss=torch.sum)


@pytest.mark.parametrize(("q", "options"), [(-1.5, {}), (0.999, {"max_steps": 50})], ids=["diverges", "is slow"])
def test_solve_that_fails_is_compared_with_the_solution_that_another_solver_finds(q, options):
    """The gradient of ``z' z`` to x is proportional to z: at ``x / (1 - q)``, and at what Picard has reached."""
    layer = FixedPointLayer(Linear(q), solver="picard", on_failure="ignore", **options)
    x = torch.randn(4, 3)
    audit = audit_gradients(layer, x, loss=lambda z: z.square().sum(), modes=("implicit",))
    assert audit.unsolved == audit.to_dict()["unsolved"] == {}
    share = float(layer(x).detach().norm() / (x / (1 - q)).norm())
    assert not 0.5 < share < 2
    assert audit.modes["implicit"].groups["(inputs)"].norm_ratio == pytest.approx(share, rel=1e-3)
    assert audit.cheapest("the beginning of training") is None


def test_reference_is_the_solution_that_the_layer_found():
    """The solutions are x and -x. Plain steps jump to -x, where they are slow; shorter ones lead to x."""

    def f(z, x):
        return torch.where(z > 5, -1.001 * x, z - 0.025 * z * (z * z - x * x))

    layer = FixedPointLayer(f, solver="picard", init=lambda x: 10 * x, max_steps=10)
    audit = audit_gradients(layer, torch.ones(2, 1), loss=torch.sum, modes=("implicit",))
    assert audit.unsolved == {}
    assert audit.modes["implicit"].worst.cosine == pytest.approx(1)
    assert audit.modes["implicit"].worst.norm_ratio == pytest.approx(1, rel=0.01)


class Noisy(Linear):
    """Drops entries of the state, or adds the mean of the samples to each."""

    def __init__(self, kind):
        super().__init__(0.3)
        self.kind = kind

    def forward(self, z, x):
        z = super().forward(z, x)
        return nn.functional.dropout(z, 0.5) if self.kind == "changes" else z + 0.3 * z.tanh().mean(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda z, x: torch.where(z > 0, z - 1, z + 1) + 0 * x, "the solve: 4 of 4 samples "),
        (Noisy("changes"), "returns something else in each call"),
        (Noisy("mixes"), "depends on the others in the batch"),
    ],
    ids=["no solution", "changes", "mixes"],
)
def test_where_no_exact_gradient_is_found_no_mode_is_recommended(f, reason):
    layer = FixedPointLayer(f, solver="picard", max_steps=10, on_failure="ignore")
    audit = audit_gradients(nn.Sequential(layer), torch.randn(4, 3), loss=torch.sum, modes=("implicit", "jfb"))
    assert any(reason in entry for entry in audit.unsolved["0"])
    assert all(audit.cheapest(use) is None for use in USES)
    assert "Exact is" not in str(audit)
    assert f"- 0: {audit.unsolved['0'][0]}" in str(audit)
    found = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert found["unsolved"] == {"0": list(audit.unsolved["0"])}
    assert set(found["cheapest"].values()) == {None}


def test_adjoint_that_is_not_solved_is_reported():
    """The start is a solution, but 1 is an eigenvalue of the Jacobian, so that the adjoint has no solution."""
    layer = FixedPointLayer(lambda z, x: z + 0 * x, solver="picard", on_failure="ignore")
    audit = audit_gradients(layer, torch.randn(4, 3), loss=torch.sum, modes=("jfb",))
    assert [reason.partition(":")[0] for reason in audit.unsolved[""]] == ["its adjoint"]


def test_steps_without_a_gradient_are_compared_with_the_solution():
    layer = FixedPointLayer(Linear(0.5), solver="newton_krylov", rtol=None, max_steps=3)
    audit = audit_gradients(layer, torch.randn(2, 3), loss=torch.sum, modes=("implicit",))
    assert audit.exact == "the gradient of the solution"
    assert audit.modes["implicit"].worst.norm_ratio == pytest.approx(1)


def test_parameters_of_a_shared_map_belong_to_both_layers():
    shared, own = Linear(0.5), Linear(0.3)
    model = nn.Sequential(FixedPointLayer(shared), FixedPointLayer(own), FixedPointLayer(shared))
    audit = audit_gradients(model, torch.randn(2, 3), loss=torch.sum, modes=("implicit",))
    assert audit.layers == {"0": ("0.f",), "1": ("1.f",), "2": ("0.f",)}


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_implicit_is_exact_at_the_default_tolerances_and_ten_terms_of_a_series_are_not(solver):
    """Ten terms leave out ``0.5 ** 10`` of the gradient, a thousandth."""
    layer = FixedPointLayer(Linear(0.5), solver=solver)
    audit = audit_gradients(layer, torch.randn(4, 3), loss=lambda z: z.square().sum(), modes=("implicit", "neumann"))
    exact, training, _ = USES
    assert audit.modes["neumann"].worst.norm_ratio == pytest.approx(1 - 0.5**10, rel=2e-4)
    assert audit.cheapest(exact) == "implicit"
    assert audit.cheapest(training) == "neumann"


def test_model_that_was_built_in_inference_mode_is_audited():
    with torch.inference_mode():
        model, x = Model(), torch.randn(5, 3)
        model.norm.momentum = None
    weight, mean = model.before.weight, model.norm.running_mean
    audit = audit_gradients(model, x, loss=lambda y: y.square().sum() + y[0, 0], modes=("implicit", "unrolled"))
    assert audit.modes["unrolled"].worst.cosine > 1 - 1e-5
    assert set(audit.modes["unrolled"].groups) == {"before", "linear", "norm", "(inputs)"}
    assert model.before.weight is weight
    assert model.norm.running_mean is mean
    assert not mean.any()


def test_keyword_inputs_have_gradients_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FixedPointLayer(lambda z, x: 0.5 * z + x)

        def forward(self, x, *, scale):
            return self.layer(scale * x)

    x = torch.randn(2, 3)
    audit = audit_gradients(Scaled(), x, loss=torch.sum, modes=("jfb",), kwargs={"scale": torch.tensor(2.0)})
    assert audit.modes["jfb"].groups["(inputs)"].norm_ratio == pytest.approx(0.5)
