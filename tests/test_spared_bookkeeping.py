"""What the stopping test leaves out where nothing has happened: with it, every answer is the same bit for bit."""

import math

import pytest
import torch

from solvers import Anderson, Auto, Broyden, Picard, Squarem, Status, Stopping, solve
from solvers._progress import ToleranceTest

SOLVERS = {
    "picard": Picard(),
    "damped": Picard(damping=0.6),
    "anderson": Anderson(),
    "broyden": Broyden(memory=4),
    "squarem": Squarem(),
    "auto": Auto(),
}


def always(value):
    """An attribute that keeps this value, whatever is assigned to it."""
    return property(lambda self: value, lambda self, other: None)


class Thorough(ToleranceTest):
    """Asks in every step how the iterates change, and takes nothing for granted."""

    _near = always(True)
    _num_is_exact = always(False)
    _all_contract = always(False)
    _some_contract = always(True)
    _some_grown = always(True)
    _some_taken_back = always(True)
    _some_lost = always(True)
    _some_at_floor = always(True)


RATES = {
    "alike": torch.linspace(0.45, 0.55, 24),
    "apart": torch.linspace(-0.99, 0.99, 24),
    "lost": torch.cat((torch.linspace(0.1, 0.97, 18), torch.tensor([-1.0, 1.0, 1.02, 3.0, math.inf, math.nan]))),
}
MAPS = {
    "affine": lambda z, rate, shift: rate * z.flip(1) + shift,
    "sine": lambda z, rate, shift: rate * torch.sin(3 * z) + shift,
    "logarithm": lambda z, rate, shift: rate * torch.log(z) + 2 + shift.abs(),
    "growing": lambda z, rate, shift: 3 * torch.tanh(z) + 1e-3 * rate * shift,
}
STOPPINGS = {
    "loose": Stopping(rtol=1e-3, max_steps=60),
    "tight": Stopping(rtol=1e-14, atol=0, max_steps=90, patience=20),
    "now and then": Stopping(rtol=1e-6, norm="max", check_every=3, max_steps=60),
}


@pytest.mark.long
@pytest.mark.parametrize("compact", [False, True], ids=["held", "compact"])
@pytest.mark.parametrize("stopping", STOPPINGS.values(), ids=STOPPINGS.keys())
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_answers_are_the_same(solver, rates, stopping, compact, monkeypatch):
    rate = RATES[rates].double().unsqueeze(1)
    statuses = set()
    for f in MAPS.values():
        shift = torch.randn(24, 5, dtype=torch.float64)
        z0 = torch.randn(24, 5, dtype=torch.float64) * torch.logspace(-6, 4, 24).double().unsqueeze(1)
        options = {"args": (rate, shift), "stopping": stopping, "history": True, "on_failure": "ignore"}
        spared = solve(f, z0, solver, compact=compact, **options)
        with monkeypatch.context() as patch:
            patch.setattr("solvers._solve.ToleranceTest", Thorough)
            # Which samples leave the batch, and when, depends on what is known; what they return does not.
            thorough = solve(f, z0, solver, compact=compact and solver != Auto(), **options)
        for name in ("value", "status", "num_steps", "residual", "change", "error_estimate", "history"):
            assert torch.equal(getattr(spared, name).nan_to_num(nan=-1.0), getattr(thorough, name).nan_to_num(nan=-1.0))
        statuses |= {Status(status) for status in spared.status.unique().tolist()}
    assert len(statuses) > 1 or rates == "alike"


@pytest.mark.parametrize("rates", RATES)
def test_gradients_are_the_same(rates, monkeypatch):
    rate = RATES[rates].double().unsqueeze(1)
    shift = torch.randn(24, 5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for test in (ToleranceTest, Thorough):
        with monkeypatch.context() as patch:
            patch.setattr("solvers._solve.ToleranceTest", test)
            value = solve(MAPS["sine"], torch.zeros(24, 5).double(), args=(rate, shift), on_failure="ignore").value
        gradients += torch.autograd.grad(value.sum(), shift)
    assert torch.equal(gradients[0].nan_to_num(nan=-1.0), gradients[1].nan_to_num(nan=-1.0))


def test_leaves_with_their_own_tolerances(monkeypatch):
    rate = RATES["apart"].double()
    z0 = {"a": torch.zeros(24, 3).double(), "b": torch.ones(24).double()}

    def f(z):
        return {"a": rate.unsqueeze(1) * torch.cos(z["a"]), "b": 0.5 * rate * z["b"] + 1}

    stopping = Stopping(rtol={"a": 1e-3, "b": 1e-8}, atol={"a": 0.0, "b": 1e-9}, max_steps=80)
    solutions = []
    for test in (ToleranceTest, Thorough):
        monkeypatch.setattr("solvers._solve.ToleranceTest", test)
        solutions.append(solve(f, z0, Picard(), stopping=stopping, on_failure="ignore"))
    for name in ("status", "num_steps", "residual", "error_estimate"):
        assert torch.equal(getattr(solutions[0], name), getattr(solutions[1], name))
    assert torch.equal(solutions[0].value["a"], solutions[1].value["a"])


def test_the_estimate_for_a_sample_that_diverges_does_not_depend_on_the_others():
    rate = torch.tensor([[3.0], [0.5], [0.6]], dtype=torch.float64)
    estimates = [
        solve(lambda z, rate=rate: rate * z + 1, torch.zeros_like(rate), "picard", on_failure="ignore").error_estimate[
            0
        ]
        for rate in (rate, rate[:1])
    ]
    assert estimates[0].isfinite()
    assert estimates[0] == estimates[1]
