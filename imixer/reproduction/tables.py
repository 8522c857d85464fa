"""The table of an experiment, for a terminal, a page and a spreadsheet."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imixer.reproduction.experiments import Experiment
from imixer.reproduction.results import ArmResults
from imixer.reproduction.statistics import Estimate, estimate, paired_difference

MIN_PAIRS = 3  # seeds without which no difference is called better or worse


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text, and its numbers.

    Args:
        header: Names of the columns.
        rows: Cells as people read them.
        records: A dictionary of plain numbers for each row, for a CSV file.
    """

    header: list[str]
    rows: list[list[str]]
    records: list[dict[str, Any]]

    def text(self) -> str:
        """The table in columns of equal width."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.header, ["-" * width for width in widths], *self.rows]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def csv(self) -> str:
        """The numbers as a CSV file."""
        content = io.StringIO()
        writer = csv.DictWriter(content, list(dict.fromkeys(k for record in self.records for k in record)), restval="")
        writer.writeheader()
        writer.writerows(self.records)
        return content.getvalue()


def make_table(experiment: Experiment, results: Sequence[ArmResults]) -> Table:
    """The table of an experiment from the trials that are complete.

    Differences from the baseline are paired by seed. A difference is called better or worse only where its 95% interval
    excludes 0; see :func:`verdict`. Intervals are per row, and not corrected for the number of rows.

    Args:
        experiment: The experiment.
        results: Results of its arms, in their order.
    """
    by_labels = {_key(result.arm.labels): result for result in results}
    published = any(result.arm.published is not None for result in results)
    extra_columns = [column for name in experiment.measurements for column in EXTRA_COLUMNS.get(name, _none)(results)]
    header = [*results[0].arm.labels, "seeds", "top-1 %", "deviation", "95% interval", "minus baseline", "95% interval"]
    header += [*(["published %"] if published else []), *(name for name, _, _ in extra_columns), "seconds"]
    rows, records = [], []
    for result in results:
        arm, top1 = result.arm, result.top1
        mean = estimate(list(top1.values())) if top1 else None
        difference = None
        if arm.baseline is not None and top1:
            difference = paired_difference(top1, by_labels[_key(arm.baseline)].top1)
        seconds = estimate(list(result.seconds.values())).mean if top1 else math.nan
        extras = {name: _mean(values(result)) for name, values, _ in extra_columns}
        cells = [*arm.labels.values(), _seeds(result), *_mean_cells(mean)]
        cells += ["baseline", ""] if arm.baseline is None else _difference_cells(difference)
        if published:
            cells.append("" if arm.published is None else f"{arm.published:.2f}")
        cells += [_formatted(extras[name], form) for name, _, form in extra_columns]
        rows.append([*cells, _formatted(seconds, ".0f")])
        records.append(
            {
                **arm.labels,
                **_record("top1", mean),
                **_record("difference", difference),
                "published": arm.published,
                **extras,
                "seconds": seconds,
                "failed": len(result.failures),
                "pending": len(result.pending),
            }
        )
    return Table(header=header, rows=rows, records=records)


def verdict(difference: Estimate) -> str:
    """What an interval says: "better", "worse", or nothing.

    Differences of two seeds say nothing, and equal ones neither: accuracies are multiples of one image, and where a few
    agree by chance, the interval has no width.
    """
    if difference.count < MIN_PAIRS or difference.deviation == 0 or not difference.excludes_zero:
        return ""
    return "better" if difference.mean > 0 else "worse"


Values = Callable[[ArmResults], list[float]]
Column = tuple[str, Values, str]


def _step_columns(results: Sequence[ArmResults]) -> list[Column]:
    def at(point: str, name: str, scale: float = 1.0) -> Values:
        return lambda result: [
            row[name] * scale
            for measured in result.measured["step"].values()
            for row in measured["points"]
            if row["point"] == point and row[name] is not None
        ]

    return [
        ("ms/step", at("after", "seconds", 1e3), ".1f"),
        ("calls", at("after", "calls"), ".1f"),
        ("products", at("after", "products"), ".1f"),
        ("MiB saved", at("after", "bytes_saved", 2**-20), ".1f"),
        *((f"cosine {point}", at(point, "cosine"), ".6f") for point in ("before", "during", "after")),
    ]


def _inference_columns(results: Sequence[ArmResults]) -> list[Column]:
    steps = {step: None for r in results for m in r.measured["inference-steps"].values() for step in m["top1"]}

    def at(step: str) -> Values:
        return lambda result: [
            m["top1"][step] for m in result.measured["inference-steps"].values() if step in m["top1"]
        ]

    return [(f"k={step}" if step.isdigit() else step, at(step), ".2f") for step in steps]


def _certificate_columns(results: Sequence[ArmResults]) -> list[Column]:
    def at(name: str) -> Values:
        return lambda result: [m[name] for m in result.measured["certificate"].values() if m[name] is not None]

    def deviation(name: str) -> Values:
        return lambda result: [estimate(values).deviation] if (values := at(name)(result)) else []

    return [
        (f"{what} {name}", values(name), ".3f")
        for name in ("bound", "rate")
        for what, values in (("mean", at), ("deviation of", deviation))
    ]


def _none(results: Sequence[ArmResults]) -> list[Column]:
    return []


EXTRA_COLUMNS: dict[str, Callable[[Sequence[ArmResults]], list[Column]]] = {
    "step": _step_columns,
    "inference-steps": _inference_columns,
    "certificate": _certificate_columns,
}


def _key(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _seeds(result: ArmResults) -> str:
    notes = [f"{len(result.failures)} failed"] if result.failures else []
    notes += [f"{len(result.pending)} to come"] if result.pending else []
    return f"{len(result.top1)}" + (f" ({', '.join(notes)})" if notes else "")


def _mean_cells(mean: Estimate | None) -> list[str]:
    if mean is None:
        return ["-", "-", "-"]
    return [f"{mean.mean:.2f}", _formatted(mean.deviation, ".2f"), _interval(mean)]


def _difference_cells(difference: Estimate | None) -> list[str]:
    if difference is None:
        return ["-", "-"]
    said = verdict(difference)
    interval = _interval(difference, sign="+") + f" (n={difference.count})" + (f" {said}" if said else "")
    return [f"{round(difference.mean, 2) + 0.0:+.2f}", interval]  # + 0.0, for no -0.00


def _interval(value: Estimate, sign: str = "") -> str:
    return "-" if math.isnan(value.low) else f"{value.low:{sign}.2f} to {value.high:{sign}.2f}"


def _formatted(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _record(name: str, value: Estimate | None) -> dict[str, Any]:
    fields = ("mean", "deviation", "low", "high", "count")
    if value is None:
        return {f"{name}_{field}": 0 if field == "count" else None for field in fields}
    return {f"{name}_{field}": getattr(value, field) for field in fields}
