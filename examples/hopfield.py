"""Store handwritten digits in Hopfield networks of two and three layers, and retrieve them from corrupted ones.

python examples/hopfield.py
    Stores 100 of scikit-learn's digits, corrupts each by noise and by erasing its lower half, and follows the dynamics
    of the networks from there. Prints how close the corrupted and the retrieved images are to the originals, beside
    the honest rival, a search for the nearest stored image, which retrieves as many; and the largest change of the
    energy in a step, which is negative: it falls all the time. Draws the energies and some of the images to
    runs/hopfield/retrieval.png. Takes about ten seconds; needs pip install 'implicit-layers[train]'.

The visible layer holds an image, as its deviation from the mean digit, so that an erased pixel is a zero. Each neuron
of the next layer stands for a stored image, which is its row of couplings: the drive that it gets is the correlation of
the visible image with its own, and the visible image moves towards the neurons' images, weighted by their activations.

- With softmax as the activation the best match suppresses the others, and the image turns into it.
- With ReLU all matches add up, and the image turns into a mixture of many digits: this is the classical network, whose
  energy is quadratic, and which cannot tell apart a hundred images that are so alike.
- A third layer, with a neuron for each class, gathers the evidence for its class and sends it back to the class's
  images. By itself it changes little. But it can be told the class: it is slow, so that it still knows what it was
  told at the start while the image is being retrieved. Then the fair rival is the nearest stored image of the class.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.nn import functional as F

from imixer.hopfield import CentredNorm, HierarchicalHopfield, ReLU, Softmax

DURATION = 8.0  # in units of the visible layer's time constant
BETA = 50.0  # matches that differ by 0.05 in their correlation differ 12-fold in their activation
CLASS_WEIGHT = 0.3  # what a class, once it is decided on, adds to the correlation of its images
TOLD = "three layers, told"
COLORS = {"noise": "#1f5fa8", "lower half erased": "#c8781e"}


def corrupt(images, noise):
    """Both kinds of corruption of images (M, 64), each as images (M, 64)."""
    erased = images.clone()
    erased[:, 32:] = 0  # the rows from the fifth on
    return {"noise": images + noise * torch.randn_like(images), "lower half erased": erased}


def make_networks(images, labels):
    """The networks by name."""
    visible = CentredNorm()
    patterns = visible.activation(images)  # (M, 64), so that a coupling times the visible activation is a correlation
    classes = CLASS_WEIGHT * F.one_hot(labels).to(images).T  # (10, M)
    softmax = Softmax(beta=BETA)
    fast, slow = 0.2, 3.0
    return {
        "two layers, ReLU": HierarchicalHopfield([patterns], [visible, ReLU()], time_constants=[1.0, fast]),
        "two layers": HierarchicalHopfield([patterns], [visible, softmax], time_constants=[1.0, fast]),
        "three layers": HierarchicalHopfield(
            [patterns, classes], [visible, softmax, Softmax(beta=BETA)], time_constants=[1.0, fast, slow]
        ),
    }


def start(network, images, told=None):
    """Every hidden layer as the one below drives it, but for the top one where it is told the class."""
    states = [images]
    for lagrangian, coupling in zip(network.lagrangians, network.couplings, strict=False):
        states.append(lagrangian.activation(states[-1]) @ coupling.T)
    return states if told is None else [*states[:-1], CLASS_WEIGHT * F.one_hot(told, 10).to(images)]


def nearest_stored(corrupted, images, choice=None):
    """The image that each corrupted one is most correlated with, among those of its choice (M, M)."""
    match = correlation(corrupted, images)
    return images[(match if choice is None else match.where(choice, -torch.inf)).argmax(dim=1)]


def correlation(images, others):
    """Of each image with each of the others: (M, 64), (N, 64) -> (M, N)."""
    g = CentredNorm().activation
    return g(images) @ g(others).T


def row_of_table(name, found, images, labels):
    """How close what was found for each image is to it, and to the stored images nearest to that."""
    overlaps = correlation(found, images)
    nearest = overlaps.argmax(dim=1)
    retrieved = (nearest == torch.arange(len(images))).double().mean()
    right_class = (labels[nearest] == labels).double().mean()
    return f"{name:<30}{overlaps.diagonal().mean():8.3f}{retrieved:11.0%}{right_class:13.0%}"


def plot(path, times, energies, shown):
    """Energies (T, N) by network and corruption, and rows of images (N, 64) by name."""
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.8])
    top.suptitle("Energy along the dynamics, above its value at the end", fontsize=13)
    panels = top.subplots(1, len(energies), sharey=True)
    for axes, (name, by_kind) in zip(panels, energies.items(), strict=True):
        for kind, energy in by_kind.items():
            lines = axes.plot(times.numpy(), (energy - energy[-1]).numpy(), color=COLORS[kind], linewidth=1.3)
            lines[0].set_label(kind)
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("time / time constant of the visible layer")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("energy")
    panels[0].legend(frameon=False)

    bottom.suptitle("Images", fontsize=13)
    columns = len(next(iter(shown.values())))
    grid = bottom.subplots(len(shown), columns)
    for number, (kind, color) in enumerate(COLORS.items()):
        grid[0, columns // 4 + number * columns // 2].set_title(kind, color=color, fontsize=11)
    for row, (name, images) in zip(grid, shown.items(), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#cccccc")
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--per-class", type=int, default=10, help="digits to store of each class [%(default)s]")
    parser.add_argument("--noise", type=float, default=0.6, help="its deviation, of pixels in [0, 1] [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("runs/hopfield"), help="the plot's folder [%(default)s]")
    options = parser.parse_args()
    if options.per_class < 1 or not 0 <= options.noise < math.inf:
        parser.error("--per-class must be at least 1, and --noise a number that is not negative")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write the plot: {error}; give another folder")

    torch.manual_seed(0)
    digits = load_digits()
    labels = torch.from_numpy(digits.target)
    chosen = torch.cat([(labels == digit).nonzero()[: options.per_class, 0] for digit in range(10)])
    labels = labels[chosen]
    pixels = torch.from_numpy(digits.data)[chosen] / 16  # (M, 64) in [0, 1]
    mean = pixels.mean(dim=0)
    images = pixels - mean
    networks = make_networks(images, labels)
    times = torch.linspace(0, DURATION, 161)

    in_plot = torch.arange(5) * len(images) // 5 + 1  # one of every other class
    contrast = CentredNorm().value(images).mean()
    shown = {name: [] for name in ("corrupted", *networks, TOLD, "original")}
    energies = {name: {} for name in ("two layers", "three layers")}
    largest_rise = -torch.inf
    print(f"{len(images)} stored digits of 64 pixels\n")
    print(f"{'':<30}{'overlap':>8}{'retrieved':>11}{'class right':>13}")
    for kind, corrupted in corrupt(images, options.noise).items():
        shown["corrupted"] += list(corrupted[in_plot] + mean)
        shown["original"] += list(pixels[in_plot])
        print(row_of_table(kind, corrupted, images, labels))
        print(row_of_table("  nearest stored", nearest_stored(corrupted, images), images, labels))
        for name in (*networks, TOLD):
            network = networks["three layers" if name == TOLD else name]
            states = start(network, corrupted, labels if name == TOLD else None)
            trajectory = network.integrate(states, DURATION, times=times, rtol=1e-5, atol=1e-7)
            energy = network.energy(trajectory.states)  # (T, M)
            largest_rise = max(largest_rise, energy.diff(dim=0).max())
            if name in energies:
                energies[name][kind] = energy[:, in_plot]
            found = trajectory.states[0][-1]
            shown[name] += list(contrast * CentredNorm().activation(found[in_plot]) + mean)
            print(row_of_table(f"  {name}", found, images, labels))
        of_class = nearest_stored(corrupted, images, labels[:, None] == labels)
        print(row_of_table("  nearest stored of the class", of_class, images, labels) + "\n")
    print(f"largest change of any energy between one of {len(times)} times and the next: {largest_rise:.0e}")
    path = options.output / "retrieval.png"
    plot(path, times, energies, shown)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
