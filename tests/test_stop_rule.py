"""The one value that says when a solve stops: its shorthand, its use by layers and calls, its defaults."""

import pickle
import typing

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import nn

import implicit
import solvers
from implicit import FixedPointLayer, InvertibleResidual, fixed_point, record_solutions
from solvers import Anderson, Auto, Broyden, Iteration, Picard, Squarem, Status, Steps, Stopping, solve
from solvers.testing import BANK

DOUBLE = {"dtype": torch.float64}


def halved(z, x=1.0):
    return 0.5 * z + x


def test_steps_are_what_two_missing_tolerances_mean():
    by_value = solve(halved, torch.zeros(2, 3), "picard", stopping=Steps(4))
    for options in (
        {"rtol": None, "atol": None, "max_steps": 4},
        {"rtol": None, "max_steps": 4},
        {"stopping": Stopping(rtol=None, atol=None, max_steps=4)},
        {"stopping": Stopping(rtol=None, atol=None), "max_steps": 4},
        {"stopping": Steps(9), "max_steps": 4},
    ):
        solution = solve(halved, torch.zeros(2, 3), "picard", **options)
        assert torch.equal(solution.value, by_value.value)
        assert (solution.status == Status.UNTESTED).all()
        assert solution.num_evals == 4


def test_options_beside_the_value_replace_its_limits():
    stopping = Stopping(rtol=1e-9, max_steps=3, check_every=2)
    solution = solve(halved, torch.zeros(1, 1).double(), "picard", stopping=stopping, on_failure="ignore")
    assert solution.num_evals == 3
    solution = solve(halved, torch.zeros(1, 1).double(), "picard", stopping=stopping, max_steps=100)
    assert int(solution.num_steps) % 2 == 0
    assert solution.converged.all()


def test_a_layer_takes_what_a_solve_takes():
    rows = []

    def counted(z, x):
        rows.append(len(z))
        return x * z + 1

    x = torch.linspace(0.1, 0.9, 8, **DOUBLE).unsqueeze(1)
    layer = FixedPointLayer(counted, solver="picard", rtol=1e-8, max_steps=500, compact=True, check_every=3)
    z, solution = layer(x, return_solution=True)
    assert torch.allclose(z, 1 / (1 - x), rtol=1e-6)
    assert rows[0] == 8
    assert rows[-1] <= 6
    assert ((solution.num_steps % 3 == 0) | (solution.num_steps == 1)).all()
    plain = fixed_point(counted, torch.zeros_like(x), x, solver="picard", rtol=1e-8, max_steps=500, check_every=3)
    assert torch.allclose(z, plain, rtol=1e-12)


@pytest.mark.parametrize("backward", ["implicit", "unrolled", "phantom", "jfb", "checkpointed"])
def test_compaction_leaves_gradients_alone(backward):
    x = torch.linspace(0.1, 0.8, 8, **DOUBLE).unsqueeze(1)
    gradients = []
    for compact in (False, True):
        x = x.detach().requires_grad_()
        layer = FixedPointLayer(
            lambda z, x: x * torch.tanh(z) + 1, backward=backward, rtol=1e-12, max_steps=200, compact=compact
        )
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-9)


def test_a_call_has_its_own_stopping():
    layer = FixedPointLayer(halved, solver="picard", rtol=1e-3)
    x = torch.ones(2, 3, **DOUBLE)
    number = {}
    for name, options in {
        "own": {},
        "tighter": {"rtol": 1e-9},
        "two steps": {"rtol": None, "atol": None, "max_steps": 2},
        "value": {"stopping": Steps(5)},
        "own again": {},
    }.items():
        number[name] = int(layer(x, return_solution=True, **options)[1].num_steps.max())
    assert number["own"] == number["own again"] < number["tighter"]
    assert (number["two steps"], number["value"]) == (2, 5)
    assert layer(x, rtol=1e-9, return_solution=True)[1].residual.max() < 1e-9


def test_attributes_of_a_layer_can_be_changed():
    layer = FixedPointLayer(halved, solver="picard")
    assert (layer.rtol, layer.max_steps) == (1e-4, 50)
    layer.rtol, layer.atol, layer.max_steps = 1e-6, 0.0, 99
    assert layer.stopping == Stopping(rtol=1e-6, atol=0.0, max_steps=99)
    layer.stopping = Steps(3)
    assert (layer.rtol, layer.max_steps) == (None, 3)
    layer.max_steps = 4
    assert layer.stopping == Steps(4)
    assert "stopping=Steps(n=4)" in repr(layer)
    assert pickle.loads(pickle.dumps(Stopping(rtol={"a": 1e-3}))) == Stopping(rtol={"a": 1e-3})


