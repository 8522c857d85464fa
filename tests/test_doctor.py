"""The diagnosis names the cause on sick maps, cures it where that is possible, and is silent on healthy ones."""

import dataclasses
import json
import math
import re
import warnings

import pytest
import torch
from sick_maps import HEALTHY, SICK, healthy, sick
from torch import nn

from implicit import FixedPointLayer, InvertibleResidual, diagnose, spectral_norm
from implicit.diagnostics import Cause, measurements
from implicit.diagnostics.measurements import leading_eigenvalues, precision_floor
from solvers import ConvergenceWarning, Picard, Steps, Stopping
from solvers.testing.real_maps import multiscale

# What a batch of one cannot show.
NEEDS_A_BATCH = {"coupled", "batch normalization"}


def check(name, **options):
    cause, _ = SICK[name]
    patient = sick(name, **options)
    report = diagnose(patient.model, *patient.inputs).layers[""]
    assert report.causes[:1] == (cause,), str(report)
    assert report.num_solves <= 20
    if patient.curable:
        assert report.proposal is not None, str(report)
        assert report.proposal.num_converged == report.proposal.num_samples, str(report)
    return report


@pytest.mark.parametrize("name", SICK)
def test_cause_of_a_sick_map_is_named_and_cured(name):
    check(name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "unit", "batch", "seed"),
    [
        (torch.float32, 1e-6, 3, 1),
        pytest.param(torch.float64, 1e6, 1, 2, marks=pytest.mark.long),
        pytest.param(torch.float32, 1e6, 9, 3, marks=pytest.mark.long),
        pytest.param(torch.float64, 1e-6, 2, 4, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", SICK)
def test_cause_does_not_depend_on_dtype_units_batch_or_seed(name, dtype, unit, batch, seed):
    if batch == 1 and name in NEEDS_A_BATCH:
        batch = 2
    check(name, dtype=dtype, unit=unit, batch=batch, seed=seed)


@pytest.mark.parametrize(
    ("dtype", "batch", "seed"), [(torch.float64, 4, 0), (torch.float32, 1, 1), (torch.float32, 7, 2)]
)
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_layers_are_healthy(name, dtype, batch, seed):
    patient = healthy(name, dtype=dtype, batch=batch, seed=seed)
    diagnosis = diagnose(patient.model, *patient.inputs)
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.causes == ()
    (report,) = diagnosis.layers.values()
    assert report.proposal is None
    assert report.num_solves <= 8
    assert "Nothing is wrong." in str(diagnosis)


@pytest.mark.long
def test_slow_network_is_not_taken_for_one_without_equilibrium():
    """A multiscale network with a radius of 0.98, whose state is a pytree, needs more steps than there are."""
    problem = multiscale(torch.float32, batch=2)
    layer = FixedPointLayer(problem.f, init=lambda: problem.z0)
    report = diagnose(layer).layers[""]
    assert report.causes == (Cause.SLOW_CONTRACTION,)
    assert report.proposal is not None
    assert report.proposal.num_converged == 2


def test_proposal_converges_when_it_is_written_into_a_program():
    """The text of the proposal is code; here it is run as such."""
    names = {"Picard": Picard}
    import solvers

    names |= {name: getattr(solvers, name) for name in ("Anderson", "Auto", "Broyden", "NewtonKrylov")}
    for name in ("slow contraction", "expansion", "logistic cycle", "tight", "too few steps", "half line"):
        patient = sick(name)
        proposal = diagnose(patient.model, *patient.inputs).layers[""].proposal
        options = eval(f"dict({proposal.setting})", names)
        layer = patient.model
        if "solver" in options:
            layer.solver = options.pop("solver")
        _, solution = layer(*patient.inputs, return_solution=True, **options)
        assert solution.converged.all(), name
        assert solution.num_evals == proposal.num_evals


def test_proposed_solver_goes_with_the_backward_mode():
    layer = FixedPointLayer(lambda z, x: 1.5 * z + torch.tanh(z + x), solver="picard", backward="unrolled")
    proposal = diagnose(layer, torch.randn(3, 4)).layers[""].proposal
    assert proposal is not None
    assert not re.search("NewtonKrylov|Auto", proposal.setting)


def test_changing_map_names_the_module():
    patient = sick("dropout")
    (finding,) = diagnose(patient.model, *patient.inputs).layers[""].findings
    assert finding.modules == ("Module.inner (Dropout)",)
    patient = sick("batch normalization")
    (finding,) = diagnose(patient.model, *patient.inputs).layers[""].findings
    assert finding.modules == ("Module.inner (BatchNorm1d)",)


class Model(nn.Module):
    """Two layers, one of them sick and called twice, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.bad = FixedPointLayer(lambda z, x: torch.tanh(self.inner(z)) - 1.5 * z + x, solver="picard")
        self.good = FixedPointLayer(lambda z, x: 0.3 * torch.tanh(z) + x)
        self.silent = FixedPointLayer(lambda z, x: z)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        x = self.drop(self.norm(self.good(x)))
        return self.bad(0 * x) + self.bad(x)


def test_model_is_left_as_it_was():
    model = Model().train()
    x = torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model(x).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    diagnosis = diagnose(model, x)  # warnings are errors in the tests, so that no solve reports its failure
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in grads.items())
    assert all(vars(module).keys() == attributes[name].keys() for name, module in model.named_modules())
    assert all(vars(layer)["on_failure"] == "warn" for layer in (model.bad, model.good))
    assert not x.requires_grad
    assert list(diagnosis.layers) == ["bad", "good"]
    assert diagnosis.silent == ("silent",)
    assert diagnosis.layers["bad"].num_solves_of_model == 2
    assert len(diagnosis.layers["bad"].num_steps) == 10
    assert diagnosis.layers["good"].findings == ()
    assert "OSCILLATION" in str(diagnosis)
    assert "No solve was made by 'silent'." in str(diagnosis)


def test_diagnosis_repeats_itself_and_does_not_depend_on_the_grad_mode():
    patient = sick("saturated rotation", dtype=torch.float32)

    def shown():
        found = diagnose(patient.model, *patient.inputs).to_dict()
        found["layers"][""].pop("seconds")
        return found

    expected = shown()
    torch.manual_seed(7)
    assert shown() == expected
    with torch.no_grad():
        assert shown() == expected
    with torch.inference_mode():
        assert shown() == expected


def test_report_is_json_and_a_table():
    patient = sick("not finite")
    diagnosis = diagnose(patient.model, *patient.inputs)
    found = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    layer = found["layers"][""]
    assert not found["healthy"]
    assert layer["findings"][0]["cause"] == "not finite"
    assert layer["statuses"] == {"NONFINITE": 4}
    fields = {field.name for field in dataclasses.fields(diagnosis.layers[""])}
    assert layer.keys() == fields
    heads = str(diagnosis).splitlines()[0].split()
    assert heads[:6] == ["layer", "statuses", "steps", "residual", "rate", "eigenvalue"]
    assert heads[6:] == ["bound", "floor", "calls", "ms", "saved", "diagnosis"]


def test_numbers_of_a_contraction():
    """Everything that is reported of a linear map can be computed by hand."""
    a = torch.tensor([[0.5, 0.3], [-0.3, 0.5]], dtype=torch.float64)
    layer = FixedPointLayer(lambda z, x: z @ a.T + x, solver="picard", rtol=1e-8, max_steps=100)
    x = torch.randn(3, 2, dtype=torch.float64)
    report = diagnose(layer, x).layers[""]
    assert torch.allclose(report.eigenvalues[:, 0], torch.tensor(0.5 + 0.3j, dtype=torch.complex128))
    assert torch.allclose(report.eigenvalues[:, 1], torch.tensor(0.5 - 0.3j, dtype=torch.complex128))
    assert (report.eigenvalue_error < 1e-12).all()
    assert torch.allclose(report.rate, torch.tensor(math.hypot(0.5, 0.3)).double(), rtol=0.1)
    assert torch.allclose(report.transient_growth, torch.tensor(math.hypot(0.5, 0.3)).double())
    _, solution = layer(x, return_solution=True)
    assert report.num_evals == solution.num_evals == len(report.history)
    assert report.num_steps.tolist() == solution.num_steps.tolist()
    assert report.statuses == {"CONVERGED": 3}


def test_certified_bound_where_there_is_one():
    g = nn.Sequential(spectral_norm(nn.Linear(6, 6), coeff=0.8, method="exact"), nn.Tanh())
    report = diagnose(InvertibleResidual(g), torch.randn(3, 6)).layers[""]
    assert report.lipschitz == pytest.approx(0.8, rel=1e-5) or report.lipschitz < 0.8

    class Map(nn.Module):
        def forward(self, z, x):
            return 0.5 * z + x

    layer = FixedPointLayer(Map())
    assert diagnose(layer, torch.randn(3, 6)).layers[""].lipschitz is None
    assert diagnose(layer, torch.randn(3, 6), known={Map: 0.5}).layers[""].lipschitz == 0.5


@pytest.mark.parametrize("with_scipy", [True, False])
def test_eigenvalues_of_a_large_map(with_scipy, monkeypatch):
    """More entries than Krylov vectors, and a complex pair close to other eigenvalues."""
    if with_scipy:
        pytest.importorskip("scipy")
    else:
        monkeypatch.setitem(__import__("sys").modules, "scipy.sparse", None)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 200, dtype=torch.float64, generator=generator) / 200**0.5
    expected = torch.linalg.eigvals(a)
    expected = expected[expected.abs().argsort(descending=True)]
    z = torch.zeros(2, 200, dtype=torch.float64)
    found = leading_eigenvalues(lambda z: z @ a.T, z, generator)
    nearest = (expected - found.eigenvalues[:, :1]).abs().min(dim=1).values
    if with_scipy:  # which computes the sample with the largest residual
        assert nearest.min() < 1e-5
        best = int(nearest.argmin())
        assert torch.allclose(found.radius[best], expected[0].abs(), rtol=1e-5)
    assert (found.radius - expected[0].abs()).abs().max() < 0.1 * expected[0].abs()


def test_eigenvalues_of_a_map_without_autograd():
    a = torch.tensor([[0.0, -0.9], [0.9, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = leading_eigenvalues(lambda z: (z @ a.T).detach(), torch.ones(1, 2, dtype=torch.float64), generator)
    assert torch.allclose(found.eigenvalues[0, 0], torch.tensor(0.9j, dtype=torch.complex128), atol=1e-6)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("grid", [1e-2, 1e-4, 1e-6, None])
def test_precision_floor_is_about_the_grid_that_a_map_rounds_to(grid, unit):
    """A grid of so many times the size of the state, whose rounding errors have a deviation of 0.29 grid."""
    generator = torch.Generator().manual_seed(0)
    z = unit * torch.randn(3, 100, dtype=torch.float64, generator=generator)

    def f(z):
        fz = unit * torch.sin(z / unit)
        return fz if grid is None else torch.round(fz / (grid * unit)) * (grid * unit)

    floor = precision_floor(f, z, generator)
    if grid is None:
        assert (floor < 1e-15).all()
    else:
        assert (floor > 0.02 * grid).all()
        assert (floor < 2 * grid).all()


def test_map_with_kinks_has_no_rounding():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 100, generator=generator)
    assert (precision_floor(torch.relu, z, generator) < 32 * torch.finfo(z.dtype).eps).all()


def test_autocast_at_the_call_is_that_of_the_diagnosis():
    linear = nn.Linear(16, 16)
    nn.init.orthogonal_(linear.weight)

    def f(z, x):
        return x - 0.9 * linear(z)

    layer = FixedPointLayer(f, solver="picard", rtol=1e-6, max_steps=300, on_failure="ignore")
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        causes = diagnose(layer, x).causes
    assert causes[0] is Cause.PRECISION_FLOOR


def test_fixed_number_of_steps_is_sick_only_if_the_residual_grows():
    x = torch.randn(3, 4)
    assert diagnose(FixedPointLayer(lambda z, x: 0.9 * z + x, max_steps=3, rtol=None, solver="picard"), x).healthy
    growing = FixedPointLayer(lambda z, x: x - 1.5 * z, max_steps=6, rtol=None, solver="picard")
    assert diagnose(growing, x).causes == (Cause.OSCILLATION,)


def test_mixture_of_samples_has_a_finding_for_each_cause():
    rates = torch.tensor([[0.3], [0.995], [1.3], [-1.3]])
    layer = FixedPointLayer(lambda z, rate: rate * z + 1 + 0 * z, init=torch.zeros_like, solver="picard")
    layer.on_failure = "ignore"
    found = diagnose(layer, rates.expand(4, 3)).layers[""]
    causes = {finding.cause: finding.num_samples for finding in found.findings}
    assert causes == {Cause.SLOW_CONTRACTION: 1, Cause.EXPANSION: 1, Cause.OSCILLATION: 1}
    assert found.proposal.num_converged == 4


def test_nested_layers_are_examined_each():
    inner = FixedPointLayer(lambda u, z: 0.3 * torch.tanh(u) + z)
    outer = FixedPointLayer(lambda z, x: 0.5 * inner(z) + x)
    model = nn.ModuleDict({"inner": inner, "outer": outer})
    model.forward = outer.forward
    diagnosis = diagnose(model, torch.randn(2, 3))
    assert list(diagnosis.layers) == ["inner", "outer"]
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.layers["inner"].num_solves_of_model > 1


def test_call_of_a_layer_with_its_own_stopping_is_examined_with_it():
    layer = FixedPointLayer(lambda z, x: 0.6 * z + x, solver="picard")

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, stopping=Stopping(rtol=1e-4, max_steps=4))

    report = diagnose(Caller(), torch.randn(2, 3)).layers["layer"]
    assert report.causes == (Cause.TOO_FEW_STEPS,)
    assert "max_steps=4" in report.settings
    assert report.name == "layer (FixedPointLayer of Caller)"


def test_unfit_models_are_refused():
    with pytest.raises(TypeError, match=re.escape("The model must be a torch.nn.Module")):
        diagnose(torch.cos, torch.ones(2))
    with pytest.raises(ValueError, match="Linear has no implicit layer"):
        diagnose(nn.Linear(2, 2), torch.ones(2))
    model = nn.ModuleDict({"layer": FixedPointLayer(torch.cos)})
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=re.escape("None of the implicit layers ['layer'] made a solve")):
        diagnose(model, torch.ones(2))


def test_error_in_the_map_is_the_users_own_and_leaves_the_model_as_it_was():
    def broken(z, x):
        raise KeyError("mine")

    layer = FixedPointLayer(broken)
    with pytest.raises(KeyError, match="mine"):
        diagnose(layer, torch.ones(2, 2))
    assert "_solve" not in vars(layer)
    assert layer.on_failure == "warn"


@pytest.mark.parametrize(("shape", "statuses"), [((0, 3), {}), ((2, 0), {"CONVERGED": 2})])
def test_no_samples_or_samples_without_entries(shape, statuses):
    diagnosis = diagnose(FixedPointLayer(lambda z, x: 0.5 * z + x), torch.ones(shape))
    assert diagnosis.healthy
    assert diagnosis.layers[""].statuses == statuses
    assert "Nothing is wrong." in str(diagnosis)


def test_figure_has_a_row_of_three_for_each_layer():
    pytest.importorskip("matplotlib")
    diagnosis = diagnose(Model(), torch.randn(5, 4))
    figure = diagnosis.plot()
    assert len(figure.axes) == 6
    assert figure.axes[0].get_yscale() == "log"
    assert len(diagnosis.plot("good").axes) == 3
    with pytest.raises(KeyError, match="No layer 'other'"):
        diagnosis.plot("other")
    patient = sick("not finite")
    diagnose(patient.model, *patient.inputs).plot()


def test_figure_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    diagnosis = diagnose(FixedPointLayer(lambda z, x: 0.5 * z + x), torch.ones(1, 3))
    with pytest.raises(ImportError, match=re.escape("pip install matplotlib")):
        diagnosis.plot()


def test_krylov_space_holds_the_eigenvalues():
    assert measurements.NUM_EIGENVALUES <= measurements.KRYLOV_STEPS


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_one_coupled_problem_is_diagnosed(solver):
    """With batch_dims=0 a solution's history has one dimension."""
    layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z.flip(0)) + x, solver=solver, batch_dims=0)
    diagnosis = diagnose(layer, torch.randn(6))
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.layers[""].history.shape[1] == 1
    untested = FixedPointLayer(lambda z, x: 0.5 * z + x, solver=solver, batch_dims=0, stopping=Steps(4))
    assert diagnose(untested, torch.randn(6)).layers[""].history.shape == (4, 1)
