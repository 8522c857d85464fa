"""Fit a density in the plane with invertible residual blocks, and draw samples from it by inverting them.

python examples/invertible_resnet.py
    Trains a flow of residual blocks x + g(x) on two noisy half-moons by maximum likelihood, in less than a minute on
    two cores (pip install 'implicit-layers[train]'). Prints how well the density fits, its integral over the plane, and
    the error of the inverse. Plots the data, the density and samples into runs/invertible_resnet/density.png.

The blocks are invertible because Lip(g) < 1: g is a small network of spectrally normalized layers, and its activation
sin(5 x) / 5 has slopes of at most 1.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import trange

from implicit import InvertibleResidual, PowerSeriesLogDet, lipschitz_bound, spectral_norm

NOISE = 0.08
EXTENT = 1.9  # half the width of the plots


def half_moons(n):
    """Draw samples (n, 2): points on two half circles, with noise."""
    return centers(math.pi * torch.rand(n), torch.rand(n) < 0.5) + NOISE * torch.randn(n, 2)


def centers(angle, upper):
    """Return the points (n, 2) of the half circles at these angles."""
    x = torch.where(upper, angle.cos() - 0.5, 0.5 - angle.cos())
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return torch.stack((x, y), dim=1)


def true_log_density(x):
    """Return the log-density (B,) of the half-moons, which averages normal densities over the half circles."""
    angle = math.pi * (torch.arange(1000) + 0.5) / 500 % math.pi
    squared = torch.cdist(x, centers(angle, torch.arange(1000) < 500)).square()  # (B, 1000)
    return torch.logsumexp(-squared / (2 * NOISE**2), dim=1) - math.log(1000 * 2 * math.pi * NOISE**2)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(5 * x) / 5


def residual_map(width):
    def linear(inputs, outputs):
        return spectral_norm(nn.Linear(inputs, outputs), coeff=0.98, method="exact")

    return nn.Sequential(linear(2, width), Sine(), linear(width, width), Sine(), linear(width, 2))


class Flow(nn.Module):
    """Residual blocks that map the data to a standard normal distribution."""

    def __init__(self, num_blocks, width):
        super().__init__()
        # A few rounding errors of float32, since each inverse amplifies the errors of the inverses before it.
        tolerances = {"rtol": 3e-7, "atol": 1e-7}
        self.blocks = nn.ModuleList(InvertibleResidual(residual_map(width), **tolerances) for _ in range(num_blocks))

    def forward(self, x):
        """Map x (B, 2) to z (B, 2), and return log|det dz/dx| (B,) as well."""
        total = x.new_zeros(len(x))
        for block in self.blocks:
            x, log_det = block(x, return_log_det=True)
            total = total + log_det
        return x, total

    def inverse(self, z):
        for block in reversed(self.blocks):
            z = block.inverse(z)
        return z

    def log_density(self, x):
        z, log_det = self(x)
        return log_det - z.square().sum(dim=1) / 2 - math.log(2 * math.pi)


def train(flow, steps, batch_size=256):
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    progress = trange(steps, desc="training", unit="step", leave=False)
    for step in progress:
        loss = -flow.log_density(half_moons(batch_size)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(nll=f"{loss.item():.3f}")
    flow.eval()


@torch.no_grad()
def report(flow):
    x = half_moons(5000)
    gaussian = torch.distributions.MultivariateNormal(x.mean(dim=0), x.T.cov())
    densities = {"flow": flow.log_density, "fitted Gaussian": gaussian.log_prob, "true density": true_log_density}
    for name, log_density in densities.items():
        print(f"negative log-likelihood, {name:<16}{-log_density(x).mean():>8.3f}")

    grid, cell = plane(400, 4.0)
    print(f"integral of the density over the plane   {flow.log_density(grid).exp().sum() * cell:>8.4f}")
    bound = max(lipschitz_bound(block.g, known={Sine: 1.0}) for block in flow.blocks)
    print(f"largest bound on Lip(g) of a block       {bound:>8.3f}")
    print(f"max |inverse(forward(x)) - x|            {(flow.inverse(flow(x)[0]) - x).abs().max():>8.0e}")

    first, series = flow.blocks[0], PowerSeriesLogDet(terms=20, num_samples=32)
    exact, estimate = first.log_det(x).mean(), first.log_det(x, estimator=series).mean()
    print(f"mean log-determinant of the first block  {exact:>8.4f}, by power series {estimate:.4f}")


def plane(n, extent):
    """Return the midpoints (n * n, 2) of a grid over a square, and the area of a cell."""
    side = extent * ((2 * torch.arange(n) + 1) / n - 1)
    return torch.cartesian_prod(side, side), (2 * extent / n) ** 2


@torch.no_grad()
def plot(flow, path):
    grid, _ = plane(300, EXTENT)
    density = flow.log_density(grid).exp().view(300, 300).T.numpy()
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    data_axes, density_axes, sample_axes = figure.subplots(1, 3, sharex=True, sharey=True)
    data_axes.set_title("data")
    data_axes.scatter(*half_moons(3000).T.numpy(), s=2, color="#1f5fa8")
    density_axes.set_title("density of the flow")
    density_axes.imshow(density, origin="lower", extent=(-EXTENT, EXTENT, -EXTENT, EXTENT), cmap="magma")
    sample_axes.set_title("samples, by inverting the blocks")
    sample_axes.scatter(*flow.inverse(torch.randn(3000, 2)).T.numpy(), s=2, color="#c8781e")
    for axes in (data_axes, density_axes, sample_axes):
        axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def seed(text):
    number = int(text)
    if not 0 <= number < 2**64:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**64 - 1}, not {number}")
    return number


def image(text):
    """Read the path of a plot that can be written, so that no training is lost."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must be a file that ends in .png, .pdf or .svg, not {text!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write the plot: {error}; give another path") from error
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=1000, help="training steps (%(default)s)")
    parser.add_argument("--blocks", type=positive, default=8, help="residual blocks (%(default)s)")
    parser.add_argument("--width", type=positive, default=32, help="units of a hidden layer in a block (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="(%(default)s)")
    parser.add_argument("--output", type=image, default="runs/invertible_resnet/density.png", help="the plot")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    flow = Flow(options.blocks, options.width)
    train(flow, options.steps)
    report(flow)
    plot(flow, options.output)


if __name__ == "__main__":
    main()
