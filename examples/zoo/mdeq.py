"""Classify digits by a multiscale deep-equilibrium model (Bai, Koltun and Kolter 2020).

python examples/zoo/mdeq.py
    Trains on scikit-learn's 8 x 8 digits and prints the accuracy on the 450 test images, how many of them were solved
    in how many steps, and the shapes of the state. About a minute on two cores.

The state is a tuple of feature maps of three resolutions, which are all solved for together. In the map, a residual
block changes each of them, and then each becomes the sum of all of them, brought to its own resolution. The image is
injected into each. Group normalization keeps samples apart, which batch normalization would mix. The term that the
loss has for the size of the Jacobian (Bai, Koltun and Kolter 2021) keeps the map easy to solve during training.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from implicit import FixedPointLayer, Implicit, jacobian_regularization
from solvers.linear import Richardson

State = tuple[Tensor, ...]

# What the resolutions tell each other begins small, so that the map contracts at first.
BRANCH_STD = 0.02
JACOBIAN_WEIGHT = 1.0
GROUPS = 2


class ResidualBlock(nn.Module):
    """z -> relu(z / 2 + conv(relu(norm(conv(z)))) + x), in which the branch begins small."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm = nn.GroupNorm(GROUPS, channels)
        nn.init.normal_(self.conv2.weight, std=BRANCH_STD)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(z / 2 + self.conv2(F.relu(self.norm(self.conv1(z)))) + x)


class Resample(nn.Module):
    """Bring a feature map to a coarser resolution by strided convolutions, or to a finer one by interpolation."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        down = [nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False) for _ in range(levels)]
        up = [nn.Conv2d(channels, channels, 1, bias=False), nn.Upsample(scale_factor=2.0 ** max(-levels, 0))]
        self.layers = nn.Sequential(*(down if levels > 0 else up))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=BRANCH_STD)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """Sum feature maps of several resolutions at one of them."""

    def __init__(self, channels: int, levels: list[int]) -> None:
        super().__init__()
        self.resample = nn.ModuleList(Resample(channels, level) if level else nn.Identity() for level in levels)
        self.norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, z: State) -> Tensor:
        parts = [resample(part) for resample, part in zip(self.resample, z, strict=True)]
        return self.norm(F.relu(torch.stack(parts).sum(dim=0)))  # type: ignore[no-any-return]


class MultiscaleMap(nn.Module):
    """The map of a tuple of feature maps (B, channels, size / 2^i, size / 2^i) to such a tuple."""

    def __init__(self, channels: int, scales: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(scales))
        self.fuse = nn.ModuleList(Fusion(channels, [i - j for j in range(scales)]) for i in range(scales))

    def forward(self, z: State, x: Tensor) -> State:
        inputs = [F.avg_pool2d(x, 2**i) for i in range(len(z))]
        z = tuple(block(part, part_of_x) for block, part, part_of_x in zip(self.blocks, z, inputs, strict=True))
        return tuple(fuse(z) for fuse in self.fuse)


class MDEQ(nn.Module):
    """Images (B, 1, 8, 8) -> logits (B, 10)."""

    def __init__(self, channels: int = 16, scales: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, channels))
        self.map = MultiscaleMap(channels, scales)
        self.equilibrium = FixedPointLayer(
            self.map,
            init=lambda x: tuple(F.avg_pool2d(torch.zeros_like(x), 2**i) for i in range(scales)),
            solver="broyden",
            backward=Implicit(linear_solver=Richardson(rtol=1e-2)),
            rtol=1e-2,
            max_steps=100,
        )
        self.head = nn.Linear(scales * channels * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classified(self.equilibrium(self.stem(images)))

    def classified(self, z: State) -> Tensor:
        return self.head(torch.cat([F.adaptive_avg_pool2d(part, 2).flatten(1) for part in z], dim=1))  # type: ignore[no-any-return]


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) to train on and 450 to test with, and their labels (N,) likewise."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=450, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return train_images.float().view(-1, 1, 8, 8), test_images.float().view(-1, 1, 8, 8), train_labels, test_labels


def train(model: MDEQ, images: Tensor, labels: Tensor, epochs: int, batch_size: int = 64) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            x = model.stem(images[rows])
            z = model.equilibrium(x)
            size = jacobian_regularization(model.map, tuple(part.detach() for part in z), x.detach()).mean()
            loss = F.cross_entropy(model.classified(z), labels[rows]) + JACOBIAN_WEIGHT * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images [%(default)s]")
    parser.add_argument("--channels", type=int, default=16, help="of each feature map, an even number [%(default)s]")
    options = parser.parse_args()
    if min(options.epochs, options.channels) < 1 or options.channels % GROUPS:
        parser.error(f"--epochs and --channels must be at least 1, and --channels a multiple of {GROUPS}")
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = load_split()
    model = MDEQ(options.channels)
    train(model, train_images, train_labels, options.epochs)
    with torch.no_grad():
        z, solution = model.equilibrium(model.stem(test_images), return_solution=True)
        accuracy = (model.classified(z).argmax(dim=1) == test_labels).double().mean()
    steps = solution.num_steps.double()
    print(f"test accuracy {accuracy:.1%}")
    solved = int(solution.converged.sum())
    print(f"solved {solved} of {len(test_images)} images, in {steps.median():.0f} steps (median)")
    print("state of an image:", *(tuple(part.shape[1:]) for part in z))


if __name__ == "__main__":
    main()
