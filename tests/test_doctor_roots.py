"""The diagnosis of calls of fixed_point and root: which it sees, what it calls them, and the causes of sick roots."""

import math
import re
import threading
import warnings

import pytest
import torch
from sick_maps import SICK as SICK_MAPS
from sick_roots import HEALTHY, SICK
from torch import nn

import solvers
from implicit import FixedPointLayer, audit_gradients, diagnose, fixed_point, monitor_solves, record_solutions, root
from implicit.diagnostics import Cause
from solvers import ConvergenceWarning, Newton, Steps

CONDITIONS = [(torch.float64, 1.0, 4, 0), (torch.float32, 1e-3, 3, 1), (torch.float32, 1e4, 1, 2)]


def under_conditions(names):
    """Each under the first of the conditions, and under one of the others in turn."""
    short = [(name, *CONDITIONS[0]) for name in names]
    long = [pytest.param(name, *CONDITIONS[1 + i % 2], marks=pytest.mark.long) for i, name in enumerate(names)]
    return pytest.mark.parametrize(("name", "dtype", "unit", "batch", "seed"), short + long)


@under_conditions(SICK)
def test_cause_of_a_sick_root_is_named_and_cured(name, dtype, unit, batch, seed):
    if name == "decay" and dtype == torch.float32:
        pytest.skip("exp(-z) is zero in float32 soon, which is a root")
    cause, problem = SICK[name]
    batch = max(batch, 2) if name == "coupled" else batch
    model, x = problem.make(dtype, batch, unit, seed)
    (report,) = diagnose(model, x).layers.values()
    assert report.causes[:1] == (cause,), str(report)
    assert report.num_solves <= 20
    if problem.curable:
        assert report.proposal is not None, str(report)
        assert report.proposal.num_converged == batch, str(report)


@under_conditions(HEALTHY)
def test_healthy_roots_are_healthy(name, dtype, unit, batch, seed):
    if name.startswith("far") and dtype == torch.float32:
        pytest.skip("the start is too far for float32")
    model, x = HEALTHY[name].make(dtype, batch, unit, seed)
    (report,) = diagnose(model, x).layers.values()
    assert report.findings == (), str(report)
    assert report.proposal is None
    assert report.root
    assert report.num_solves <= 8


def test_every_cause_has_a_patient():
    found = {cause for cause, _ in (*SICK_MAPS.values(), *SICK.values())}
    assert found == set(Cause) - {Cause.UNKNOWN}
    assert all(cause.meaning for cause in Cause)


@pytest.mark.parametrize("name", ["valley", "double root", "far", "few steps", "logarithm", "tight", "saddle"])
def test_proposal_converges_when_it_is_written_into_a_program(name):
    """The text of the proposal is code; here it is run as such."""
    model, x = SICK[name][1].make(torch.float64, 4, 1.0, 0)
    (report,) = diagnose(model, x).layers.values()
    options = eval(f"dict({report.proposal.setting})", vars(solvers).copy())
    options = {**SICK[name][1].options, **options}
    z0 = torch.tensor(SICK[name][1].start).to(x).expand(len(x), -1)
    _, solution = root(SICK[name][1].equations, z0, x, **options, return_solution=True)
    assert solution.converged.all()
    assert solution.num_evals == report.proposal.num_evals


def kepler(anomaly, mean, eccentricity):
    return anomaly - eccentricity * anomaly.sin() - mean


class Orbit(nn.Module):
    def forward(self, mean):
        return root(kepler, mean, mean, 0.5)


class Model(nn.Module):
    """A layer, calls in the forward pass of two modules, and one in another method."""

    def __init__(self):
        super().__init__()
        self.layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x)
        self.head = Orbit()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def settle(self, x):
        return fixed_point(lambda z, x: self.rate * z + x, torch.zeros_like(x), x, solver="picard")

    def forward(self, x):
        x = self.settle(self.settle(self.layer(x)))
        return self.head(x) + fixed_point(lambda z: 0.3 * z.cos(), x)


NAMES = ["layer", "fixed point of <lambda>", "head: root of kepler", "fixed point of <lambda> (2)"]


def test_calls_are_named_by_module_and_function():
    diagnosis = diagnose(Model(), 0.1 * torch.randn(3, 2))
    assert list(diagnosis.layers) == NAMES
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.silent == ()
    assert [report.num_solves_of_model for report in diagnosis.layers.values()] == [1, 2, 1, 1]
    assert [report.root for report in diagnosis.layers.values()] == [False, False, True, False]
    assert diagnosis.layers["head: root of kepler"].name == "head: root of kepler (in Orbit)"
    assert "fixed point of <lambda> (2) (in Model)" in str(diagnosis)


