"""Figures of what is measured on trained models."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from imixer.reproduction.experiments import Experiment
from imixer.reproduction.figure import COLORS, MARKERS, NamedFigure, band, new_figure
from imixer.reproduction.results import ArmResults

CURVES = (("step", "norm of z(k+1) - z(k), over D", "log"), ("cosine", "cosine of z(k) and z(k+1)", "linear"))


def convergence(experiment: Experiment, results: Sequence[ArmResults]) -> NamedFigure | None:
    """Figure 3: the mean over all layers."""
    shown = [result for result in results if result.measured["iteration"]]
    if not shown:
        return None
    figure = new_figure(7.5, 3.0)
    for ax, (name, label, scale) in zip(figure.subplots(1, 2), CURVES, strict=True):
        for result, color in zip(shown, COLORS, strict=False):
            per_seed = [
                np.mean([layer[name] for layer in measured["layers"].values()], axis=0)
                for measured in result.measured["iteration"].values()
            ]
            _against_k(ax, np.array(per_seed), color, f"trained with {result.arm.name}", scale)
        ax.set_ylabel(label)
    figure.axes[0].legend(fontsize=7)
    caption = (
        "Figure 3: the steps of the iteration, mean over all layers, rows of 16 test images and seeds, against k; k=0 "
        "is the start. The band is the 95% interval over seeds; on the left, mean and interval are those of the "
        "logarithms."
    )
    return NamedFigure(name=f"{experiment.name}-mean", caption=caption, figure=figure)


def convergence_of_layers(experiment: Experiment, results: Sequence[ArmResults]) -> NamedFigure | None:
    """Figure C.3: every layer, the norms above the cosines."""
    shown = [result for result in results if result.measured["iteration"]]
    if not shown:
        return None
    measured = [m["layers"] for result in shown for m in result.measured["iteration"].values()]
    layers = [layer for layer in measured[0] if all(layer in of_seed for of_seed in measured)]
    if not layers:
        return None
    figure = new_figure(max(2.2 * len(layers), 5.5), 4.6)
    axes = figure.subplots(2, len(layers), squeeze=False, sharey="row", sharex=True)
    for row, (name, label, scale) in zip(axes, CURVES, strict=True):
        for ax, layer in zip(row, layers, strict=True):
            for result, color in zip(shown, COLORS, strict=False):
                curves = [m["layers"][layer][name] for m in result.measured["iteration"].values()]
                _against_k(ax, np.array(curves), color, result.arm.name, scale)
            if name == "step":
                ax.set_title(layer.replace(".mlp_tokens", ""), fontsize=8)
        row[0].set_ylabel(label, fontsize=8)
    axes[0, 0].legend(fontsize=6)
    caption = "Figure C.3: the same for every layer."
    return NamedFigure(name=f"{experiment.name}-layers", caption=caption, figure=figure)


def maps(experiment: Experiment, results: Sequence[ArmResults]) -> NamedFigure | None:
    """Figure C.4: feature maps of the last arm's first seed along the iteration."""
    shown = [result for result in results if result.measured["feature-maps"]]
    if not shown:
        return None
    columns = [(result.arm.name, next(iter(result.measured["feature-maps"].values()))) for result in shown]
    steps, num_images = columns[0][1]["steps"], len(columns[0][1]["images"])
    per_arm = 3
    figure = new_figure(1.0 + 1.05 * per_arm * len(columns), 1.0 * num_images * (len(steps) + 1) * 0.8 + 0.6)
    rows = num_images * (len(steps) + 1)
    axes = figure.subplots(rows, per_arm * len(columns), squeeze=False)
    for ax in axes.flatten():
        ax.set_axis_off()
    for image in range(num_images):
        top = image * (len(steps) + 1)
        for index, (name, measured) in enumerate(columns):
            left = index * per_arm
            pixels = np.array(measured["images"][image])
            axes[top, left].imshow(pixels, cmap=None if pixels.shape[-1] == 3 else "gray")
            axes[0, left + per_arm // 2].set_title(name, fontsize=8)  # over the middle of its maps
            for channel in range(per_arm):
                pictures = np.array(measured["maps"][image][channel])  # (steps, size, size)
                low, high = pictures.min(), pictures.max()
                for offset, picture in enumerate(pictures, start=1):
                    axes[top + offset, left + channel].imshow(picture, cmap="viridis", vmin=low, vmax=high)
        for offset, k in enumerate(steps, start=1):
            axes[top + offset, 0].text(
                -0.15, 0.5, f"k={k}", transform=axes[top + offset, 0].transAxes, fontsize=7, ha="right", va="center"
            )
    caption = (
        "Figure C.4: what the first block's token mixer returns if its solve is stopped after k steps, for two test "
        f"images and {per_arm} channels of models trained with different numbers of steps (one seed); one scale of "
        "colors for each channel."
    )
    return NamedFigure(name=f"{experiment.name}-maps", caption=caption, figure=figure)


def steps_at_test_time(experiment: Experiment, results: Sequence[ArmResults]) -> NamedFigure | None:
    """Accuracy against the number of steps that the trained model is tested with."""
    shown = [result for result in results if result.measured["inference-steps"]]
    if not shown:
        return None
    found = [m["top1"] for result in shown for m in result.measured["inference-steps"].values()]
    steps = [step for step in found[0] if all(step in top1 for top1 in found)]
    if not steps:
        return None
    figure = new_figure(7.5, 3.0)
    absolute, change = figure.subplots(1, 2)
    for result, color in zip(shown, cycle(COLORS)):
        measured = list(result.measured["inference-steps"].values())
        trained = str(result.arm.settings["n_iter"])
        label = f"trained with {result.arm.name}"
        band(absolute, range(len(steps)), [[m["top1"][step] for m in measured] for step in steps], color, label)
        if trained in steps:
            differences = [[m["top1"][step] - m["top1"][trained] for m in measured] for step in steps]
            band(change, range(len(steps)), differences, color, label)
    for ax in (absolute, change):
        ax.set_xticks(range(len(steps)), [step.replace("fixed point", "fixed\npoint") for step in steps])
        ax.set_xlabel("steps at test time")
    absolute.set_ylabel("test top-1 (%)")
    change.set_ylabel("change of top-1 (points)")
    absolute.legend(fontsize=7)
    caption = (
        "Accuracy against the number of steps at test time, and its change from the number of steps in training, seed "
        "by seed: means over seeds, and their 95% intervals as bands."
    )
    return NamedFigure(name=f"{experiment.name}-steps", caption=caption, figure=figure)


def costs(experiment: Experiment, results: Sequence[ArmResults]) -> NamedFigure | None:
    """Accuracy, gradient and memory of solvers and backward modes against the time of a step."""
    shown = [result for result in results if result.measured["step"]]
    if not shown:
        return None
    solvers = list(dict.fromkeys(result.arm.labels["solver"] for result in shown))
    backwards = list(dict.fromkeys(result.arm.labels["backward"] for result in shown))
    panels: list[tuple[str, Callable[[ArmResults], float], str]] = [
        ("test top-1 (%)", lambda result: _mean(list(result.top1.values())), "linear"),
        ("1 - cosine to the exact gradient", lambda result: max(1 - _at(result, "after", "cosine"), 1e-9), "log"),
        ("saved for backward (MiB)", lambda result: _at(result, "after", "bytes_saved") / 2**20, "linear"),
    ]
    figure = new_figure(10.5, 3.6)
    axes = figure.subplots(1, len(panels))
    for ax, (label, value, scale) in zip(axes, panels, strict=True):
        for result in shown:
            ax.plot(
                _at(result, "after", "seconds") * 1e3,
                value(result),
                MARKERS[backwards.index(result.arm.labels["backward"]) % len(MARKERS)],
                color=COLORS[solvers.index(result.arm.labels["solver"]) % len(COLORS)],
                markersize=5,
                alpha=0.85,
            )
        ax.set_xlabel("ms per training step")
        ax.set_ylabel(label)
        ax.set_xscale("log")
        ax.set_yscale(scale)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    handles = [
        axes[0].plot([], [], color=COLORS[i % len(COLORS)], label=name, linewidth=5)[0]
        for i, name in enumerate(solvers)
    ]
    handles += [
        axes[0].plot([], [], MARKERS[i % len(MARKERS)], color="gray", label=name)[0] for i, name in enumerate(backwards)
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7)
    caption = (
        "Each arm once: the solver is the color, the backward mode the marker. Times, gradients and memory are those "
        "of one batch after the training, means over seeds."
    )
    return NamedFigure(name=f"{experiment.name}-costs", caption=caption, figure=figure)


FIGURES: dict[str, tuple[Callable[[Experiment, Sequence[ArmResults]], NamedFigure | None], ...]] = {
    "iteration": (convergence, convergence_of_layers),
    "feature-maps": (maps,),
    "inference-steps": (steps_at_test_time,),
    "step": (costs,),
}


def _against_k(ax: Axes, curves: Any, color: str, label: str, scale: str) -> None:
    """Draw (seeds, K) values with a band."""
    ax.set_yscale(scale)
    values = np.maximum(curves, 1e-12) if scale == "log" else curves
    band(
        ax,
        range(values.shape[1]),
        values.T.tolist(),
        color,
        label,
        geometric=scale == "log",
        highest=np.inf if scale == "log" else 1.0,
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("k")


def _at(result: ArmResults, point: str, name: str) -> float:
    values = [r[name] for m in result.measured["step"].values() for r in m["points"] if r["point"] == point]
    return _mean(values)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
