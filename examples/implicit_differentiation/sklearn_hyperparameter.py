"""Tune the penalty of a scikit-learn model by the gradient of its validation loss.

python examples/implicit_differentiation/sklearn_hyperparameter.py
    scikit-learn fits a logistic regression to its breast cancer data. The optimality condition of its objective gives
    the derivative of the validation loss with respect to the logarithm of C, which is compared with a finite
    difference and then followed to a better C.
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from implicit import differentiable, stationary


def objective(w, log_c, x, y):
    """What scikit-learn minimizes, without an intercept."""
    return 0.5 * w.square().sum() + log_c.exp() * F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum")


@differentiable(optimality=stationary(objective))
def fit(log_c, x, y):
    model = LogisticRegression(
        C=log_c.exp().item(), fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cg"
    )
    return torch.from_numpy(model.fit(x.numpy(), y.numpy()).coef_[0])


def main():
    x, y = (torch.from_numpy(array).double() for array in load_breast_cancer(return_X_y=True))
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    x, x_test, y, y_test = x[:300], x[300:], y[:300], y[300:]

    def validation_loss(log_c):
        return F.binary_cross_entropy_with_logits(x_test @ fit(log_c, x, y), y_test)

    log_c = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(validation_loss(log_c), log_c)
    with torch.no_grad():
        difference = (validation_loss(log_c + 1e-3) - validation_loss(log_c - 1e-3)) / 2e-3
    print(f"relative difference from a finite difference: {abs(found / difference - 1):.1e}")

    optimizer = torch.optim.LBFGS([log_c], max_iter=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = validation_loss(log_c)
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    last = validation_loss(log_c).item()
    print(f"C {torch.e:.2f} -> {log_c.exp().item():.4f}, validation loss {first:.4f} -> {last:.4f}")


if __name__ == "__main__":
    main()
