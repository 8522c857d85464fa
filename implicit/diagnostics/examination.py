"""The examination of one solve: what is wrong, by which evidence, and which setting cures it."""

import abc
import math
from typing import Any

import torch
from torch import Tensor

from implicit.diagnostics.causes import Cause
from implicit.diagnostics.layer_report import Finding, Proposal, largest
from implicit.diagnostics.map_check import MapProblem, map_problems
from implicit.diagnostics.measurements import OWN_ROUNDING, FlatMapping, Spectrum, leading_eigenvalues, precision_floor
from implicit.diagnostics.replay import Replay, Setting, evaluating
from implicit.diagnostics.trials import Trials
from solvers import Auto, Solution, Status
from solvers.problem import relative, rms_norm

# A residual of at most this many times the rounding in the map gets no smaller.
AT_FLOOR = 30
# A residual that is smaller by less than this factor after all steps has not become smaller.
NO_PROGRESS = 0.999
# The relative error from which a tolerance is too loose.
LOOSE = 0.02


class Examination(abc.ABC):
    """Finds the causes for one solve. Per-sample values are on the CPU.

    Args:
        replay: The solve.
        solution: How it went.
        lost: (B,) bool, the samples for which the map returned NaN or infinity on the way.
        seed: For the random directions.

    Attributes:
        findings: The findings.
        proposal: The setting to use instead.
        advice: What else can be done.
        spectrum: Of the Jacobian at the solution or the best point.
        floor: (B,) the relative rounding in the map.
    """

    # What is solved, in words, and what rounding in it does.
    called = "The map"
    rounding = "rounding in the map is {floor:.0e} of its result"

    spectrum: Spectrum

    def __init__(self, replay: Replay, solution: Solution[Any], lost: Tensor, seed: int = 0) -> None:
        self._replay, self._solution = replay, solution
        self._generator = torch.Generator().manual_seed(seed)
        value = replay.layout.pack(solution.value)
        self._point = torch.where(value.isfinite().all(dim=1, keepdim=True), value, replay.start)
        self._map = self._map_at(self._point)
        self._size = torch.maximum(rms_norm(self._point), rms_norm(self._map(self._point)))
        self._status = solution.status.flatten().cpu()
        self._lost = lost.cpu()
        self._failed = solution.failed.flatten().cpu() | self._is_not_falling()
        self._left = self._failed.clone()
        self._trials = Trials(replay, solution, self._point, self._failed)
        self.findings: list[Finding] = []
        self.proposal: Proposal | None = None
        self.advice = ""
        if not self._point.numel():
            self.floor = torch.full(self._status.shape, math.nan, dtype=torch.float64)
            self.spectrum = Spectrum.unknown(len(self._point))
            return
        self.floor = precision_floor(self._map, self._point, self._generator).cpu().double()
        if self._map_is_unfit():
            self._measure(self._point)
        elif bool(self._failed.any()):
            self._find_not_finite()
            self._find_floor()
            self._explain_failures()
            self.proposal = self._trials.proposal(self._failed)
        else:
            self._measure(self._point)
            self._check_accuracy()
            self._check_success()
        self.findings.sort(key=lambda finding: -finding.num_samples)
        self.advice = next((f.cause.advice for f in self.findings if f.cause.advice), "")

    @abc.abstractmethod
    def _map_at(self, point: Tensor) -> FlatMapping:
        """Return the flat map that has the solution as a fixed point, as it is best measured near ``point`` (B, D)."""

    @abc.abstractmethod
    def _explain_failures(self) -> None:
        """Find the causes for the samples that are left."""

    @abc.abstractmethod
    def _check_success(self) -> None:
        """Find what is wrong with a solve that has not failed."""

    def _is_not_falling(self) -> Tensor:
        """(B,) whether the steps of an untested solve have not brought f(z) and z, or F and zero, closer together."""
        replay, history = self._replay, self._solution.history
        if history is None or len(history) < 2 or self._status.ne(Status.UNTESTED).any():
            return torch.zeros_like(self._status, dtype=torch.bool)
        changes = [replay.flat(z) - (0.0 if replay.options.root else z) for z in (replay.start, self._point)]
        first, last = map(rms_norm, changes)
        return ~(last < NO_PROGRESS * first).cpu() & ~(history[-1].flatten().cpu() < 1e-3)

    def _add(self, cause: Cause, rows: Tensor, evidence: str, modules: tuple[str, ...] = ()) -> None:
        rows = rows & self._left if self._failed.any() else rows
        if bool(rows.any()):
            self.findings.append(Finding(cause, int(rows.sum()), evidence, modules))
            self._left &= ~rows

    def _measure(self, point: Tensor) -> None:
        self.spectrum = leading_eigenvalues(self._replay.flat, point, self._generator)

    def _problems(self) -> list[MapProblem]:
        replay = self._replay
        return map_problems(replay.f, replay.layout.unpack(self._point), replay.inputs, replay.options.batch_dims)

    def _map_is_unfit(self) -> bool:
        problems = self._problems()
        mixing = {name for problem in problems if problem.mixes for name in problem.modules}
        # Batch normalization in training mode also changes its buffers, which changes nothing that it returns.
        problems = [problem for problem in problems if problem.mixes or not mixing & problem.modules.keys()]
        everything = torch.ones_like(self._failed)
        for problem in problems:
            cause = Cause.SAMPLES_MIX if problem.mixes else Cause.MAP_CHANGES
            self.findings.append(Finding(cause, len(everything), problem.message, tuple(problem.modules)))
        modules = {name: module for problem in problems for name, module in problem.modules.items() if module.training}
        with evaluating(modules.values()):
            cured = bool(modules) and not self._problems()
        if cured:
            self._trials.make(Setting(evaluating=tuple(modules.items())))
        if any(problem.mixes for problem in problems) and not self._trials.cure(everything):
            self._trials.make(Setting(batch_dims=0))
            self._trials.make(Setting(batch_dims=0, solver=Auto()))
        if problems:
            self.proposal = self._trials.proposal(everything)
        return bool(problems)

    def _find_not_finite(self) -> None:
        finite = self._replay.flat(self._replay.start).isfinite().all(dim=1).cpu()
        self._add(Cause.NOT_FINITE, ~finite, f"{self.called} at the start is not finite.")

    def _find_floor(self) -> None:
        replay, residual = self._replay, self._solution.residual
        if residual is None:
            return
        residual = residual.flatten().cpu().double()
        # Rounding is a property of the map, which shows in some samples by chance more than in others.
        floor = largest(self.floor)
        at_floor = (self._status == Status.PRECISION_FLOOR) | (residual <= AT_FLOOR * floor)
        at_floor |= (self._status == Status.STAGNATED) & (residual <= 4 * AT_FLOOR * floor)
        eps = torch.finfo(replay.layout.dtype).eps
        rows = at_floor & (replay.asked(self._size) < residual) & self._left
        if not bool(rows.any()):
            return
        worst = largest(residual[rows])
        evidence = (
            f"The residual stays at {worst:.1e}; {self.rounding.format(floor=floor)}, "
            f"that of {replay.layout.dtype} {eps:.0e}, and the tolerance asks for "
            f"{float(replay.asked(self._size)[rows].min()):.0e}."
        )
        # An iterate that has run away also has a small residual. It does not converge to a looser tolerance either.
        trial = None if replay.rtol is None else self._trials.make(Setting(rtol=_rounded_up(3 * worst)))
        rows = rows if trial is None else rows & trial.converged
        own = floor <= OWN_ROUNDING * eps
        self._add(Cause.TOLERANCE_TOO_TIGHT if own else Cause.PRECISION_FLOOR, rows, evidence)

    def _check_accuracy(self) -> None:
        replay = self._replay
        rtol = replay.rtol
        if rtol is None or rtol == 0.0 or not bool((self._status == Status.CONVERGED).all()):
            return
        tight = max(1e-3 * rtol, 4 * float(self.floor.max()), 8 * torch.finfo(replay.layout.dtype).eps)
        if tight > 0.3 * rtol:
            return
        trial = self._trials.make(Setting(rtol=_rounded_up(tight), max_steps=4 * replay.tested.max_steps))
        if trial is None:
            return
        value = replay.layout.pack(trial.solution.value)
        error = relative(rms_norm(value - self._point), torch.maximum(rms_norm(value), rms_norm(replay.start))).cpu()
        rows = trial.converged & (error > LOOSE)
        evidence = f"With rtol={trial.setting.rtol:g} the value changes by {largest(error):.1%} of its size."
        self._add(Cause.TOLERANCE_TOO_LOOSE, rows, evidence)
        if bool(rows.any()):
            self.proposal = self._trials.proposal(rows)


def _rounded_up(value: float) -> float:
    """The next larger number with one digit."""
    digits = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / digits - 1e-9) * digits:.0e}")
