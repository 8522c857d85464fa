"""The plot of a confusion matrix."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from imixer.training.checkpoints import write_atomically
from imixer.training.plots import as_text

MOST_NUMBERS, MOST_NAMES = 20, 200  # classes up to which the cells hold numbers, and the axes names


def plot_confusion(confusion: Tensor, classes: Sequence[str], image: Path, *, title: str) -> None:
    """Plot which classes are taken for which, in percent of the images of each true class.

    Args:
        confusion: (classes, classes): images of each class, by row, that were taken for each class, by column.
        classes: Their names.
        image: PNG file to write.
        title: Title.
    """
    num_classes = len(classes)
    percent = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(max(5.0, 1.5 + 0.55 * num_classes), 16.0)
    # A Figure of its own, rather than pyplot's, needs no display and leaves no global state.
    figure = Figure(figsize=(side * 1.1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Rare confusions would be white on a linear scale.
    picture = axes.imshow(percent.numpy(), cmap="Blues", norm=PowerNorm(0.4, vmin=0, vmax=100))
    font = 10 if num_classes <= MOST_NUMBERS else max(3.0, 600 / num_classes)
    if num_classes <= MOST_NUMBERS:
        for row in range(num_classes):
            for column in range(num_classes):
                value = percent[row, column].item()
                if value:
                    color = "white" if value > 30 else "black"
                    text = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
                    axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    if num_classes <= MOST_NAMES:
        names = [as_text(name) for name in classes]
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=font)
        axes.set_yticks(range(num_classes), names, fontsize=font)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    axes.set_title(as_text(title), fontsize=12)
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="% of the true class", ticks=[0, 1, 5, 10, 20, 50, 100])
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_atomically(image, content.getvalue())
