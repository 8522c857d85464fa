"""What a backward pass says of its linear solve: on the solution, as a warning, as an error; never nothing."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

from implicit import FixedPointLayer, Implicit, fixed_point
from solvers import ConvergenceError, ConvergenceWarning, Status
from solvers.linear import GMRES, BiCGStab, NeumannSeries

pytestmark = pytest.mark.usefixtures("double")

FAILED = "The linear solve of the derivative did not converge"


def linear_map(z, x, jacobian):
    """f(z) = J z + x, whose fixed point and gradients are those of (I - J)^-1."""
    return z @ jacobian.T + x


def at(jacobian, x, solution, **options):
    """The layer at a fixed point that is known, so that the forward solve has nothing to do."""
    return fixed_point(
        linear_map, solution, x, jacobian, solver="picard", max_steps=1, return_solution=True, rtol=1e-6, **options
    )


def singular():
    """A map with the eigenvalue 1 in its second direction, which has no unique fixed point; one is z = 0."""
    return torch.diag(torch.tensor([0.5, 1.0])), torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2)


@pytest.mark.parametrize("linear_solver", [GMRES(), BiCGStab()], ids=["gmres", "bicgstab"])
def test_report_after_every_backward_pass(linear_solver):
    linear = nn.Linear(4, 4)
    layer = FixedPointLayer(lambda z, x: torch.tanh(linear(z)) / 2 + x, backward=Implicit(linear_solver=linear_solver))
    z, solution = layer(torch.randn(3, 4, requires_grad=True), return_solution=True)
    assert solution.adjoint is None
    z[0].sum().backward(retain_graph=True)
    first = solution.adjoint
    assert first.num_steps[0] > 0
    assert first.num_steps[1:].tolist() == [0, 0]  # a zero gradient needs no solve
    z.square().sum().backward()
    assert solution.adjoint is not first
    assert solution.adjoint.status.tolist() == [Status.CONVERGED] * 3
    assert solution.adjoint.residual.max() < 1e-5


def test_a_truncated_series_is_no_failure():
    jacobian, x = torch.eye(2) * 0.9, torch.ones(1, 2, requires_grad=True)
    series = Implicit(linear_solver=NeumannSeries(terms=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, solution = at(jacobian, x, torch.full((1, 2), 10.0), backward=series, on_failure="raise")
        z.sum().backward()
    assert torch.allclose(x.grad, torch.full((1, 2), 1 + 0.9 + 0.81))
    assert solution.adjoint.status.tolist() == [Status.UNTESTED]
    assert solution.adjoint.residual.item() == pytest.approx(0.81)


@pytest.mark.parametrize("linear_solver", [GMRES(), BiCGStab()], ids=["gmres", "bicgstab"])
def test_singular_systems(linear_solver):
    """I - J is singular, and the gradient that comes in is not in its range: there is no answer."""
    jacobian, x, start = singular()
    backward = Implicit(linear_solver=linear_solver)
    z, solution = at(jacobian, x, start, backward=backward)
    with pytest.warns(ConvergenceWarning, match=FAILED):
        z.sum().backward()
    assert solution.adjoint.failed.all()
    assert solution.adjoint.residual.item() > 0.1
    z, _ = at(jacobian, x, start, backward=backward, on_failure="raise")
    with pytest.raises(ConvergenceError, match=FAILED) as caught:
        z.sum().backward()
    assert caught.value.solution.failed.all()
    # In the range there is one: the first direction alone.
    x.grad = None
    z, solution = at(jacobian, x, start, backward=backward, on_failure="raise")
    z[0, 0].backward()
    assert torch.allclose(x.grad, torch.tensor([[2.0, 0.0]]))
    assert solution.adjoint.converged.all()


def nan_derivative(z, x):
    """Finite itself, with a derivative to z that is nan at 0: that of sqrt(z^2)."""
    return x + 0.1 * (z - x).square().sqrt()


@pytest.mark.parametrize("linear_solver", [GMRES(), BiCGStab()], ids=["gmres", "bicgstab"])
def test_a_derivative_that_is_nan(linear_solver):
    x = torch.zeros(2, 3, requires_grad=True)
    options = {"backward": Implicit(linear_solver=linear_solver), "return_solution": True}
    z, solution = fixed_point(nan_derivative, torch.zeros(2, 3), x, **options)
    assert solution.converged.all()
    with pytest.warns(ConvergenceWarning, match=f"{FAILED}[\\s\\S]*NONFINITE"):
        z.sum().backward()
    assert x.grad.isnan().all()
    assert solution.adjoint.status.tolist() == [Status.NONFINITE] * 2
    z, _ = fixed_point(nan_derivative, torch.zeros(2, 3), x, on_failure="raise", **options)
    with pytest.raises(ConvergenceError, match=FAILED):
        z.sum().backward()


def test_a_gradient_that_comes_in_as_nan():
    x = torch.randn(2, 3, requires_grad=True)
    z, solution = fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, torch.zeros(2, 3), x, return_solution=True)
    with pytest.warns(ConvergenceWarning, match=FAILED):
        (z[0].sum() * torch.nan + z[1].sum()).backward()
    assert x.grad[0].isnan().all()
    assert x.grad[1].isfinite().all()
    assert [Status(int(s)).name for s in solution.adjoint.status] == ["NONFINITE", "CONVERGED"]


few_steps = {"backward": Implicit(linear_solver=GMRES(max_steps=1, rtol=1e-12)), "rtol": 1e-9}


@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
def test_double_backward_and_forward_mode_report_too(on_failure):
    w = torch.randn(6, 6) / 6

    def solved(x):
        return fixed_point(lambda z, x: torch.tanh(z @ w + x), torch.zeros(2, 6), x, on_failure=on_failure, **few_steps)

    x = torch.randn(2, 6, requires_grad=True)

    def expect():
        if on_failure == "warn":
            return pytest.warns(ConvergenceWarning, match=FAILED)
        if on_failure == "raise":
            return pytest.raises(ConvergenceError, match=FAILED)
        return contextlib.nullcontext()

    with expect():
        gradient = torch.autograd.grad(solved(x).sin().sum(), x, create_graph=True)[0]
        assert gradient.any()
    if on_failure != "raise":
        with expect():
            assert torch.autograd.grad(gradient.sum(), x)[0].any()
    with expect():
        assert torch.func.jvp(solved, (x.detach(),), (torch.ones(2, 6),))[1].any()