def test_numbers_of_a_root():
    mean = torch.linspace(0.2, 3, 5, dtype=torch.float64).unsqueeze(1)
    (report,) = diagnose(Orbit(), mean).layers.values()
    z, solution = root(kepler, mean, mean, 0.5, return_solution=True)
    assert report.statuses == {"CONVERGED": 5}
    assert report.num_steps.tolist() == solution.num_steps.tolist()
    assert torch.allclose(report.eigenvalues[:, 0].real, (1 - 0.5 * z.cos()).squeeze(1))
    assert report.history[-1].max() < 1e-7
    assert report.transient_growth.isnan().all()
    assert (report.precision_floor < 1e-14).all()


def test_call_of_fixed_point_is_diagnosed_as_a_layer_is():
    class Call(nn.Module):
        def forward(self, x):
            return fixed_point(lambda z, x: x - 1.5 * z, torch.zeros_like(x), x, solver="picard", max_steps=40)

    layer = FixedPointLayer(lambda z, x: x - 1.5 * z, solver="picard", max_steps=40)
    x = torch.randn(2, 3)
    (call,), (own,) = (diagnose(model, x).layers.values() for model in (Call(), layer))
    assert call.findings == own.findings
    assert call.proposal == own.proposal
    assert call.causes == (Cause.OSCILLATION,)


@pytest.mark.long
def test_calls_within_maps_are_examined_each():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FixedPointLayer(self.step)

        def step(self, z, x):
            return 0.3 * root(lambda u, z: u**3 + u - z, torch.zeros_like(z), z) + x

        def forward(self, x):
            return root(lambda z, x: z - 0.1 * self.layer(z) - x, x, x)

    diagnosis = diagnose(Outer(), torch.randn(2, 1, dtype=torch.float64))
    assert list(diagnosis.layers) == ["layer", "root of <lambda>", "root of <lambda> (2)"]
    assert diagnosis.healthy, str(diagnosis)
    outer, inner = (diagnosis.layers[name].num_solves_of_model for name in list(diagnosis.layers)[1:])
    assert outer == 1 < inner


def test_solves_of_other_threads_and_outside_of_the_model_are_not_seen():
    class Threaded(nn.Module):
        def forward(self, x):
            thread = threading.Thread(target=lambda: root(kepler, x, x, 0.9))
            thread.start()
            thread.join()
            return root(kepler, x, x, 0.5)

    x = torch.ones(2, 1)
    (report,) = diagnose(Threaded(), x).layers.values()
    assert report.num_solves_of_model == 1
    with monitor_solves(Orbit()) as monitor:
        root(kepler, x, x, 0.5)
        with pytest.raises(ValueError, match="no implicit layer"):
            monitor.step()


