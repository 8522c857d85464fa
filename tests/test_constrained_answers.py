"""Derivatives of minimizers under constraints that other libraries differentiate, found by solvers of any kind."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.isotonic import IsotonicRegression

from implicit import differentiable, projected_gradient
from implicit.optima import project_box, project_simplex

pytestmark = pytest.mark.usefixtures("double")


def svm_dual(beta, x, onehot, penalty):
    """The dual of the multiclass linear support vector machine, for coefficients beta (N, K) in simplices."""
    weights = x.mT @ (onehot - beta)  # (D, K), times the penalty
    return 0.5 * weights.square().sum() / penalty - ((1 - onehot) * beta).sum()


def accelerated(objective, project, beta, step, *args):
    """Projected gradient descent with momentum."""
    gradient = torch.func.grad(objective)
    ahead = beta
    for number in range(20_000):
        before, beta = beta, project(ahead - step * gradient(ahead, *args))
        if (beta - before).abs().max() <= 1e-15:
            break
        ahead = beta + number / (number + 3) * (beta - before)
    return beta


@pytest.mark.long
def test_multiclass_support_vector_machine():
    """The primal weights, to the penalty and to the data, by differences of other fits."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 9, generator=generator)
    onehot = torch.eye(3)[torch.arange(7) % 3]
    probe = torch.randn(9, 3, generator=generator)

    @differentiable(fixed_point=projected_gradient(svm_dual, project_simplex, step=0.01))
    def dual(x, onehot, penalty):
        step = float(penalty / torch.linalg.matrix_norm(x, 2) ** 2)
        return accelerated(svm_dual, project_simplex, torch.full((7, 3), 1 / 3), step, x, onehot, penalty)

    def weighted(x, penalty):
        return (x.mT @ (onehot - dual(x, onehot, penalty)) / penalty * probe).sum()

    penalty = torch.tensor(10.0)
    beta = dual(x, onehot, penalty)
    assert (beta == 0).any()
    assert (beta > 0).sum() > len(beta)
    assert torch.autograd.gradcheck(weighted, (x.requires_grad_(), penalty.requires_grad_()), eps=1e-5, atol=1e-6)


def test_nonnegative_least_squares():
    """Of scipy, as in a step of nonnegative matrix factorization."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(8, 4, generator=generator)
    b = a @ torch.tensor([1.0, -1.0, 0.5, 0.2]) + 0.1 * torch.randn(8, generator=generator)

    @differentiable(
        fixed_point=projected_gradient(
            lambda z, a, b: 0.5 * (a @ z - b).square().sum(), lambda z: project_box(z, low=0.0), step=0.1
        )
    )
    def fit(a, b):
        return torch.as_tensor(nnls(a.numpy(), b.numpy())[0])

    z = fit(a, b)
    assert (z == 0).any()
    assert (z > 0).any()
    assert torch.autograd.gradcheck(fit, (a.requires_grad_(), b.requires_grad_()), atol=1e-6)
    assert torch.autograd.gradcheck(fit, (a, b), atol=1e-6, check_forward_ad=True, check_backward_ad=False)


def test_isotonic_regression():
    """Of scikit-learn: the derivative is the mean over each block of equal values."""
    x = torch.randn(12, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, 12)

    def dual(multipliers, x):
        """Half the squared norm of the fit, whose increments have multipliers >= 0."""
        pull = torch.nn.functional.pad(multipliers, (1, 1)).diff()
        return 0.5 * (x - pull).square().sum()

    @differentiable(fixed_point=projected_gradient(dual, lambda m: project_box(m, low=0.0), step=0.2))
    def multipliers(x):
        fit = IsotonicRegression().fit_transform(np.arange(12), x.numpy())
        return (x - torch.as_tensor(fit)).cumsum(0)[:-1].clamp_min(0.0)

    def fit(x):
        return x - torch.nn.functional.pad(multipliers(x), (1, 1)).diff()

    value = fit(x)
    assert torch.allclose(value, torch.as_tensor(IsotonicRegression().fit_transform(np.arange(12), x.numpy())))
    same = (value.unsqueeze(0) - value.unsqueeze(1)).abs() <= 1e-12
    assert len(set(same.sum(dim=1).tolist())) > 1, "blocks of several sizes"
    found = torch.autograd.functional.jacobian(fit, x)
    assert torch.allclose(found, same.double() / same.sum(dim=1, keepdim=True), atol=1e-9)
