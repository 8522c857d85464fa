"""Statistics of all solves of a model while it trains."""

import contextlib
import csv
import dataclasses
import math
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from implicit.autograd.torch_internals import transform_active
from implicit.diagnostics.on_its_way import OnItsWay
from implicit.diagnostics.solve_hook import SolveNames, observed_solves
from solvers import ConvergenceWarning, Solution, Status
from solvers.problem.hyperparameters import checked_int

# The steps that make a layer's baseline, and the latest ones that are compared with it.
WINDOW = 20


@dataclasses.dataclass(frozen=True)
class SolveStatistics:
    """The solves of one layer in one training step.

    Attributes:
        samples: The number of samples.
        converged: The part of the samples whose solve did not fail.
        mean_steps: The mean number of steps.
        max_steps: The largest.
        worst_residual: The largest relative residual; NaN where none was computed (a fixed number of steps).
        calls: Calls of the map.
    """

    samples: float
    converged: float
    mean_steps: float
    max_steps: float
    worst_residual: float
    calls: float

    @classmethod
    def of(cls, rows: list[list[float]]) -> "SolveStatistics":
        """The statistics of several solves, of rows as :func:`_row` makes them."""
        samples, failed, steps, most, residual, calls = zip(*rows, strict=True)
        total = max(sum(samples), 1.0)
        return cls(
            samples=sum(samples),
            converged=1 - sum(failed) / total,
            mean_steps=sum(steps) / total,
            max_steps=max(most),
            worst_residual=max(residual) if not any(map(math.isnan, residual)) else math.nan,
            calls=sum(calls),
        )


HEADER = ["step", "layer", *(field.name for field in dataclasses.fields(SolveStatistics))]


class SolveMonitor:
    """What :func:`monitor_solves` gives: call ``step()`` after each training step.

    Attributes:
        latest: The latest statistics of each layer that have arrived.
        degraded: For each layer whose solves have become worse, what changed.
    """

    def __init__(self, names: SolveNames, tracker: Any, file: TextIO | None, every: int, start: int) -> None:
        self.latest: dict[str, SolveStatistics] = {}
        self.degraded: dict[str, str] = {}
        self._names = names
        self._tracker, self._file, self._every, self._step = tracker, file, every, start
        self._writer = None if file is None else csv.writer(file)
        self._running: dict[str, list[OnItsWay]] = {}
        self._waiting: tuple[int, dict[str, list[OnItsWay]]] | None = None
        self._baselines: dict[str, list[SolveStatistics]] = {}
        self._recent: dict[str, list[SolveStatistics]] = {}

    def step(self, number: int | None = None) -> None:
        """End a training step; reads and records the statistics of the step before it, which have arrived by now.

        Args:
            number: The number of the step that ends, for the records; by default they are counted from ``start``.

        Raises:
            ValueError: The model has no implicit layer, and has not made a solve so far.
        """
        if not self._names.layers:
            self._names.require_solves()
        if number is not None:
            self._step = number
        self._read()
        self._waiting, self._running = (self._step, self._running), {}
        self._step += 1

    def skip(self) -> None:
        """Forget the solves since the last step, which belong to no training step, such as those of a test."""
        self._running = {}

    def flush(self) -> None:
        """Read and record everything that is still on its way, which may wait for the device."""
        self._read()
        if self._running:
            self._waiting, self._running = (self._step, self._running), {}
            self._read()

    def _record(self, name: str, solution: Solution[Any]) -> None:
        if not transform_active():
            self._running.setdefault(name, []).append(OnItsWay(_row(solution)))

    def _read(self) -> None:
        if self._waiting is None:
            return
        step, solves = self._waiting
        self._waiting = None
        for name, arriving in solves.items():
            found = SolveStatistics.of([row.arrived() for row in arriving])
            self.latest[name] = found
            if step % self._every == 0:
                self._write(step, name, found)
            self._compare(step, name, found)

    def _write(self, step: int, name: str, found: SolveStatistics) -> None:
        values = dataclasses.asdict(found)
        if self._writer is not None and self._file is not None:
            self._writer.writerow((step, name, *(f"{value:.10g}" for value in values.values())))
            self._file.flush()
        if self._tracker is None:
            return
        tags = {f"solves/{name or 'model'}/{key}": v for key, v in values.items() if not math.isnan(v)}
        if hasattr(self._tracker, "add_scalar"):
            for tag, value in tags.items():
                self._tracker.add_scalar(tag, value, step)
        else:
            self._tracker.log(tags, step=step)

    def _compare(self, step: int, name: str, found: SolveStatistics) -> None:
        baseline = self._baselines.setdefault(name, [])
        if len(baseline) < WINDOW:
            baseline.append(found)
            return
        recent = self._recent.setdefault(name, [])
        recent.append(found)
        if len(recent) < WINDOW:
            return
        changes = _changes(baseline, recent)
        if not changes and _mean(recent, "mean_steps") < _mean(baseline, "mean_steps"):
            self._baselines[name] = list(recent)
        recent.pop(0)
        if changes and name not in self.degraded:
            self.degraded[name] = changes
            warnings.warn(
                f"The solves of {name or 'the model'!r} have become worse in the {WINDOW} steps up to step {step}: "
                f"{changes}. implicit.diagnose(model, *inputs) finds the cause.",
                ConvergenceWarning,
                stacklevel=4,
            )


