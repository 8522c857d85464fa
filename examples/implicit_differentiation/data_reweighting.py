"""Find mislabeled training data: learn a weight for each example by the gradient of a validation loss.

python examples/implicit_differentiation/data_reweighting.py
    Half of the handwritten threes and eights of scikit-learn's digits train a logistic regression, and a quarter of
    their labels are wrong. Gradient steps on the weights of the examples, through the fit of the regression, reduce the
    loss on a small clean set. Prints how well the weights tell right labels from wrong ones, and the gradient of one
    step beside a finite difference.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from implicit import differentiable, stationary


def objective(w, logits, x, y):
    """Weighted logistic loss with a small penalty, which makes the minimizer unique."""
    losses = F.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
    return (torch.sigmoid(logits) * losses).mean() + 0.005 * w.square().sum()


@differentiable(optimality=stationary(objective), linear_solver="cg")
def fit(logits, x, y):
    w, weights = x.new_zeros(x.shape[1]), torch.sigmoid(logits) / len(y)
    for _ in range(12):  # Newton's method; any other code would do
        p = torch.sigmoid(x @ w)
        slope = x.T @ (weights * (p - y)) + 0.01 * w
        curvature = (x.T * (weights * p * (1 - p))) @ x + 0.01 * torch.eye(len(w), dtype=w.dtype)
        w = w - torch.linalg.solve(curvature, slope)
    return w


def main():
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    chosen = torch.from_numpy(((digits == 3) | (digits == 8)).nonzero()[0])
    x = F.pad(torch.from_numpy(images)[chosen] / 16, (0, 1), value=1.0)  # (N, 65), a constant last
    y = torch.from_numpy(digits)[chosen].eq(8).double()  # (N,)
    x, y, x_clean, y_clean = x[:180], y[:180], x[180:220], y[180:220]
    is_wrong = torch.rand(len(y)) < 0.25
    y = torch.where(is_wrong, 1 - y, y)

    def clean_loss(logits):
        return F.binary_cross_entropy_with_logits(x_clean @ fit(logits, x, y), y_clean)

    logits = torch.zeros(len(y), dtype=torch.float64, requires_grad=True)
    direction = torch.randn(len(y), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(clean_loss(logits), logits)
    with torch.no_grad():
        difference = (clean_loss(logits + 1e-4 * direction) - clean_loss(logits - 1e-4 * direction)) / 2e-4
    print(f"relative difference from a finite difference: {abs(gradient @ direction / difference - 1):.1e}")

    optimizer = torch.optim.Adam([logits], lr=0.3)
    first = clean_loss(logits).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = clean_loss(logits)
        loss.backward()
        optimizer.step()
    # The probability that a right label has a larger weight than a wrong one.
    ranked = (logits[~is_wrong, None] > logits[None, is_wrong]).double().mean()
    print(f"clean loss {first:.3f} -> {loss.item():.3f}")
    print(f"area under the curve, right labels against wrong ones: {ranked:.3f}")


if __name__ == "__main__":
    main()
