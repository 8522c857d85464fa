"""The settings that are tried instead of those of a solve."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only, tree_structure

from implicit.diagnostics.layer_report import Proposal, largest
from implicit.diagnostics.replay import Replay, Setting
from solvers import Anderson, Auto, Broyden, Newton, NewtonKrylov, Picard, Solution, Solver
from solvers.problem import relative, rms_norm

# Solvers that are tried where that of a map fails, and that of a root.
SOLVERS: tuple[Solver, ...] = (
    Picard(),
    Picard(damping=0.5),
    Anderson(),
    Anderson(memory=10),
    Broyden(),
    Auto(),
    NewtonKrylov(),
)
SOLVERS_OF_ROOTS: tuple[Solver, ...] = (
    Newton(),
    NewtonKrylov(),
    Broyden(line_search=True),
    Auto(),
    Anderson(memory=10),
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting that was tried, and whether each sample (B,) converged."""

    setting: Setting
    solution: Solution[Any]
    converged: Tensor


class Trials:
    """Solves with other settings.

    Args:
        replay: The solve.
        solution: How it went with its own settings.
        point: (B, D) its value.
        failed: (B,) bool, the samples that failed.

    Attributes:
        made: The trials so far.
    """

    def __init__(self, replay: Replay, solution: Solution[Any], point: Tensor, failed: Tensor) -> None:
        self._replay, self._solution, self._point, self._failed = replay, solution, point, failed
        self.made: list[Trial] = []

    def make(self, setting: Setting, *, keep: bool = True) -> Trial | None:
        """Run a setting, and keep it as a possible proposal; None if there is no room for it or it does not run."""
        if not self._replay.has_room() or any(trial.setting == setting for trial in self.made if not setting.start):
            return None
        try:
            with self._replay.restored():
                solution = self._replay.run(setting)
        except Exception:  # products that the map does not support, or a start that it refuses: no cure
            return None
        converged = solution.converged.flatten().cpu()
        if len(converged) != len(self._failed):  # batch_dims=0
            converged = converged.all().expand(len(self._failed))
        trial = Trial(setting, solution, converged)
        if keep:
            self.made.append(trial)
        return trial

    def cure(self, rows: Tensor) -> bool:
        return any(bool(trial.converged[rows].all()) for trial in self.made)

    def proposal(self, rows: Tensor) -> Proposal | None:
        """Propose the setting with which most samples converge, the cheapest of these."""
        usable = [trial for trial in self.made if self._replay.allows(trial.setting.solver)]
        better = [trial for trial in usable if bool(trial.converged[rows].any())]
        if not better:
            return None
        best = max(better, key=lambda trial: (int(trial.converged.sum()), -trial.solution.num_evals))
        if int(best.converged.sum()) <= int((~self._failed).sum()) and bool(self._failed.any()):
            return None
        return Proposal(
            best.setting.written(self._replay.tested),
            int(best.converged.sum()),
            len(best.converged),
            int(best.solution.num_steps.max()),
            best.solution.num_evals,
        )

    def search(self, rows: Tensor) -> None:
        """Try other solvers, and then other starts, until every sample has an equilibrium.

        A slow solve looks as if there were none, so some of them may take ten times as many steps.
        """
        replay = self._replay
        steps = max(replay.tested.max_steps, 50)
        more = None if steps == replay.tested.max_steps else steps
        own = replay.options.solver
        for solver in SOLVERS_OF_ROOTS if replay.options.root else SOLVERS:
            if solver != own or more is not None:
                self.make(Setting(solver=None if solver == own else solver, max_steps=more))
        for patient in (own,) if replay.options.root else (Anderson(memory=10), Picard()):
            if not self.cure(rows):
                self.make(
                    Setting(
                        solver=None if patient == own else patient,
                        max_steps=10 * steps,
                        patient=not replay.options.root,
                    )
                )
        if not self.cure(rows):
            self.search_starts()

    def search_starts(self) -> None:
        for start in self._starts():
            self.make(Setting(start=start))

    def _starts(self) -> Iterator[tuple[str, Any]]:
        replay = self._replay
        start = replay.start
        first = replay.inputs[0] if replay.inputs else None
        leaves, others = tree_leaves(first), tree_leaves(replay.z0)
        alike = tree_structure(first) == tree_structure(replay.z0) and all(
            isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(leaves, others, strict=True)
        )
        of_call = replay.start_option == "z0"
        if bool((start != 0).any()):
            of_layer = "init=lambda x, *_: torch.zeros_like(x)" if alike else "z0=<zeros> in the call"
            yield "z0=torch.zeros_like(z0)" if of_call else of_layer, tree_map(torch.zeros_like, replay.z0)
        if alike:
            yield "z0=<the first input>" if of_call else "init=lambda x, *_: x", first
        if replay.options.root:
            for factor in (1.0, -3.0):
                moved = start + factor * torch.where(start == 0, 1.0, start.abs())
                text = f"z0 {'+' if factor > 0 else '-'} {abs(factor):g} * z0.abs().where(z0 != 0, 1)"
                yield f"z0={text}", tree_map_only(Tensor, torch.clone, replay.layout.unpack(moved))

    def reached_by_plain_steps(self) -> Tensor:
        """(B,) for which samples plain steps meet the tolerance, also where rounding keeps them from a digit."""
        rows = torch.zeros_like(self._failed)
        for trial in self.made:
            rows |= self._reached(trial) & (self._solver_of(trial) == Picard())
        return rows

    def _solver_of(self, trial: Trial) -> Solver:
        return trial.setting.solver or self._replay.options.solver

    def _reached(self, trial: Trial) -> Tensor:
        if self._solver_of(trial) != Picard() or trial.setting.batch_dims == 0:
            return trial.converged
        asked = self._replay.asked(rms_norm(self._replay.layout.pack(trial.solution.value)))
        return trial.converged | (_residual_of(trial.solution) <= asked)

    def equilibria(self) -> tuple[Tensor, Tensor]:
        """(B,) which samples have one, and (B, D) where, or the best point."""
        found, point = ~self._failed, self._point
        for trial in self.made:
            reached = self._reached(trial)
            new = (reached & ~found).to(point.device)
            point = torch.where(new.unsqueeze(1), self._replay.layout.pack(trial.solution.value), point)
            found = found | reached
        return found, point

    def distances(self) -> tuple[Tensor, Tensor]:
        """(T, B) each: how far apart f(z) and z are in the solve and its trials, and how large z is.

        Both in units of the larger of z and f(z) at the start.
        """
        flat, start, layout = self._replay.flat, self._replay.start, self._replay.layout
        unit = torch.maximum(rms_norm(start), rms_norm(flat(start)))
        solutions = (self._solution, *(trial.solution for trial in self.made))
        values = [layout.pack(s.value) for s in solutions if s.status.shape == self._solution.status.shape]
        apart = torch.stack([relative(rms_norm(flat(value) - value), unit) for value in values])
        sizes = torch.stack([relative(rms_norm(value), unit) for value in values])
        return apart.cpu().double().nan_to_num(nan=math.inf, posinf=math.inf), sizes.cpu().double()

    def least_residual(self, rows: Tensor) -> float:
        """Return the largest, over the samples ``rows`` (B,), of the smallest residual in any trial."""
        residuals = map(_residual_of, (self._solution, *(trial.solution for trial in self.made)))
        flat = [residual for residual in residuals if len(residual) == len(rows)]
        return largest(functools.reduce(torch.fmin, flat)[rows]) if bool(rows.any()) else math.nan

    def make_damped(self, eigenvalues: Tensor) -> None:
        """Try plain steps with the damping that makes the measured eigenvalues, and 0, smallest."""
        if not len(eigenvalues):
            return
        dampings = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        known = torch.cat([eigenvalues[~eigenvalues.isnan()], torch.zeros(1, dtype=eigenvalues.dtype)])
        rates = (1 - dampings[:, None] + dampings[:, None] * known).abs().amax(dim=1)
        rate, best = float(rates.min()), float(dampings[rates.argmin()])
        if rate < 1:
            steps = math.ceil(1.3 * math.log(1e-6) / math.log(rate)) + 10
            solver = Picard(damping=round(best, 2))
            self.make(Setting(solver=solver, max_steps=max(min(steps, 1000), self._replay.tested.max_steps)))


def _residual_of(solution: Solution[Any]) -> Tensor:
    """(B,) the relative residual on the CPU; infinite where none was measured."""
    if solution.residual is None:
        return torch.full(solution.status.shape, math.inf, dtype=torch.float64).flatten()
    return solution.residual.flatten().cpu().double().nan_to_num(nan=math.inf, posinf=math.inf)
