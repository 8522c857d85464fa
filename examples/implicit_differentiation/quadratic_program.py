"""A quadratic program as a layer: derivatives of the minimizer, and the solution of its KKT system beside them.

python examples/implicit_differentiation/quadratic_program.py
    Minimizes x' P x / 2 + q' x under box constraints with scipy's L-BFGS-B, and prints the Jacobian of the minimizer
    with respect to q, from the fixed point of projected gradient descent and from the KKT conditions of the active set.
"""

import numpy as np
import torch
from scipy.optimize import minimize

from implicit import differentiable, projected_gradient
from implicit.optima import project_box


def objective(x, p, q):
    return 0.5 * x @ p @ x + q @ x


@differentiable(fixed_point=projected_gradient(objective, lambda x: project_box(x, -1.0, 1.0), step=0.1))
def solve_program(p, q):
    p, q = p.numpy(), q.numpy()
    found = minimize(
        lambda x: 0.5 * x @ p @ x + q @ x,
        np.zeros(len(q)),
        jac=lambda x: p @ x + q,
        bounds=[(-1, 1)] * len(q),
        method="L-BFGS-B",
        options={"ftol": 0, "gtol": 1e-12, "maxiter": 1000},
    )
    return torch.from_numpy(found.x)


def main():
    torch.manual_seed(0)
    root = torch.randn(10, 10, dtype=torch.float64)
    p = root @ root.T / 10 + torch.eye(10, dtype=torch.float64)
    q = 1.5 * torch.randn(10, dtype=torch.float64)

    x = solve_program(p, q)
    jacobian = torch.func.jacrev(lambda q: solve_program(p, q))(q)  # (10, 10)
    # By the KKT conditions, bound entries stay where they are, and P_ff dx_f = -dq_f holds for the free ones.
    free = x.abs() < 1
    exact = torch.zeros_like(jacobian)
    exact[free.outer(free)] = -torch.linalg.inv(p[free][:, free]).flatten()
    print(f"{int(free.sum())} of {len(x)} entries are free")
    print(f"relative difference of the Jacobians: {(jacobian - exact).norm() / exact.norm():.1e}")


if __name__ == "__main__":
    main()
