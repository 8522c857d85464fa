"""Many small systems of equations, of which some need more than full Newton steps."""

import torch


def kepler(anomaly, eccentricity, mean):
    return anomaly - eccentricity * anomaly.sin() - mean


def orbits(number, seed=0):
    """Starts, eccentricities and mean anomalies; some starts are such that a full step is too long."""
    mean, eccentricity, start = torch.rand(3, number, generator=torch.Generator().manual_seed(seed))
    return 6.3 * start, 0.99 * eccentricity, 6.3 * mean


def system(z, a, x, kind, unit, of_f):
    """A system of each kind, for states in ``unit``, whose value has the unit ``of_f``."""
    z = z / unit
    linear = (a @ (z - x).unsqueeze(-1)).squeeze(-1)
    rows = torch.where(kind == 0, linear + (z - x) ** 3, linear + 0.1 * ((z - x) * (z + x)).sin())
    rows = torch.where(kind == 1, (z - x) ** 2, rows)
    rows = torch.where(kind == 2, z**2 + 1, rows)
    return of_f * rows


def systems(seed, size, number=20):
    """Starts in the unit 1 and ``a, x, kind``: without a root, with singular slopes, and starts that are roots."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(number, size, size, generator=generator) + 2 * torch.eye(size)
    x = torch.randn(number, size, generator=generator)
    kind = torch.randint(0, 5, (number, 1), generator=generator)
    return torch.where(kind == 4, x, torch.randn(number, size, generator=generator)), (a, x, kind)
