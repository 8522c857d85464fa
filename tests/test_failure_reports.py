"""What a failed solve says: which layer, how many samples, how far, where in the user's program, and why perhaps."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, InvertibleResidual, fixed_point
from solvers import ConvergenceError, ConvergenceWarning, solve


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = FixedPointLayer(lambda z, x: 2 * z + x, solver="picard")
        self.second = FixedPointLayer(lambda z, x: 0.9 * z + x, solver="picard", max_steps=3)

    def forward(self, x):
        x = self.first(x).clamp(-1, 1)
        return self.second(x)


def recorded(run, action="always"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter(action, ConvergenceWarning)
        run()
    return [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]


def test_each_failing_layer_has_a_warning_of_its_own():
    model = nn.Sequential(nn.Identity(), Two())
    x = torch.ones(3, 2)
    first, second = recorded(lambda: model(x))
    assert "of the FixedPointLayer '1.first' did not converge to rtol=0.0001 for 3 of 3 samples" in str(first.message)
    assert "3 of 3 samples DIVERGED" in str(first.message)
    assert "of the FixedPointLayer '1.second'" in str(second.message)
    assert "worst residual 2.9" in str(second.message)
    lines, start = inspect.getsourcelines(Two.forward)
    assert [(warning.filename, warning.lineno - start) for warning in (first, second)] == [(__file__, 1), (__file__, 2)]
    assert "self.second(x)" in lines[2]


def test_a_warning_is_shown_once_for_each_layer_whatever_its_numbers():
    model = nn.Sequential(Two())

    def train():
        for batch in (1, 2, 5):
            model(torch.ones(batch, 2))

    assert len(recorded(train, "default")) == 2
    assert len(recorded(train, "always")) == 6


def test_a_function_points_at_its_caller():
    def run():
        return solve(lambda z: 2 * z + 1, torch.ones(2, 1), "picard")

    (warning,) = recorded(run)
    assert (warning.filename, warning.lineno) == (__file__, inspect.getsourcelines(run)[1] + 1)


def test_the_linear_solve_of_a_layer_is_named_too():
    model = nn.Sequential(FixedPointLayer(lambda z, x: torch.where(z < 3, z, z) * 1.0 + 0 * x, rtol=1e-3))
    x = torch.ones(2, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = model(x)
    (warning,) = recorded(lambda: z.sum().backward())
    assert "The linear solve of the derivative of the FixedPointLayer '0' did not converge" in str(warning.message)
    assert warning.filename == __file__


def test_a_coupled_problem_taken_for_a_batch_is_told_so():
    """A vector of d parameters under the default batch_dims=1 is d scalar problems that depend on each other."""
    weight = torch.randn(6, 6)
    weight = 1.6 * weight / torch.linalg.matrix_norm(weight, 2)

    def f(z, x):
        return torch.tanh(weight @ z) + x

    x = torch.randn(6)
    with pytest.warns(ConvergenceWarning, match=r"mixes samples.*batch_dims=0; now its leading dimensions \(6,\)"):
        fixed_point(f, torch.zeros(6), x, max_steps=4, rtol=1e-12)
    with pytest.raises(ConvergenceError, match="batch_dims=0"):
        FixedPointLayer(f, max_steps=4, rtol=1e-12, on_failure="raise")(x)


@pytest.mark.parametrize(
    "f",
    [lambda z: 2 * z + 1, lambda z: 2 * z + torch.rand_like(z), lambda z: 2 * z + z.mean(1, keepdim=True)],
    ids=["independent", "random", "mixing within samples"],
)
def test_independent_samples_are_not_accused(f):
    with pytest.warns(ConvergenceWarning) as caught:
        solve(f, torch.ones(4, 2), "picard")
    assert "mixes samples" not in str(caught[0].message)


def test_the_check_of_a_failed_map_leaves_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.warns(ConvergenceWarning):
        solve(lambda z: 2 * z + 1, torch.ones(4, 2), "picard")
    assert torch.equal(torch.rand(3), expected)


def test_an_invertible_block_names_itself():
    block = InvertibleResidual(lambda x: 3 * torch.sin(2 * x) + x, solver="picard")
    model = nn.ModuleDict({"flow": block})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, y):
            return self.parts["flow"].inverse(y)

    (warning,) = recorded(lambda: Model()(torch.ones(2, 3)))
    assert "the InvertibleResidual 'parts.flow' did not converge" in str(warning.message)
