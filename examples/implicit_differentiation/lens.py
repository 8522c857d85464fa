"""Trace rays to an aspheric lens surface, and optimize its shape through the intersections.

python examples/implicit_differentiation/lens.py
    The distance t at which a ray meets the surface z = sag(x, y) is the root of one equation for each ray. Newton's
    method solves ten thousand of them at once. The derivative of a hit point with respect to the curvature and the
    conic constant of the surface follows from the implicit function theorem and is compared with finite differences.
    Then gradient descent finds the conic constant that focuses parallel rays: -n^2 for a glass of refractive index n,
    as Descartes knew.
"""

import torch

from implicit import root

INDEX = 1.5


def sag(x, y, curvature, conic):
    """Height of a conic surface at distance r from the axis, r^2 = x^2 + y^2."""
    r2 = x**2 + y**2
    return curvature * r2 / (1 + torch.sqrt(1 - (1 + conic) * curvature**2 * r2))


def gap(t, origin, direction, curvature, conic):
    """How far a point at distance t (B, 1) on a ray is behind the surface: (B, 1)."""
    x, y, z = (origin + t * direction).unbind(dim=-1)
    return (z - sag(x, y, curvature, conic)).unsqueeze(-1)


def hit(origin, direction, curvature, conic):
    t = root(gap, -origin[:, 2:], origin, direction, curvature, conic, solver="newton", rtol=1e-13)
    return origin + t * direction


def refract(direction, normal, ratio):
    """Snell's law for unit vectors (B, 3); ratio is that of the refractive indices."""
    cosine = -(direction * normal).sum(dim=-1, keepdim=True)
    return ratio * direction + (ratio * cosine - torch.sqrt(1 - ratio**2 * (1 - cosine**2))) * normal


def spot_size(origin, direction, curvature, conic):
    """Root mean square distance from the axis at the paraxial focus, of rays that leave glass at the surface."""
    point = hit(origin, direction, curvature, conic)
    x, y, _ = point.unbind(dim=-1)
    slope_x, slope_y = torch.autograd.grad(sag(x, y, curvature, conic).sum(), (x, y), create_graph=True)
    normal = torch.nn.functional.normalize(torch.stack([slope_x, slope_y, -torch.ones_like(x)], dim=-1), dim=-1)
    refracted = refract(direction, normal, INDEX)
    focus = 1 / ((1 - INDEX) * curvature)
    t = (focus - point[:, 2:]) / refracted[:, 2:]
    return (point + t * refracted)[:, :2].square().sum(dim=-1).mean().sqrt()


def main():
    torch.manual_seed(0)
    radius, angle = 0.8 * torch.rand(2, 10_000, dtype=torch.float64)
    angle = angle * 2.5 * torch.pi
    origin = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.full_like(radius, -5.0)], dim=-1)
    direction = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand_as(origin)
    curvature = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    conic = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    tilted = torch.nn.functional.normalize(direction + 0.1 * torch.randn_like(origin), dim=-1)

    def mean_height(curvature, conic):
        return hit(origin, tilted, curvature, conic)[:, 2].mean()

    found = torch.stack(torch.autograd.grad(mean_height(curvature, conic), (curvature, conic)))
    with torch.no_grad():
        step = 1e-4
        differences = torch.stack(
            [
                mean_height(curvature + step, conic) - mean_height(curvature - step, conic),
                mean_height(curvature, conic + step) - mean_height(curvature, conic - step),
            ]
        ) / (2 * step)
    print(f"relative difference from finite differences: {(found - differences).norm() / differences.norm():.1e}")

    optimizer = torch.optim.LBFGS([conic], max_iter=50, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = spot_size(origin, direction, curvature, conic).square()
        loss.backward()
        return loss

    before = spot_size(origin, direction, curvature, conic).item()
    optimizer.step(closure)
    after = spot_size(origin, direction, curvature, conic).item()
    print(f"spot size {before:.2e} -> {after:.1e}, conic constant {conic.item():.5f}, Descartes {-(INDEX**2):.5f}")


if __name__ == "__main__":
    main()
