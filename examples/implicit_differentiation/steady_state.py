"""Steady states of a system of differential equations, for many parameters at once, and their sensitivities.

python examples/implicit_differentiation/steady_state.py
    A gene toggle switch (Gardner, Cantor and Collins 2000): two proteins repress each other. Finds the steady state for
    a thousand pairs of synthesis rates by Newton's method, checks one against an integration in time by scipy, and
    compares the sensitivities with finite differences.
"""

import torch
from scipy.integrate import solve_ivp

from implicit import root


def rates(z, synthesis):
    """The time derivatives of both concentrations z (B, 2), for synthesis rates (B, 2)."""
    return synthesis / (1 + z.flip(-1) ** 2) - z


def steady_state(synthesis):
    start = synthesis * torch.tensor([1.0, 0.1], dtype=torch.float64)  # near the state where the first protein wins
    return root(rates, start, synthesis, solver="newton", rtol=1e-12)


def main():
    torch.manual_seed(0)
    synthesis = 4 + torch.rand(1000, 2, dtype=torch.float64)
    synthesis.requires_grad_()
    z = steady_state(synthesis)
    (found,) = torch.autograd.grad(z[:, 0].sum(), synthesis)  # samples are independent: (1000, 2) sensitivities

    first = synthesis[0].detach()

    def right_hand_side(_, z):
        return rates(torch.from_numpy(z), first).numpy()

    path = solve_ivp(right_hand_side, (0, 100), z[0].detach().numpy() + 0.1, rtol=1e-11, atol=1e-12)
    integrated = torch.from_numpy(path.y[:, -1])

    with torch.no_grad():
        sides = []
        for entry in torch.eye(2, dtype=torch.float64) * 1e-4:
            sides.append((steady_state(synthesis + entry) - steady_state(synthesis - entry))[:, 0] / 2e-4)
    differences = torch.stack(sides, dim=1)
    print(f"difference from the end of an integration: {(z[0] - integrated).norm() / integrated.norm():.1e}")
    print(f"relative difference from finite differences: {(found - differences).norm() / differences.norm():.1e}")


if __name__ == "__main__":
    main()
