"""The examination of one solve: what is wrong, by which evidence, and which setting cures it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from implicit.diagnostics.causes import Cause
from implicit.diagnostics.layer_report import Finding, Proposal, complex_text, largest
from implicit.diagnostics.map_check import map_problems
from implicit.diagnostics.measurements import PlainSteps, Spectrum, leading_eigenvalues, plain_steps, precision_floor
from implicit.diagnostics.replay import Replay, Setting
from implicit.diagnostics.trials import Trials
from solvers import Anderson, Auto, Broyden, Picard, Solution, Status
from solvers.problem import relative, rms_norm

# A residual of at most this many times the rounding in the map gets no smaller.
AT_FLOOR = 30
# Rounding of at most this many units of the dtype is the dtype's own.
OWN_ROUNDING = 64
# The largest norm of a power of a contracting Jacobian from which its transient counts as the cause.
GROWTH = 10
# A contraction of at most this rate is a good one.
GOOD_RATE = 0.8
# The relative error from which a tolerance is too loose, and the distance that makes two equilibria.
LOOSE, APART = 0.02, 0.05
# A solve that converges is slow from so many steps on.
MANY_STEPS = 100
# Plain steps that lead away from an equilibrium that repels.
PLAIN = 20


class Examination:
    """Finds the causes for one solve of a layer. Per-sample values are on the CPU.

    Args:
        replay: The solve.
        solution: How it went.
        lost: (B,) bool, the samples for which the map returned NaN or infinity on the way.
        seed: For the random directions.

    Attributes:
        findings: The findings.
        proposal: The setting to use instead.
        advice: What else can be done.
        spectrum: Of the Jacobian at the equilibrium or the best point.
        floor: (B,) the relative rounding in the map.
    """

    spectrum: Spectrum

    def __init__(self, replay: Replay, solution: Solution[Any], lost: Tensor, seed: int = 0) -> None:
        self._replay, self._solution = replay, solution
        self._generator = torch.Generator().manual_seed(seed)
        value = replay.layout.pack(solution.value)
        self._point = torch.where(value.isfinite().all(dim=1, keepdim=True), value, replay.start)
        self._size = torch.maximum(rms_norm(self._point), rms_norm(replay.flat(self._point)))
        self._status = solution.status.flatten().cpu()
        self._lost = lost.cpu()
        self._failed = solution.failed.flatten().cpu() | self._is_not_falling()
        self._left = self._failed.clone()
        self._trials = Trials(replay, solution, self._point, self._failed)
        self.findings: list[Finding] = []
        self.proposal: Proposal | None = None
        self.floor = precision_floor(replay.flat, self._point, self._generator).cpu().double()
        self._find()
        self.advice = next((f.cause.advice for f in self.findings if f.cause.advice), "")

    def _is_not_falling(self) -> Tensor:
        """(B,) whether the residual of an untested solve is larger at its end than at its beginning."""
        history = self._solution.history
        if history is None or len(history) < 2 or self._status.ne(Status.UNTESTED).any():
            return torch.zeros_like(self._status, dtype=torch.bool)
        history = history.reshape(len(history), -1).cpu()
        return ~(history[-1] <= history[0]) & ~(history[-1] < 1e-3)

    def _find(self) -> None:
        if self._map_is_unfit():
            self._measure(self._point)
        elif bool(self._failed.any()):
            self._explain_failures()
        else:
            self._measure(self._point)
            if not len(self._failed):
                return
            self._check_accuracy()
            self._check_other_starts()
            self._check_speed()
        self.findings.sort(key=lambda finding: -finding.num_samples)

    def _add(self, cause: Cause, rows: Tensor, evidence: str, modules: tuple[str, ...] = ()) -> None:
        rows = rows & self._left if self._failed.any() else rows
        if bool(rows.any()):
            self.findings.append(Finding(cause, int(rows.sum()), evidence, modules))
            self._left &= ~rows

    def _measure(self, point: Tensor) -> None:
        self.spectrum = leading_eigenvalues(self._replay.flat, point, self._generator)

    # The map itself.

    def _map_is_unfit(self) -> bool:
        replay = self._replay
        problems = map_problems(replay.f, replay.layout.unpack(self._point), replay.inputs, replay.layer.batch_dims)
        mixing = {name for problem in problems if problem.mixes for name in problem.modules}
        # Batch normalization in training mode also changes its buffers, which changes nothing that it returns.
        problems = [problem for problem in problems if problem.mixes or not mixing & problem.modules.keys()]
        everything = torch.ones_like(self._failed)
        for problem in problems:
            cause = Cause.SAMPLES_MIX if problem.mixes else Cause.MAP_CHANGES
            self.findings.append(Finding(cause, len(everything), problem.message, tuple(problem.modules)))
        modules = {name: module for problem in problems for name, module in problem.modules.items() if module.training}
        if modules:
            self._trials.make(Setting(evaluating=tuple(modules.items())))
        if any(problem.mixes for problem in problems) and not self._trials.cure(everything):
            self._trials.make(Setting(batch_dims=0))
            self._trials.make(Setting(batch_dims=0, solver=Auto()))
        if problems:
            self.proposal = self._trials.proposal(everything)
        return bool(problems)

    # A solve that failed.

    def _explain_failures(self) -> None:
        replay, point = self._replay, self._point
        self._add(
            Cause.NOT_FINITE,
            ~replay.flat(replay.start).isfinite().all(dim=1).cpu(),
            "The map at the start is not finite.",
        )
        self._find_floor()
        steps = replay.tested.max_steps
        if bool(self._left.any()):
            replay.num_solves += 1
            plain = plain_steps(replay.flat, replay.start, min(max(steps, 33), 100))
            self._trials.search(self._left)
            found, point = self._trials.equilibria()
            self._measure(point)
            self._find_left_domain(plain, found)
            self._find_by_spectrum(plain, found)
            self._add(
                Cause.UNKNOWN, self._left, f"The smallest residual is {self._trials.least_residual(self._left):.1e}."
            )
        else:
            if any(finding.cause is Cause.NOT_FINITE for finding in self.findings):
                self._trials.search_starts()
            self._measure(point)
        self.proposal = self._trials.proposal(self._failed)

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
            f"The residual stays at {worst:.1e}; rounding in the map is {floor:.0e} of its result, "
            f"that of {replay.layout.dtype} {eps:.0e}, and the tolerance asks for "
            f"{float(replay.asked(self._size)[rows].min()):.0e}."
        )
        # An iterate that has run away also has a small residual. It does not converge to a looser tolerance either.
        trial = None if replay.rtol is None else self._trials.make(Setting(rtol=_rounded_up(3 * worst)))
        rows = rows if trial is None else rows & trial.converged
        own = floor <= OWN_ROUNDING * eps
        self._add(Cause.TOLERANCE_TOO_TIGHT if own else Cause.PRECISION_FLOOR, rows, evidence)

    def _find_left_domain(self, plain: PlainSteps, found: Tensor) -> None:
        if self._replay.is_plain:
            return
        steps = self._replay.tested.max_steps
        picard = next((trial for trial in self._trials.made if trial.setting.solver == Picard()), None)
        reached = torch.zeros_like(found)
        if picard is not None:
            reached = picard.converged & (picard.solution.num_steps.flatten().cpu() <= steps)
        astray = self._lost | (self._status == Status.NONFINITE) | (self._status == Status.DIVERGED)
        stays = plain.finite.cpu() & (plain.ratio.cpu() <= 1.1)
        rows = reached | (astray & stays & found)
        how = "to NaN or infinity" if bool((rows & self._lost).any()) else "away"
        self._add(
            Cause.DOMAIN_LEFT,
            rows,
            f"Steps of {type(self._replay.layer.solver).__name__} lead {how}; plain steps from the same start stay "
            "finite and do not grow.",
        )

    def _find_by_spectrum(self, plain: PlainSteps, found: Tensor) -> None:
        """Tell the causes apart by the Jacobian at the equilibrium and by what plain steps do."""
        replay, values = self._replay, self.spectrum.eigenvalues
        radius = self.spectrum.radius
        steps = replay.tested.max_steps
        needed = torch.log(replay.asked(self._size).clamp(1e-16, 0.5)) / torch.log(radius.clamp(1e-16, 1 - 1e-12))
        oscillates = (values[:, 0].real < 0) | (values[:, 0].imag.abs() > 0.2 * values[:, 0].abs())
        stable, growth = found & (radius < 1), self.spectrum.growth
        # Growth that a linear map of this radius would have between the two windows of plain iteration.
        linear = radius.clamp(1.0, 1e3) ** 16
        level = plain.ratio.cpu() <= 1.02 + 0.3 * (linear - 1).clamp_max(1.0)
        cycles = plain.finite.cpu() & plain.returns.cpu() & level & (plain.ratio.cpu() > 0.7)
        damping_helps = ((values.abs() < 1) | (values.real < 1) | values.isnan()).all(dim=1)
        cycles = cycles & ~stable & (radius - 1 > 1e-3)

        def describe(rows: Tensor) -> str:
            rows = rows & self._left
            if not bool(rows.any()):
                return ""
            known = torch.where(rows, radius.nan_to_num(-1.0), -2.0)
            sample = int((known >= known.max() * (1 - 1e-4)).int().argmax())  # the first of equal ones
            where = "at the equilibrium" if bool(found[sample]) else "at the best point"
            return (
                f"The largest eigenvalue of the Jacobian {where} is {complex_text(complex(values[sample, 0]))}, of "
                f"absolute value {float(radius[sample]):.3g} (sample {sample})."
            )

        def add(cause: Cause, rows: Tensor, extra: str = "") -> None:
            self._add(cause, rows, f"{describe(rows)} {extra}".strip())

        transient = stable & (growth >= GROWTH) & (growth > 3 * radius)
        norm = largest(torch.where(transient, growth, math.nan))
        add(Cause.TRANSIENT, transient, f"Its powers grow to a norm of {norm:.2g} before they decay.")
        slow = stable & (needed > steps)
        count = largest(torch.where(slow & self._left, needed, math.nan))
        extra = f"Plain steps need about {count:.0f} steps, and max_steps is {steps}."
        add(Cause.TOO_FEW_STEPS, slow & (radius <= GOOD_RATE), extra)
        add(Cause.OSCILLATION, slow & oscillates, extra)
        add(Cause.SLOW_CONTRACTION, slow, extra)
        far = stable & self._left
        if bool(far.any()):
            self._trials.search_starts()
            distance = largest(relative(rms_norm(self._trials.equilibria()[1] - replay.start), self._size).cpu()[far])
            add(Cause.START_TOO_FAR, far, f"The start is {distance:.1e} times the size of the state away from it.")
        change = largest(plain.change.cpu()[cycles]) if bool(cycles.any()) else math.nan
        add(Cause.LIMIT_CYCLE, cycles, f"Plain steps go on changing the state by {change:.1e} of its size.")
        add(Cause.OSCILLATION, found & damping_helps)
        add(Cause.EXPANSION, found)
        self._add(
            Cause.NO_EQUILIBRIUM,
            self._left,
            f"{len(self._trials.made)} other solvers and starts were tried; the smallest residual is "
            f"{self._trials.least_residual(self._left):.1e}.",
        )
        causes = {finding.cause for finding in self.findings}
        if causes & {Cause.OSCILLATION, Cause.LIMIT_CYCLE}:
            self._trials.make_damped(values[found])
        if causes & {Cause.SLOW_CONTRACTION, Cause.OSCILLATION, Cause.TOO_FEW_STEPS} and count <= 1000:
            self._trials.make(Setting(max_steps=math.ceil(1.2 * count) + 5))

    # A solve that converged.

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

    def _check_other_starts(self) -> None:
        """Solve again from two starts that differ, and compare the values.

        The second is some plain steps away, which leave an equilibrium that repels.
        """
        replay, point, generator = self._replay, self._point, self._generator
        apart = torch.zeros_like(self._failed)
        worst = 0.0
        for steps in (0, PLAIN):
            noise = torch.rand(point.shape, generator=generator, dtype=point.dtype).to(point.device) - 0.5
            size = torch.where(replay.start == 0, 2 * rms_norm(point).unsqueeze(1), replay.start.abs())
            flat = replay.start + noise * size
            for _ in range(steps):
                image = replay.flat(flat)
                flat = torch.where(rms_norm(image).isfinite().unsqueeze(1), image, flat)
            start = tree_map_only(Tensor, torch.clone, replay.layout.unpack(flat))
            trial = self._trials.make(Setting(start=("another start", start)), keep=False)
            if trial is None or self._status.ne(Status.CONVERGED).any():
                return
            value = replay.layout.pack(trial.solution.value)
            distance = rms_norm(value - point)
            errors = [s.error_estimate for s in (self._solution, trial.solution) if s.error_estimate is not None]
            error = sum((e.flatten().nan_to_num(0.0) for e in errors), torch.zeros_like(distance))
            scale = torch.maximum(rms_norm(value), rms_norm(point))
            rows = (distance > APART * scale + 10 * error).cpu() & trial.converged
            worst = max(worst, largest(relative(distance, scale).cpu()[rows]) if bool(rows.any()) else 0.0)
            apart |= rows
        evidence = f"From another start near its own, the solve converges to a value {worst:.0%} of its size away."
        self._add(Cause.SEVERAL_EQUILIBRIA, apart, evidence)

    def _check_speed(self) -> None:
        steps = self._solution.num_steps.flatten().cpu()
        slow = (steps >= MANY_STEPS) & (self._status == Status.CONVERGED)
        if not bool(slow.any()):
            return
        for solver in (Anderson(), Broyden(), Auto()):
            self._trials.make(Setting(solver=solver))
        evals = self._solution.num_evals
        self._trials.made = [trial for trial in self._trials.made if 2 * trial.solution.num_evals <= evals]
        if self._trials.cure(slow):
            value = self.spectrum.eigenvalues[:, 0]
            pair = (value.real < 0) | (value.imag.abs() > 0.2 * value.abs())
            text = f"The solve takes up to {int(steps.max())} steps; the largest eigenvalue is {{}}."
            sample = int(torch.where(slow, self.spectrum.radius.nan_to_num(-1.0), -2.0).argmax())
            cause = Cause.OSCILLATION if bool(pair[sample]) else Cause.SLOW_CONTRACTION
            self._add(cause, slow, text.format(complex_text(complex(value[sample]))))
            self.proposal = self._trials.proposal(slow)


def _rounded_up(value: float) -> float:
    """The next larger number with one digit."""
    digits = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / digits - 1e-9) * digits:.0e}")
