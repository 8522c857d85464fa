"""Differentiate ridge regression with respect to its penalty, and compare with the closed form.

python examples/implicit_differentiation/ridge.py
    Fits a ridge regression by the normal equations under `no_grad`, as a library would, and prints the derivative of
    the validation error with respect to the penalty: by the implicit function theorem, and by differentiating the
    closed form. They agree to rounding.
"""

import torch

from implicit import differentiable, stationary


def objective(w, penalty, x, y):
    return 0.5 * (x @ w - y).square().sum() + 0.5 * penalty * w.square().sum()


def closed_form(penalty, x, y):
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


@differentiable(optimality=stationary(objective))
def fit(penalty, x, y):
    return closed_form(penalty, x, y)  # any code; its own graph is ignored


def main():
    torch.manual_seed(0)
    x, x_test = torch.randn(2, 60, 8, dtype=torch.float64)
    truth = torch.randn(8, dtype=torch.float64)
    y, y_test = (rows @ truth + torch.randn(60, dtype=torch.float64) for rows in (x, x_test))
    penalty = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def validation_error(solution):
        return (x_test @ solution - y_test).square().mean()

    (found,) = torch.autograd.grad(validation_error(fit(penalty, x, y)), penalty)
    (exact,) = torch.autograd.grad(validation_error(closed_form(penalty, x, y)), penalty)
    second = torch.func.hessian(lambda p: validation_error(fit(p, x, y)))(penalty.detach())
    exact_second = torch.func.hessian(lambda p: validation_error(closed_form(p, x, y)))(penalty.detach())
    print(f"derivative of the validation error  {found:.10f}")
    print(f"from the closed form                {exact:.10f}")
    print(f"relative difference: {abs(found / exact - 1):.1e}")
    print(f"relative difference, second derivative: {abs(second / exact_second - 1):.1e}")


if __name__ == "__main__":
    main()
