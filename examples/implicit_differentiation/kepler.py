"""Kepler's equation for many orbits at once, with derivatives.

python examples/implicit_differentiation/kepler.py
    Solves E - e sin(E) = M for the eccentric anomaly E of 100,000 pairs (M, e) by Newton's method, and compares the
    derivatives with their closed form, dE/dM = 1 / (1 - e cos E) and dE/de = sin(E) / (1 - e cos E).
"""

import math

import torch

from implicit import root


def kepler(anomaly, mean_anomaly, eccentricity):
    return anomaly - eccentricity * torch.sin(anomaly) - mean_anomaly


def main():
    torch.manual_seed(0)
    mean_anomaly = (2 * math.pi * torch.rand(100_000, 1, dtype=torch.float64)).requires_grad_()
    eccentricity = (0.95 * torch.rand(100_000, 1, dtype=torch.float64)).requires_grad_()

    # E = M + e sin(M) would diverge for some orbits near e = 1; pi converges for all of them.
    start = torch.full_like(mean_anomaly, math.pi)
    anomaly, solution = root(kepler, start, mean_anomaly, eccentricity, rtol=1e-12, return_solution=True)
    found = torch.autograd.grad(anomaly.sum(), (mean_anomaly, eccentricity))
    with torch.no_grad():
        slope = 1 - eccentricity * torch.cos(anomaly)
        exact = (1 / slope, torch.sin(anomaly) / slope)
    print(f"all converged: {bool(solution.converged.all())}, in at most {int(solution.num_steps.max())} steps")
    for name, left, right in zip(("dE/dM", "dE/de"), found, exact, strict=True):
        print(f"{name}, relative difference: {(left - right).norm() / right.norm():.1e}")


if __name__ == "__main__":
    main()
