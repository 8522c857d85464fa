"""What a layer returns does not depend on grad mode."""

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, Phantom, spectral_norm
from solvers import Stopping

MODES = ["unrolled", "checkpointed", "implicit", "neumann", "phantom", "jfb", "shine", "auto", Phantom(damping=0.5)]
all_modes = pytest.mark.parametrize("backward", MODES, ids=str)
STOPS = {
    "4 steps": {"rtol": None, "atol": None, "max_steps": 4},
    "40 steps": {"rtol": None, "atol": None, "max_steps": 40},
    "tolerance": {"rtol": 1e-6},
    "loose": {"stopping": Stopping(rtol=1e-1, atol=0.0)},
    "failing": {"rtol": 1e-12, "max_steps": 3, "on_failure": "ignore"},
}


class Cell(nn.Module):
    def __init__(self, normalized):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        if normalized:
            spectral_norm(self.linear, coeff=0.8)

    def forward(self, z, x):
        return {"a": torch.tanh(self.linear(z["a"])) + x, "b": 0.5 * z["b"].cos() + z["a"].mean(dim=1)}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
@all_modes
def test_value_and_status_are_equal_with_and_without_grad(backward, normalized, solver, stop):
    if backward == "shine" and solver != "broyden":
        return
    layer = FixedPointLayer(
        Cell(normalized),
        solver=solver,
        backward=backward,
        init=lambda x: {"a": torch.zeros_like(x), "b": x[:, 0]},
        **STOPS[stop],
    ).eval()
    x = torch.randn(3, 5)
    found = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            found.append(layer(x, return_solution=True))
    for z, solution in found[1:]:
        assert torch.equal(z["a"], found[0][0]["a"])
        assert torch.equal(z["b"], found[0][0]["b"])
        assert torch.equal(solution.status, found[0][1].status)
        assert torch.equal(solution.num_steps, found[0][1].num_steps)
        assert (solution.residual is None) == (found[0][1].residual is None)
        if solution.residual is not None:
            assert torch.equal(solution.residual, found[0][1].residual)
    assert found[0][0]["a"].requires_grad


@pytest.mark.parametrize("backward", ["phantom", "jfb"])
def test_the_steps_of_the_phantom_modes_are_taken_without_grad(backward):
    layer = FixedPointLayer(lambda z, x: 0.5 * z + x, solver="picard", backward=backward, **STOPS["4 steps"])
    x = torch.ones(1, 1)
    steps = 4 + (5 if backward == "phantom" else 1)
    with torch.no_grad():
        assert layer(x).item() == pytest.approx(2 * (1 - 0.5**steps), rel=1e-6)
    assert layer(x).item() == pytest.approx(2 * (1 - 0.5**steps), rel=1e-6)


@all_modes
def test_a_model_in_training_mode_and_in_evaluation_mode(backward):
    torch.manual_seed(0)
    layer = FixedPointLayer(
        Cell(False), solver="broyden", backward=backward, init=lambda x: {"a": torch.zeros_like(x), "b": x[:, 0]}
    )
    x = torch.randn(3, 5)
    trained = layer.train()(x)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert torch.equal(trained["a"], evaluated["a"])
