"""Figures of a diagnosis, by matplotlib."""

import math
from typing import TYPE_CHECKING, Any

import torch

from implicit.diagnostics.layer_report import LayerReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The most samples whose residuals are drawn as lines of their own.
MOST_LINES = 64


def plot_layers(reports: list[LayerReport]) -> "Figure":
    """Draw residuals per sample, eigenvalues in the complex plane and a histogram of steps, one row per layer."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(13, 3.8 * len(reports)), layout="constrained")
    axes = figure.subplots(len(reports), 3, squeeze=False)
    for row, report in zip(axes, reports, strict=True):
        _residuals(row[0], report)
        _eigenvalues(row[1], report)
        _steps(row[2], report)
    return figure


def _residuals(axes: Any, report: LayerReport) -> None:
    history = report.history[:, :MOST_LINES]
    steps = range(1, len(history) + 1)
    for residuals in history.T:
        finite = torch.where(residuals.isfinite() & (residuals > 0), residuals, math.nan)
        axes.plot(steps, finite, color="tab:blue", alpha=max(0.3, 1 / max(history.shape[1], 1)), linewidth=1.2)
    if torch.isfinite(history).any() and (history > 0).any():
        axes.set_yscale("log")
    floor = float(report.precision_floor.nan_to_num(0.0).max()) if report.precision_floor.numel() else 0.0
    if floor > 0 and history.numel():
        axes.axhline(floor, color="tab:gray", linestyle=":", label="rounding in the map")
        axes.legend(loc="best", fontsize=8)
    causes = ", ".join(cause.value for cause in report.causes) or "healthy"
    axes.set_title(f"{report.name}\n{causes}", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("relative residual of each sample")


def _eigenvalues(axes: Any, report: LayerReport) -> None:
    if not report.root:
        angle = torch.linspace(0, 2 * math.pi, 200)
        axes.plot(angle.cos(), angle.sin(), color="tab:gray", linewidth=1, label="unit circle")
    values = report.eigenvalues[~report.eigenvalues.isnan()]
    # The eigenvalues of a real matrix come in conjugate pairs, of which the last may have been cut off.
    values = torch.cat([values, values.conj()])
    stable = (values.abs() < 1) | report.root
    for inside, color in ((stable, "tab:blue"), (~stable, "tab:red")):
        axes.plot(values[inside].real, values[inside].imag, "o", color=color, markersize=4, alpha=0.5)
    singular = (0, "0, where J is singular") if report.root else (1, "1, where I - J is singular")
    axes.plot([singular[0]], [0], "x", color="black", markersize=7, label=singular[1])
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="lower left", fontsize=7)
    axes.set_title(f"eigenvalues of the Jacobian{' of F' if report.root else ''}", fontsize=10)
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")


def _steps(axes: Any, report: LayerReport) -> None:
    steps = report.num_steps
    if len(steps):
        low, high = int(steps.min()), int(steps.max())
        bins = torch.linspace(low - 0.5, high + 0.5, min(high - low + 1, 40) + 1)
        axes.hist(steps, bins=bins, color="tab:blue", rwidth=0.9)
        if low == high:
            axes.set_xlim(low - 4, high + 4)
        if high - low < 10:
            axes.set_xticks(range(low, high + 1))
    axes.yaxis.get_major_locator().set_params(integer=True)
    statuses = ", ".join(f"{count} {name}" for name, count in report.statuses.items())
    axes.set_title(f"steps\n{statuses}", fontsize=10)
    axes.set_xlabel("step at which a sample stopped")
    axes.set_ylabel("samples")
