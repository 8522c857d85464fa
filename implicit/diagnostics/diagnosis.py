"""What a diagnosis reports of a model."""

import dataclasses
from typing import TYPE_CHECKING, Any

from implicit.diagnostics.causes import Cause
from implicit.diagnostics.layer_report import LayerReport, complex_text, largest, leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The reports of all implicit layers of a model, by name. ``print`` shows them as a table.

    Attributes:
        layers: The reports; layers that made no solve are not among them.
        silent: The names of the layers that made no solve.
    """

    layers: dict[str, LayerReport]
    silent: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong with any layer."""
        return not any(layer.findings for layer in self.layers.values())

    @property
    def causes(self) -> tuple[Cause, ...]:
        """The causes found in any layer, each once."""
        return tuple(dict.fromkeys(cause for layer in self.layers.values() for cause in layer.causes))

    def __str__(self) -> str:
        return "\n".join([_table(list(self.layers.values())), "", *_details(self)])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries that JSON can hold; NaN and infinity are None."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return {"healthy": self.healthy, "layers": layers, "silent": list(self.silent)}

    def plot(self, *names: str) -> "Figure":
        """Plot residuals per sample, eigenvalues in the complex plane and the steps, one row per layer.

        Args:
            *names: The layers to show; all by default.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            KeyError: There is no report of a layer.
        """
        from implicit.diagnostics.figures import plot_layers

        unknown = [name for name in names if name not in self.layers]
        if unknown:
            raise KeyError(f"No layer {unknown[0]!r} in this diagnosis, which has {list(self.layers)}.")
        return plot_layers([self.layers[name] for name in names or self.layers])


def _details(diagnosis: Diagnosis) -> list[str]:
    lines = [str(layer) for layer in diagnosis.layers.values() if layer.findings]
    if not lines:
        lines = ["Nothing is wrong."]
    if diagnosis.silent:
        lines.append(f"No solve was made by {', '.join(map(repr, diagnosis.silent))}.")
    return lines


def _table(layers: list[LayerReport]) -> str:
    heads = (
        "layer",
        "statuses",
        "steps",
        "residual",
        "rate",
        "eigenvalue",
        "bound",
        "floor",
        "calls",
        "ms",
        "saved",
        "diagnosis",
    )
    rows = [heads, *(_cells(layer) for layer in layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    steps = layer.num_steps.double()
    return (
        layer.name,
        ", ".join(f"{count} {name}" for name, count in layer.statuses.items()),
        f"{steps.median():g}, at most {steps.max():g}" if len(steps) else "",
        f"{largest(layer.history[-1]):.1e}" if layer.history.numel() else "",
        f"{largest(layer.rate):.2g}",
        complex_text(leading(layer.eigenvalues)),
        "" if layer.lipschitz is None else f"{layer.lipschitz:.3g}",
        f"{largest(layer.precision_floor):.0e}",
        str(layer.num_evals),
        f"{1e3 * layer.seconds:.1f}",
        "" if layer.bytes_saved is None else _bytes_text(layer.bytes_saved),
        ", ".join(cause.value for cause in layer.causes) or "healthy",
    )


def _bytes_text(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
