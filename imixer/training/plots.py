"""Plots of training runs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from imixer.training.checkpoints import write_atomically

TRAIN_COLOR, TEST_COLOR = "#c8781e", "#1f5fa8"


def as_text(name: str) -> str:
    """Return a name as matplotlib has to be given it, so that no "$" begins a formula and all of it can be drawn."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def plot_curves(curves: Path, image: Path, *, title: str) -> None:
    """Plot the losses and the test accuracy of a run against its epochs.

    Args:
        curves: CSV file with the columns epoch, train_loss, test_loss and test_top1 (in percent).
        image: PNG file to write.
        title: Title over both panels.
    """
    with curves.open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    top1 = [float(row["test_top1"]) for row in rows]
    marker = "o" if len(epochs) < 20 else None

    # A Figure of its own, rather than pyplot's, needs no display and leaves no global state.
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(as_text(title), fontsize=13)
    loss_axes, top1_axes = figure.subplots(1, 2)

    for column, label, color in (
        ("train_loss", "training objective", TRAIN_COLOR),
        ("test_loss", "test cross-entropy", TEST_COLOR),
    ):
        values = [float(row[column]) for row in rows]
        loss_axes.plot(epochs, values, color=color, label=label, marker=marker, markersize=4)
    loss_axes.set_ylabel("loss")
    loss_axes.set_title("Loss", fontsize=11)
    loss_axes.legend(frameon=False)

    best = max(range(len(rows)), key=top1.__getitem__)
    label = f"best {top1[best]:.2f}% (epoch {epochs[best]})"
    top1_axes.plot(epochs, top1, color=TEST_COLOR, marker=marker, markersize=4, label=f"test, last {top1[-1]:.2f}%")
    top1_axes.plot(epochs[best], top1[best], "*", color=TRAIN_COLOR, markersize=13, clip_on=False, label=label)
    top1_axes.legend(frameon=False, loc="lower right")
    top1_axes.set_ylabel("test top-1 accuracy (%)")
    top1_axes.set_title("Accuracy", fontsize=11)

    for axes in (loss_axes, top1_axes):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_atomically(image, content.getvalue())
