"""What was to be reached, beside what was measured."""

import dataclasses
from collections.abc import Callable, Sequence

from benchmarks.on_gpu import models, pipeline, training_run
from benchmarks.on_gpu.cells import Row
from benchmarks.on_gpu.steps import EAGER, WAYS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """A number, what it should be at least or at most, and where it comes from; None is not measured."""

    name: str
    wanted: str
    measured: float | None
    met: bool | None
    how: str = ""


def goals(rows: Sequence[Row]) -> list[Goal]:
    """All goals; those that a run has not measured too."""
    measured = [row for row in rows if row.outcome == "ok"]
    return [
        *(_faster_than_published(measured, n_iter, ways) for n_iter in (2, 4) for ways in ((EAGER,), WAYS)),
        _share_of_step(measured),
        _mfu(measured),
        _memory(measured),
        *(_pipeline(measured, kind) for kind in pipeline.FILES),
    ]


def _training(rows: Sequence[Row], **labels: object) -> list[Row]:
    """The rows of training S in bf16 with these labels."""
    wanted = {"size": "S", "precision": "bf16", **labels}
    return [
        row
        for row in rows
        if row.cell.table == models.TRAINING and all(row.cell.labels[name] == value for name, value in wanted.items())
    ]


def _best(rows: Sequence[Row], value: str) -> Row | None:
    return max(rows, key=lambda row: row.values[value], default=None)


def _goal(name: str, wanted: str, found: float | None, holds: Callable[[float], bool], how: str) -> Goal:
    met = None if found is None else holds(found)
    return Goal(name=name, wanted=wanted, measured=found, met=met, how="" if found is None else how)


def _faster_than_published(rows: Sequence[Row], n_iter: int, ways: Sequence[str]) -> Goal:
    """Both eager, or each in the fastest way that was measured."""
    found = [row for row in _training(rows, n_iter=n_iter) if row.cell.labels["way"] in ways]
    ours = _best([row for row in found if row.cell.labels["backward"] == "unrolled" and _is(row, "iMixer")], "images/s")
    theirs = _best([row for row in found if _is(row, "published")], "images/s")
    ratio, how = None, ""
    if ours and theirs:
        ratio = ours.values["images/s"] / theirs.values["images/s"]
        how = ", ".join(f"{row.values['images/s']:.0f} {row.cell.labels['way']}" for row in (ours, theirs))
    least, which = (1, "both eager") if len(ways) == 1 else (2, "each in its fastest way")
    name = f"training images/s, iMixer-S over the published code, n_iter {n_iter}, {which}"
    return _goal(name, f"at least {least}", ratio, lambda ratio: ratio >= least, how)


def _share_of_step(rows: Sequence[Row]) -> Goal:
    best = _best([row for row in rows if row.cell.table == training_run.TABLE], "images/s of train()")
    found, how = (best.values["share %"], best.cell.labels["way"]) if best else (None, "")
    return _goal("images/s of train() over the bare step, %", "at least 90", found, lambda share: share >= 90, how)


def _is(row: Row, model: str) -> bool:
    return bool(row.cell.labels["model"] == model)


def _mfu(rows: Sequence[Row]) -> Goal:
    best = _best(_training(rows, model="iMixer"), "MFU %")
    how = f"n_iter {best.cell.labels['n_iter']}, {best.cell.labels['way']}" if best else ""
    found = best.values["MFU %"] if best else None
    return _goal("MFU of iMixer-S in bf16, %", "at least 40", found, lambda mfu: mfu >= 40, how)


def _memory(rows: Sequence[Row]) -> Goal:
    peaks = {row.cell.labels["n_iter"]: row.values["peak GiB"] for row in rows if row.cell.table == models.MEMORY}
    ratio = peaks[16] / peaks[1] if peaks.keys() >= {1, 16} else None
    return _goal("peak memory under Implicit, n_iter 16 over 1", "at most 1.1", ratio, lambda ratio: ratio <= 1.1, "")


def _pipeline(rows: Sequence[Row], kind: str) -> Goal:
    feeding = [row for row in rows if row.cell.table == pipeline.TABLE and row.cell.labels["images"] == kind]
    supply, demand = _best(feeding, "images/s"), _best(_training(rows, model="iMixer"), "images/s")
    ratio, how = None, ""
    if supply and demand:
        ratio = supply.values["images/s"] / demand.values["images/s"]
        labels = supply.cell.labels
        how = f"{labels['workers']} workers, augmented on {labels['augmented on']}"
        how += f"; {demand.values['images/s']:.0f} images/s wanted"
    name = f"images/s of the pipeline over those of training, {kind}"
    return _goal(name, "at least 1", ratio, lambda ratio: ratio >= 1, how)


def markdown(found: Sequence[Goal]) -> str:
    """The table of goals."""
    verdicts = {None: "not measured", True: "yes", False: "NO"}
    lines = ["| goal | wanted | measured | met | how |", "| --- | --- | ---: | --- | --- |"]
    for goal in found:
        measured = "" if goal.measured is None else f"{goal.measured:.3g}"
        lines.append(f"| {goal.name} | {goal.wanted} | {measured} | {verdicts[goal.met]} | {goal.how} |")
    return "## Goals\n\n" + "\n".join(lines) + "\n"
