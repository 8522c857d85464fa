"""Deblur noisy digits by a deep-equilibrium proximal gradient method (Gilton, Ongie and Willett 2021).

python examples/zoo/deblurring.py
    Blurs scikit-learn's digits by a Gaussian of one pixel, adds noise, and trains the proximal map of the method
    through its fixed point. Prints the mean peak signal-to-noise ratio of the 450 test images: blurred, by Tikhonov
    regularization whose weight is the best for them, by the Wiener filter with the covariance of the training images,
    and by the equilibrium. Draws some of them to runs/deblurring/images.png. About a minute on two cores; needs
    pip install 'implicit-layers[train]'.

An iteration of proximal gradient descent for the measurement y = K x + noise, with |K| <= 1, is

    x <- R(x - K'(K x - y)),

where R would be the proximal map of a regularizer, and is learned here: R(x) = (1 - c) x + c N(x). The network N pulls
x towards what digits look like, with a strength c that suits the noise. The convergence theorem of the paper asks that
R - I have a small Lipschitz constant. Here the layers of N have spectral norms of at most 0.95, so that R, and with it
the iteration, contracts by 1 - c (1 - 0.95^2), whatever the training does. So there is exactly one restored image,
also where the blur has left nothing of the original.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from implicit import FixedPointLayer, lipschitz_bound, spectral_norm

NOISE, STRENGTH = 0.02, 0.02
WEIGHTS = torch.exp(-torch.arange(-3.0, 4.0).square() / 2)  # of a Gaussian of one pixel
KERNEL = torch.outer(WEIGHTS, WEIGHTS)[None, None] / WEIGHTS.sum() ** 2


def blur(images: Tensor) -> Tensor:
    """K x for images (B, 1, 8, 8). K is symmetric, and its norm is below 1."""
    return F.conv2d(images, KERNEL.to(images), padding=3)


class ProximalGradientStep(nn.Module):
    """The map x -> R(x - K'(K x - y)) of images (B, 1, 8, 8), with R = (1 - c) I + c N."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.prior = nn.Sequential(
            nn.Flatten(),
            spectral_norm(nn.Linear(64, width), coeff=0.95, method="exact"),
            nn.ReLU(),
            spectral_norm(nn.Linear(width, 64), coeff=0.95, method="exact"),
            nn.Unflatten(1, (1, 8, 8)),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x - blur(blur(x) - y)  # K' = K
        return torch.lerp(x, self.prior(x), STRENGTH)


class Deblurring(nn.Module):
    """Blurred images (B, 1, 8, 8) -> restored ones."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.map = ProximalGradientStep(width)
        self.equilibrium = FixedPointLayer(self.map, rtol=1e-4, max_steps=100)

    def forward(self, blurred: Tensor) -> Tensor:
        restored: Tensor = self.equilibrium(blurred)
        return restored

    @torch.no_grad()
    def contraction(self) -> float:
        """A bound below 1 of the Lipschitz constant of the iteration."""
        return 1 - STRENGTH * (1 - float(lipschitz_bound(self.map.prior)))


def measure(images: Tensor) -> Tensor:
    return blur(images) + NOISE * torch.randn_like(images)


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB, for pixels in [0, 1]."""
    return float(-10 * (images - truth).square().mean(dim=(1, 2, 3)).log10().mean())


def tikhonov(blurred: Tensor, truth: Tensor) -> Tensor:
    """(K'K + c I)^{-1} K'y with the c that is best for these images."""
    k = blur(torch.eye(64).view(64, 1, 8, 8)).view(64, 64)
    right = (blurred.flatten(1) @ k).T
    squares, constants = k.T @ k, torch.logspace(-4, 0, 41).view(-1, 1, 1)
    restored: Tensor = torch.linalg.solve(squares + constants * torch.eye(64), right).mT.unflatten(2, (1, 8, 8))
    return max(restored.unbind(), key=lambda images: psnr(images, truth))


def wiener(blurred: Tensor, training: Tensor) -> Tensor:
    """The best affine estimate, by the mean and the covariance of the training images."""
    k = blur(torch.eye(64).view(64, 1, 8, 8)).view(64, 64)
    mean, covariance = training.flatten(1).mean(dim=0), training.flatten(1).T.cov()
    noisy = k @ covariance @ k.T + NOISE**2 * torch.eye(64)
    gain: Tensor = torch.linalg.solve(noisy, k @ covariance).T
    return (mean + (blurred.flatten(1) - k @ mean) @ gain.T).view_as(blurred)


def train(model: Deblurring, images: Tensor, epochs: int, batch_size: int = 64) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    steps = max(1, epochs * math.ceil(len(images) / batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            loss = F.mse_loss(model(measure(images[rows])), images[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def plot(rows: dict[str, Tensor], path: Path) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        row = torch.cat([F.pad(image[0], (1, 1)) for image in images[:10]], dim=1)
        axes.imshow(row.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"plot: {path}")


def load_images() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] to train on, and 450 to test with."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    training, test = train_test_split(images, test_size=450, random_state=0)
    return training, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("runs/deblurring/images.png"), help="[%(default)s]")
    options = parser.parse_args()
    if options.epochs < 1 or options.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error("--epochs must be at least 1, and --output must end in .png, .pdf or .svg")
    torch.manual_seed(0)
    training, truth = load_images()
    model = Deblurring()
    train(model, training, options.epochs)
    blurred = measure(truth)
    with torch.no_grad():
        restored, solution = model.equilibrium(blurred, return_solution=True)
    rows = {"blurred": blurred, "Tikhonov": tikhonov(blurred, truth), "Wiener": wiener(blurred, training)}
    rows["equilibrium"] = restored
    for name, images in rows.items():
        print(f"{name:<12}{psnr(images, truth):6.2f} dB")
    solved, steps = int(solution.converged.sum()), int(solution.num_steps.max())
    print(f"solved {solved} of {len(truth)} images in at most {steps} steps")
    print(f"the iteration contracts by at most {model.contraction():.4f}")
    plot({"original": truth, **rows}, options.output)


if __name__ == "__main__":
    main()
