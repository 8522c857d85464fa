"""A solver, linear solver or backward mode of one's own with a mistake is named by the error."""

import dataclasses
from typing import Any

import pytest
import torch

from implicit import Backward, Implicit, fixed_point
from solvers import Solver, State, solve
from solvers.linear import LinearSolver

WRONG_STATES = {
    "nothing": lambda z, fz: None,
    "a pair": lambda z, fz: (z, fz),
    "fewer unknowns": lambda z, fz: State(z[:, :2], fz[:, :2]),
    "fewer samples": lambda z, fz: State(z[:2], fz[:2]),
    "one number a sample": lambda z, fz: State(z, fz.sum(dim=1, keepdim=True)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Solver):
    at_start: bool
    wrong: Any

    def init(self, f, z0):
        return self.wrong(z0, f(z0)) if self.at_start else State(z0, f(z0))

    def step(self, f, state):
        return self.wrong(state.fz, f(state.fz))


@pytest.mark.parametrize("tested", [True, False], ids=["tolerance", "steps"])
@pytest.mark.parametrize("at_start", [True, False], ids=["init", "step"])
@pytest.mark.parametrize("wrong", WRONG_STATES.values(), ids=WRONG_STATES)
def test_solver(wrong, at_start, tested):
    options = {} if tested else {"rtol": None, "atol": None}
    with pytest.raises((TypeError, ValueError), match=rf"Mine\(.*\.{'init' if at_start else 'step'} must return"):
        solve(lambda z: 0.9 * z + 1, torch.zeros(3, 4), Mine(at_start=at_start, wrong=wrong), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyLinearSolver(LinearSolver):
    returned: Any

    def run(self, matvec, b, tolerance=None):
        return self.returned


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyMode(Backward):
    returned: Any

    def solve(self, f, z0, args, options):
        return self.returned


@pytest.mark.parametrize("returned", [None, torch.zeros(3, 4)], ids=["nothing", "a tensor"])
def test_modes(returned):
    x = torch.ones(3, 4, requires_grad=True)
    backward = Implicit(linear_solver=MyLinearSolver(returned=returned))
    z = fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(3, 4), x, backward=backward)
    with pytest.raises(TypeError, match=r"(?s)MyLinearSolver\(.*must return a LinearResult"):
        z.sum().backward()
    with pytest.raises(TypeError, match=r"(?s)MyMode\(.*must return a solvers.Solution, got a (NoneType|Tensor)"):
        fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(3, 4), x, backward=MyMode(returned=returned))