def test_options_of_the_call_are_those_of_the_diagnosis():
    class Call(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

        def forward(self, x):
            return root(lambda z, x: z**3 - x, torch.ones_like(x), x, **self.options)

    x = 1 + torch.rand(4, 2, 3, dtype=torch.float64)
    for options in (
        {"batch_dims": 0},
        {"batch_dims": 2},
        {"chunk_size": 3},
        {"compact": True},
        {"solver": "broyden", "compile": True},
        {"stopping": Steps(6)},
        {"on_failure": "raise"},
    ):
        diagnosis = diagnose(Call(**options), x)
        assert diagnosis.healthy, (options, str(diagnosis))
    (report,) = diagnose(Call(max_steps=3, on_failure="raise", solver=Newton()), 50 * x).layers.values()
    assert report.causes[0] is Cause.TOO_FEW_STEPS
    assert "Newton" in report.settings
    assert "max_steps=3" in report.settings
    (empty,) = diagnose(Call(), x[:0]).layers.values()
    assert empty.findings == ()


def test_state_that_is_a_tree():
    class Pair(nn.Module):
        def forward(self, x):
            return root(lambda z, x: {"a": z["a"] + z["b"] - x, "b": z["a"] - z["b"]}, {"a": x, "b": x}, x)["a"]

    assert diagnose(Pair(), torch.randn(3, 2)).healthy


def test_random_module_in_the_function_is_named():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.equations = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

        def forward(self, x):
            return root(self.equations, x, on_failure="ignore")

    (report,) = diagnose(Random(), torch.randn(4, 3)).layers.values()
    assert report.name == "root of equations (in Random)"
    assert report.findings[0].cause is Cause.MAP_CHANGES
    assert report.findings[0].modules == ("Sequential.1 (Dropout)",)


def test_compiled_model_is_diagnosed_as_it_is_written():
    assert list(diagnose(torch.compile(Orbit(), backend="eager"), torch.ones(2, 1)).layers) == [
        "_orig_mod: root of kepler"
    ]


def test_figure_of_a_root_has_no_unit_circle():
    pytest.importorskip("matplotlib")
    figure = diagnose(Orbit(), torch.ones(2, 1)).plot()
    assert figure.axes[1].get_title() == "eigenvalues of the Jacobian of F"
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["0, where J is singular"]


def test_audit_of_calls():
    model, x = Model().double(), 0.1 * torch.randn(3, 2, dtype=torch.float64)
    audit = audit_gradients(model, x, loss=lambda y: y.square().sum(), modes=("implicit", "jfb", "unrolled"))
    assert list(audit.layers) == NAMES
    assert audit.modes["implicit"].worst.cosine == pytest.approx(1)
    assert "Newton" in audit.modes["unrolled"].error  # whose steps have no gradient
    # The map 0.5 z + x, twice, and 0.5 tanh(z) + x, whose derivative is about 0.5: JFB leaves three factors of 2 out.
    assert audit.modes["jfb"].groups["(inputs)"].norm_ratio < 0.5


def test_bias_of_jfb_at_a_root_by_hand():
    """The exact gradient to x is (1, 1 / 3); JFB makes it of one step along F, and so of one number for both."""

    class Two(nn.Module):
        def forward(self, x):
            return root(lambda z, x: torch.tensor([1.0, 3.0]).to(z) * z - x, torch.zeros_like(x), x)

    x = torch.ones(1, 2, dtype=torch.float64)
    audit = audit_gradients(Two(), x, loss=torch.sum, modes=("implicit", "jfb"))
    assert audit.modes["implicit"].worst.cosine == pytest.approx(1)
    assert audit.modes["implicit"].worst.norm_ratio == pytest.approx(1)
    assert audit.modes["jfb"].worst.cosine == pytest.approx((4 / 3) / math.sqrt(2 * 10 / 9))
    assert audit.exact == "the gradient of the solution"


def test_monitor_records_calls(tmp_path):
    model, file = Model(), tmp_path / "solves.csv"
    with monitor_solves(model, csv_file=file) as monitor:
        for _ in range(3):
            model(0.1 * torch.randn(3, 2)).sum().backward()
            monitor.step()
    assert sorted(monitor.latest) == sorted(NAMES)
    assert monitor.latest["fixed point of <lambda>"].samples == 6
    assert monitor.latest["head: root of kepler"].converged == 1
    assert len(file.read_text().splitlines()) == 1 + 3 * len(NAMES)


def test_solves_of_a_diagnosis_and_an_audit_are_not_those_of_the_model():
    model, x = Orbit(), torch.ones(2, 1, dtype=torch.float64)
    with monitor_solves(model) as outer, monitor_solves(model) as inner, record_solutions(model) as record:
        audit_gradients(model, x, loss=torch.sum, modes=("jfb",))
        diagnose(model, x)
        assert record == {}
        model(x)
        inner.step()
        outer.step()
    assert outer.latest == inner.latest
    assert list(outer.latest) == list(record) == ["root of kepler"]
    assert outer.latest["root of kepler"].samples == 2
    assert record["root of kepler"][0].history is not None


def test_diagnosis_reports_no_failure_and_leaves_the_thread_as_it_was():
    class Bad(nn.Module):
        def forward(self, x):
            return root(lambda z: z**2 + 1, x)

    x = torch.ones(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnose(Bad(), x)
    with pytest.warns(ConvergenceWarning):
        Bad()(x)


def test_model_without_solves_is_refused():
    message = re.escape("Linear has no implicit layer (FixedPointLayer, InvertibleResidual or iMLP), and its forward")
    with pytest.raises(ValueError, match=message):
        diagnose(nn.Linear(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match=message):
        audit_gradients(nn.Linear(2, 2), torch.ones(2), loss=torch.sum)
    with pytest.raises(ValueError, match=message), monitor_solves(nn.Linear(2, 2)) as monitor:
        monitor.step()