def test_numbers_of_numpy_are_numbers():
    stopping = Stopping(
        rtol=np.float32(1e-3),
        atol=np.float64(1e-9),
        max_steps=np.int64(40),
        check_every=np.int32(1),
        patience=np.int64(9),
    )
    assert solve(halved, torch.zeros(2, 3), Anderson(memory=np.int64(3)), stopping=stopping).converged.all()
    assert solve(halved, torch.zeros(2, 3), Picard(damping=np.float32(0.5)), max_steps=np.int64(99)).converged.all()
    for bad in (True, 0, 2.5, "3", np.int64(0)):
        with pytest.raises(ValueError, match="max_steps must be a positive integer"):
            solve(halved, torch.zeros(2, 3), max_steps=bad)


def test_stopping_is_hashable_with_any_tolerances():
    assert hash(Stopping(rtol={"a": 1e-3, "b": [1e-4]})) == hash(Stopping(rtol={"a": 1e-3, "b": [1e-4]}))
    assert len({Stopping(), Stopping(rtol=1e-4), Stopping(rtol=1e-5), Steps(3), Steps(3)}) == 3
    assert repr(Stopping(rtol=1e-3)) == "Stopping(rtol=0.001, max_steps=50)"


SOLVERS = [
    Picard(),
    Anderson(),
    Anderson(memory=10),
    Broyden(),
    Broyden(memory=5),
    Squarem(),
    Auto(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", ["linear 0.5", "rotation", "planes", "cos", "mixed", "expansive", "contractive 2x2"])
def test_units_of_the_state_change_nothing(solver, name):
    """With a relative tolerance, or none given, statuses and numbers of steps do not depend on the unit."""
    problem = BANK[name](torch.float64)
    for options in ({}, {"rtol": 1e-7}):
        whole = solve(problem.f, problem.z0, solver, max_steps=150, on_failure="ignore", **options)
        for power in (-27, 27):  # powers of two, so that rounding is the same as well
            unit = 2.0**power
            scaled = solve(
                lambda z, unit=unit: problem.f(z / unit) * unit,
                problem.z0 * unit,
                solver,
                max_steps=150,
                on_failure="ignore",
                **options,
            )
            assert torch.equal(scaled.status, whole.status)
            assert torch.equal(scaled.num_steps, whole.num_steps)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.floats(0.05, 0.95), st.floats(-8, 8), st.floats(-8, 8), st.floats(-10, -2))
def test_a_contraction_from_anywhere_converges_to_its_solution(rate, start, size, digits):
    """From starts that are up to 1e8 times smaller or larger than the solution, a tenth of it away at most."""
    solution, rtol = 10**size, 10**digits
    z0 = torch.tensor([[10 ** (size + start)]], **DOUBLE)
    found = solve(
        lambda z: rate * z + (1 - rate) * solution, z0, Picard(), rtol=rtol, max_steps=2000, on_failure="raise"
    )
    assert abs(float(found.value) - solution) <= 0.1 * max(solution, 1e-3 * rtol * float(z0))


def test_records_of_every_implicit_layer():
    model = nn.Sequential(FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x))
    block = InvertibleResidual(nn.Linear(3, 3))
    with torch.no_grad():
        block.g.weight.mul_(0.3)
    model.add_module("block", block)
    with record_solutions(model) as record:
        y = model(torch.ones(2, 3))
        block.inverse(y)
    assert [len(found) for found in record.values()] == [1, 1]
    assert record["block"][0].history is not None


def test_statuses_and_repr_are_short_and_say_what_happened():
    rate = torch.tensor([[0.5], [3.0], [-1.0]])
    solution = solve(lambda z: rate * z + 1, torch.zeros(3, 1), "picard", max_steps=300, on_failure="ignore")
    assert solution.statuses() == ["CONVERGED", "DIVERGED", "STAGNATED"]
    assert repr(solution).startswith("Solution(1 CONVERGED, 1 DIVERGED, 1 STAGNATED, residual <= ")
    assert len(repr(solve(torch.cos, torch.ones(500, 3)))) < 80
    assert solve(torch.cos, torch.ones(3), batch_dims=0).statuses() == "CONVERGED"
    assert solve(torch.cos, torch.ones(2, 1, 3), batch_dims=2).statuses() == [["CONVERGED"]] * 2
    assert repr(solve(torch.cos, torch.ones(0, 3))) == "Solution(no samples, num_evals=1)"


@pytest.mark.parametrize("thing", [solve, Iteration, fixed_point, FixedPointLayer, Stopping, Steps, implicit.iterates])
def test_type_hints_can_be_read(thing):
    hints = typing.get_type_hints(thing.__init__ if isinstance(thing, type) else thing)
    assert hints
    for owner in (solvers, implicit):
        assert all(hasattr(owner, name) for name in owner.__all__)