@contextlib.contextmanager
def monitor_solves(
    model: nn.Module, *, tracker: Any = None, csv_file: str | Path | None = None, every: int = 1, start: int = 0
) -> Iterator[SolveMonitor]:
    """Within the context, record statistics of every solve that a model makes, without waiting for them.

    These are the solves of its implicit layers, and the calls of :func:`implicit.fixed_point` and
    :func:`implicit.root` in its methods, by names such as ``"head: root of kepler"``.

    The statistics of a solve are a few numbers that stay on the device and are copied to the host in the background;
    :meth:`SolveMonitor.step` reads those of the training step before. So training never waits for them. Residuals of
    solves of a fixed number of steps are not computed. Solves inside a graph of ``torch.compile``, under a transform of
    ``torch.func`` and in other threads are not seen.

    A layer whose solves become worse is reported by one :class:`solvers.ConvergenceWarning` that says what changed:
    over twenty steps, beside the best twenty so far, a tenth more samples fail, half as many steps more are taken, or
    the worst residual is ten times as large.

    Args:
        model: A model with implicit layers or calls of ``fixed_point`` and ``root``.
        tracker: A ``torch.utils.tensorboard.SummaryWriter``, an ``accelerate.Accelerator`` or one of its trackers;
            anything with ``add_scalar(tag, value, step)`` or ``log(values, step=...)``.
        csv_file: A file to write, with a line for each layer and training step. One that holds something other than
            such lines is left as it is.
        every: Record those training steps whose number is a multiple of it.
        start: Number of the first training step. If it is above 0, a run goes on: ``csv_file`` keeps its lines of the
            steps before.

    Yields:
        The :class:`SolveMonitor`.

    Raises:
        TypeError, ValueError: The model is none, or an option is invalid.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, monitor_solves
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x)
        >>> with monitor_solves(layer) as monitor:
        ...     for _ in range(3):
        ...         _ = layer(torch.ones(2, 3))
        ...         monitor.step()
        >>> monitor.latest[""].converged
        1.0
    """
    if tracker is not None and not (hasattr(tracker, "add_scalar") or hasattr(tracker, "log")):
        raise TypeError(
            "tracker must be a SummaryWriter or a tracker of accelerate, with a method add_scalar or log; got "
            f"{tracker!r}."
        )
    every, start = checked_int("every", every), checked_int("start", start, least=0)
    names = SolveNames(model)
    with contextlib.ExitStack() as stack:
        file = None
        if csv_file is not None:
            lines = [HEADER, *_lines_before(start, Path(csv_file))]
            file = stack.enter_context(open(csv_file, "w", newline="", encoding="utf-8"))
            csv.writer(file).writerows(lines)
        monitor = SolveMonitor(names, tracker, file, every, start)
        stack.enter_context(observed_solves(names, monitor._record))
        try:
            yield monitor
        finally:
            monitor.flush()


def _lines_before(start: int, path: Path) -> list[list[str]]:
    """The lines of the training steps before ``start`` in a file, without one that was cut off by a kill."""
    if not path.is_file():  # it may be something that is written to, such as /dev/null
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = [*csv.reader(file)] or [HEADER]
    except (UnicodeDecodeError, csv.Error):
        header, rows = [], []
    if header != [*HEADER]:
        raise ValueError(f"{path} holds something other than the lines of monitor_solves; give another csv_file.")
    return [row for row in rows if len(row) == len(HEADER) and row[0].isdecimal() and int(row[0]) < start]


@torch.no_grad()
def _row(solution: Solution[Any]) -> Tensor:
    """Samples, failed samples, the sum of steps, the largest, the worst residual, calls: (6,) on the device."""
    steps = solution.num_steps.flatten().float()
    residual = solution.residual
    if residual is None:
        worst = steps.new_full((), math.nan)  # filled on the device; a number would be copied there
    else:
        worst = residual.detach().flatten().float().nan_to_num(nan=math.inf, posinf=math.inf)
        worst = worst.amax() if worst.numel() else steps.new_zeros(())
    failed = ((solution.status != Status.CONVERGED) & (solution.status != Status.UNTESTED)).sum().float()
    most = steps.amax() if steps.numel() else steps.new_zeros(())
    count, calls = (torch.full_like(failed, float(n)) for n in (steps.numel(), solution.num_evals))
    return torch.stack((count, failed, steps.sum(), most, worst, calls))


def _mean(found: list[SolveStatistics], name: str) -> float:
    values = [value for one in found if not math.isnan(value := getattr(one, name))]
    return statistics.fmean(values) if values else math.nan


def _changes(before: list[SolveStatistics], now: list[SolveStatistics]) -> str:
    """What has become worse, in words; empty if nothing has."""

    def pair(name: str) -> tuple[float, float]:
        return _mean(before, name), _mean(now, name)

    changes = []
    (old, new), (old_steps, new_steps) = pair("converged"), pair("mean_steps")
    if new < old - 0.1:
        changes.append(f"{new:.0%} of the samples converge instead of {old:.0%}")
    if new_steps > 1.5 * old_steps + 1:
        changes.append(f"{new_steps:.1f} steps on average instead of {old_steps:.1f}")
    middle = [statistics.median(one.worst_residual for one in found) for found in (before, now)]
    if middle[1] > 10 * middle[0] and middle[1] > 1e-6:
        changes.append(f"a worst residual of {middle[1]:.1e} instead of {middle[0]:.1e}")
    if changes and pair("samples")[0] != pair("samples")[1]:
        changes.append("with {1:g} samples per step instead of {0:g}".format(*pair("samples")))
    return ", ".join(changes)
