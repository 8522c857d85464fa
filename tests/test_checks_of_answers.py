"""Which answers the check of ``differentiable`` lets pass: those near the root, whatever the size of an equation."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from implicit import differentiable, stationary
from solvers import ConvergenceError


def answer(condition, error, dtype):
    """A function whose answers are those of ``z = m x`` with this error."""

    @differentiable(optimality=condition, on_failure="raise", batch_dims=1)
    def find(x, matrix):
        return (x @ matrix.T) * (1 + error.to(dtype))

    return find


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.settings(max_examples=50)
@hypothesis.example([2, -2], 0)
@hypothesis.given(st.lists(st.integers(-6, 6), min_size=2, max_size=5), st.integers(0, 1000))
def test_an_error_is_found_in_equations_of_any_size(dtype, powers, seed):
    generator = torch.Generator().manual_seed(seed)
    size = len(powers)
    scale = 10.0 ** torch.tensor(powers, dtype=dtype)
    x = 1 + torch.rand(3, size, generator=generator, dtype=dtype)
    matrix = torch.eye(size, dtype=dtype) + 0.3 * torch.rand(size, size, generator=generator, dtype=dtype) / size

    def condition(z, x, matrix):
        return scale * (z - x @ matrix.T)

    right = torch.full((3, size), 3e-5)  # within the tolerance
    answer(condition, right, dtype)(x, matrix)
    wrong = right.clone()
    wrong[1, powers.index(min(powers))] = 0.3
    with pytest.raises(ConvergenceError, match="for 1 of 3 samples"):
        answer(condition, wrong, dtype)(x, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(0, 2), st.integers(0, 1000))
def test_rounding_errors_of_the_condition_are_no_errors_of_the_answer(dtype, power, seed):
    """The least squares of columns that differ in size, whose normal equations lose twice as many digits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 5, generator=generator) * 10 ** torch.linspace(0, power, 5)
    y = 10 * torch.randn(20, generator=generator)

    def objective(w, x, y):
        return (x @ w - y).square().sum()

    @differentiable(optimality=stationary(objective), on_failure="raise")
    def fit(x, y):
        return torch.linalg.lstsq(x.double(), y.double()[:, None]).solution[:, 0].to(dtype)

    fit(x.to(dtype), y.to(dtype))


def test_a_singular_jacobian_refuses_no_answer():
    """Of many answers the nearest one counts."""

    def condition(z, x):
        return (z.sum() - x).expand(3)

    z = differentiable(optimality=condition, on_failure="raise")(lambda x: x * torch.tensor([0.5, 0.25, 0.25]))
    assert z(torch.tensor(3.0)).sum() == 3
