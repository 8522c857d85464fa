"""The figures of an experiment."""

from collections.abc import Callable, Sequence
from itertools import cycle

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from imixer.reproduction.experiments import Experiment
from imixer.reproduction.figure import COLORS, STYLE, NamedFigure, band, grid, label_in_panel, new_figure, panels_of
from imixer.reproduction.measured_figures import FIGURES
from imixer.reproduction.results import ArmResults
from imixer.reproduction.statistics import estimate

# Measurements of experiments that are not about the accuracy after training, which Table 2 shows.
ABOUT_SOMETHING_ELSE = {"iteration", "feature-maps", "inference-steps"}


def make_figures(experiment: Experiment, results: Sequence[ArmResults]) -> list[NamedFigure]:
    """The figures of an experiment from what is there; none while nothing is."""
    makers: list[Callable[[Experiment, Sequence[ArmResults]], NamedFigure | None]] = []
    if not ABOUT_SOMETHING_ELSE.intersection(experiment.measurements):
        makers += [curves, accuracies]
    makers += [figure for name in experiment.measurements for figure in FIGURES.get(name, ())]
    with mpl.rc_context(STYLE):
        found = [make(experiment, results) for make in makers]
    return [figure for figure in found if figure is not None]


def curves(experiment: Experiment, results: Sequence[ArmResults]) -> NamedFigure | None:
    """Test accuracy against epochs, means with 95% bands over seeds."""
    shown = [result for result in results if result.curves]
    if not shown or max(len(rows) for result in shown for rows in result.curves.values()) < 2:
        return None
    panels = panels_of(shown)
    figure, axes = grid(len(panels), width=3.3 if len(panels) > 1 else 6.0, height=2.8)
    for ax, (panel, members) in zip(axes, panels.items(), strict=True):
        for result, color in zip(members, cycle(COLORS)):
            epochs = min(len(rows) for rows in result.curves.values())
            values = [[rows[i]["test_top1"] for rows in result.curves.values()] for i in range(epochs)]
            band(ax, range(1, epochs + 1), values, color, label_in_panel(result, panel))
        ax.set_title(panel, fontsize=9)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(fontsize=7)
    axes[0].set_ylabel("test top-1 (%)")
    caption = "Test accuracy after each epoch: mean over seeds, and its 95% interval as a band."
    return NamedFigure(name=f"{experiment.name}-curves", caption=caption, figure=figure)


def accuracies(experiment: Experiment, results: Sequence[ArmResults]) -> NamedFigure | None:
    """Accuracy of every arm: seeds as points, mean and interval as a bar of errors."""
    shown = [result for result in results if result.top1]
    if not shown:
        return None
    figure = new_figure(6.5, 0.27 * len(shown) + 1.0)
    ax = figure.subplots()
    for row, result in enumerate(shown):
        values = list(result.top1.values())
        mean = estimate(values)
        color = COLORS[7] if result.arm.baseline is None else COLORS[0]
        ax.plot(values, [row] * len(values), "o", color=color, markersize=3, alpha=0.45)
        if mean.count > 1:
            ax.plot([mean.low, mean.high], [row, row], "-", color=color, linewidth=1.4)
        ax.plot(mean.mean, row, "D", color=color, markersize=5)
        if result.arm.published is not None:
            ax.plot(result.arm.published, row, "x", color=COLORS[1], markersize=7)
    if any(len(result.top1) > 1 for result in shown):
        # An interval of two seeds may be wider than all accuracies there are.
        points: dict[str, list[float]] = {}
        for result in shown:
            points.setdefault(result.arm.data.name, []).extend(result.top1.values())
        lowest, highest = min(map(min, points.values())), max(map(max, points.values()))
        spread = max(0.5, *(max(of_data) - min(of_data) for of_data in points.values()))
        ax.set_xlim(max(lowest - spread, 0), min(highest + spread, 100))
    ax.set_yticks(range(len(shown)), [f"{result.arm.name} (n={len(result.top1)})" for result in shown], fontsize=7)
    ax.set_ylim(len(shown) - 0.4, -0.6)  # the first on top
    ax.set_xlabel("test top-1 (%)")
    caption = (
        "Test accuracy after the last epoch: each seed (points), their mean (diamond) and its 95% interval (line); "
        "baselines in gray."
    )
    return NamedFigure(name=f"{experiment.name}-accuracy", caption=caption, figure=figure)
