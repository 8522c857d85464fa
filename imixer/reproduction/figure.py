"""Figures: for a paper as PDF and PNG, and for the page as SVG that fits light and dark; and what all of them share."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from imixer.reproduction.results import ArmResults
from imixer.reproduction.statistics import estimate

# Okabe and Ito's colors, which color-blind people can tell apart, without the yellow and the black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": "#888888",
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True, kw_only=True)
class NamedFigure:
    """A figure.

    Args:
        name: Name of its files.
        caption: What it shows.
        figure: The figure itself.
    """

    name: str
    caption: str
    figure: Figure

    def __post_init__(self) -> None:
        # The layout is computed once, not again for every kind of file.
        with mpl.rc_context(STYLE):
            self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def png(self) -> bytes:
        """The figure on white, for a screen."""
        return self._saved("png", dpi=160)

    def pdf(self) -> bytes:
        """The figure as vectors, for a paper."""
        return self._saved("pdf")

    def svg(self) -> str:
        """The figure as an element of a page. What is black takes the color of the page's text."""
        content = io.StringIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        text = content.getvalue()
        text = text[text.index("<svg") :].strip().replace("#000000", "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
        # Names that nothing refers to are the same in every figure, and the others get the figure's name.
        used = set(re.findall(r"(?:xlink:href=\"|url\()#([^\")]+)", text))
        text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
        text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{self.name}-", text)
        attributes = f'role="img" aria-label="{self.name}" fill="currentColor" stroke-linejoin="round"'
        width = round(100 * self.figure.get_figwidth())  # pixels, for letters a little smaller than the page's
        attributes += f' style="max-width: {width}px"'
        return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', attributes, text, count=1)

    def _saved(self, kind: str, dpi: int = 100) -> bytes:
        content = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(content, format=kind, facecolor="white", dpi=dpi)
        return content.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, which needs no display and leaves no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels_of(results: Sequence[ArmResults]) -> dict[str, list[ArmResults]]:
    """Results by their first label, where there are several labels and many arms; else all in one."""
    first = next(iter(results[0].arm.labels), "")
    if len(results[0].arm.labels) < 2 or len(results) <= len(COLORS):
        return {"": list(results)}
    panels: dict[str, list[ArmResults]] = {}
    for result in results:
        value = result.arm.labels[first]
        panels.setdefault(f"{first} {value}" if first not in value and value[:1].isdigit() else value, []).append(
            result
        )
    return panels


def label_in_panel(result: ArmResults, panel: str) -> str:
    """What tells an arm from the others of its panel."""
    if not panel:
        return result.arm.name
    first = next(iter(result.arm.labels))
    return ", ".join(
        f"{name} {value}" if value[:1].isdigit() else value
        for name, value in result.arm.labels.items()
        if name != first
    )


def grid(count: int, *, width: float = 3.3, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Panels in rows of at most four."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = new_figure(max(width * columns, 5.5), height * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def band(
    ax: Axes,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    color: str,
    label: str,
    *,
    geometric: bool = False,
    highest: float = math.inf,
) -> None:
    """A line of means over seeds with a band of their 95% intervals.

    Args:
        ax: Where to draw.
        x: Positions.
        values: For each position, one value for each seed.
        color: Of both.
        label: For the legend; the number of seeds is added.
        geometric: Whether mean and interval are those of the logarithms, for positive values on a logarithmic axis.
        highest: Where the band ends above, for values that cannot be larger.
    """
    estimates = [estimate(np.log(seeds).tolist() if geometric else seeds) for seeds in values]
    mean, low, high = (np.array([getattr(e, name) for e in estimates]) for name in ("mean", "low", "high"))
    if geometric:
        mean, low, high = np.exp(mean), np.exp(low), np.exp(high)
    ax.plot(x, mean, color=color, label=f"{label} (n={estimates[0].count})", linewidth=1.5)
    if estimates[0].count > 1:
        ax.fill_between(x, low, np.minimum(high, highest), color=color, alpha=0.15, linewidth=0)
