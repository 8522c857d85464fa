"""Entropic optimal transport: differentiate the Sinkhorn iteration at its fixed point.

python examples/implicit_differentiation/sinkhorn.py
    Solves for the dual potential of a transport problem with Anderson acceleration, and prints the gradient of the
    transport cost with respect to the positions of the points: implicit, and from a thousand unrolled iterations.
    Implicit differentiation keeps one iteration instead of all.
"""

import torch

from implicit import Implicit, fixed_point


def costs(x, y):
    return (x[:, None] - y[None, :]).square().sum(dim=-1)  # (N, M)


def iterate(g, x, y, epsilon):
    """One Sinkhorn iteration in the log domain on the potential g (M,), for uniform weights."""
    f = -epsilon * torch.logsumexp((g - costs(x, y)) / epsilon, dim=1)  # (N,), up to a constant
    g = -epsilon * torch.logsumexp((f[:, None] - costs(x, y)) / epsilon, dim=0)
    return g - g.mean()  # a constant is free: fix it, so that the fixed point is unique


def transport_cost(g, x, y, epsilon):
    scores = (g - costs(x, y)) / epsilon
    plan = torch.softmax(scores, dim=1) / len(x)  # rows sum to 1 / N
    return (plan * costs(x, y)).sum()


def main():
    torch.manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(30, 2, dtype=torch.float64) + 1
    epsilon = 0.3
    start = torch.zeros(30, dtype=torch.float64)

    # The potential is one coupled problem: batch_dims=0.
    g, solution = fixed_point(
        iterate,
        start,
        x,
        y,
        epsilon,
        solver="anderson",
        backward=Implicit(linear_solver="gmres"),
        batch_dims=0,
        rtol=1e-12,
        max_steps=500,
        return_solution=True,
    )
    (found,) = torch.autograd.grad(transport_cost(g, x, y, epsilon), x)
    unrolled = start
    for _ in range(1000):
        unrolled = iterate(unrolled, x, y, epsilon)
    (exact,) = torch.autograd.grad(transport_cost(unrolled, x, y, epsilon), x)
    print(f"{solution.num_evals} iterations with Anderson acceleration")
    print(f"relative difference of the gradients: {(found - exact).norm() / exact.norm():.1e}")


if __name__ == "__main__":
    main()
