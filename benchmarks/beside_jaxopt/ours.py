"""Three hypergradients in this library's way; :mod:`benchmarks.beside_jaxopt.jaxopt_way` has the same in jaxopt's.

python -m benchmarks.beside_jaxopt.ours
"""

from typing import Any

import torch
from torch import Tensor

from implicit import differentiable, fixed_point, proximal_gradient, root, stationary
from implicit.optima import prox_l1


def ridge(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, penalty: Tensor) -> Any:
    def objective(w: Tensor, penalty: Tensor) -> Tensor:
        return 0.5 * (x @ w - y).square().sum() + 0.5 * penalty * w.square().sum()

    @differentiable(optimality=stationary(objective))
    def fit(penalty: Tensor) -> Any:
        return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)

    return torch.func.grad(lambda penalty: (x_test @ fit(penalty) - y_test).square().mean())(penalty)


def lasso(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, strength: Tensor) -> Any:
    def objective(w: Tensor, strength: Tensor) -> Tensor:
        return 0.5 * (x @ w - y).square().mean()

    def error(strength: Tensor) -> Tensor:
        descent = proximal_gradient(objective, lambda w, step, strength: prox_l1(w, step * strength), step=0.3)
        w = fixed_point(descent, torch.zeros(x.shape[1]), strength, batch_dims=0, rtol=1e-12, max_steps=1000)
        return (x_test @ w - y_test).square().mean()

    return torch.func.grad(error)(strength)


def kepler(mean: Tensor, eccentricity: Tensor) -> Any:
    def equation(anomaly: Tensor, mean: Tensor, eccentricity: Tensor) -> Tensor:
        return anomaly - eccentricity * torch.sin(anomaly) - mean

    return torch.func.grad(lambda eccentricity: root(equation, mean, mean, eccentricity).sum())(eccentricity)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    angle = torch.arange(120.0).view(2, 20, 3) ** 2
    (x, x_test), truth = torch.sin(angle), torch.tensor([1.0, -2.0, 0.0])
    y, y_test = x @ truth + 0.3 * torch.cos(angle[0, :, 0]), x_test @ truth
    print("ridge ", f"{ridge(x, y, x_test, y_test, torch.tensor(3.0)):.10f}")
    print("lasso ", f"{lasso(x, y, x_test, y_test, torch.tensor(0.1)):.10f}")
    print("kepler", [f"{entry:.10f}" for entry in kepler(torch.tensor([0.5, 2.0]), torch.tensor([0.3, 0.8]))])


if __name__ == "__main__":
    main()
