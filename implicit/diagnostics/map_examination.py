"""The examination of one solve for a fixed point."""

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from implicit.diagnostics.causes import Cause
from implicit.diagnostics.examination import Examination
from implicit.diagnostics.layer_report import complex_text, largest
from implicit.diagnostics.measurements import FlatMapping, PlainSteps, plain_steps
from implicit.diagnostics.replay import Setting
from solvers import Anderson, Auto, Broyden, Picard, Status
from solvers.problem import relative, rms_norm

# The largest norm of a power of a contracting Jacobian from which its transient counts as the cause.
GROWTH = 10
# A contraction of at most this rate is a good one.
GOOD_RATE = 0.8
# The relative distance that makes two equilibria.
APART = 0.05
# A solve that converges is slow from so many steps on.
MANY_STEPS = 100
# An eigenvalue within this many rounding units of 1 counts as 1.
SINGULAR = 100
# A residual falls if half of the steps reduce it by this factor.
FALLING = 0.99
# A distance between f(z) and z that leaves open whether there is an equilibrium, if the state has not grown much, and
# the growth from which a distance says nothing.
CLOSE, FAR = 0.01, 1e3
# Plain steps that lead away from an equilibrium that repels.
PLAIN = 20


class MapExamination(Examination):
    """Finds the causes for a solve of a map, by its Jacobian at the equilibrium and by what plain steps do."""

    def _map_at(self, point: Tensor) -> FlatMapping:
        return self._replay.flat

    def _check_success(self) -> None:
        self._find_singular()
        self._check_other_starts()
        self._check_speed()

    def _explain_failures(self) -> None:
        replay, point = self._replay, self._point
        steps = replay.tested.max_steps
        if bool(self._left.any()):
            replay.num_solves += 1
            plain = plain_steps(replay.flat, replay.start, min(max(steps, 33), 100))
            self._trials.search(self._left)
            found, point = self._trials.equilibria()
            self._measure(point)
            self._find_left_domain(plain, found)
            self._find_by_spectrum(plain, found)
        else:
            if any(finding.cause is Cause.NOT_FINITE for finding in self.findings):
                self._trials.search_starts()
            self._measure(point)

    def _is_falling(self) -> Tensor:
        """(B,) whether the residual has become smaller in the second half of the steps."""
        history = self._solution.history
        if history is None:
            return torch.zeros_like(self._failed)
        history = history.reshape(len(history), -1).cpu()
        return history[-1] < FALLING * history[len(history) // 2]

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
        rows = (reached & ~self._is_falling()) | (astray & stays & found)
        how = "to NaN or infinity" if bool((rows & self._lost).any()) else "away"
        self._add(
            Cause.DOMAIN_LEFT,
            rows,
            f"Steps of {type(self._replay.options.solver).__name__} lead {how}; plain steps from the same start stay "
            "finite and do not grow.",
        )

    def _find_by_spectrum(self, plain: PlainSteps, found: Tensor) -> None:
        """Tell the causes apart by the Jacobian at the equilibrium and by what plain steps do."""
        replay, values = self._replay, self.spectrum.eigenvalues
        radius = self.spectrum.radius
        steps = replay.tested.max_steps
        damping = getattr(replay.options.solver, "damping", 1.0)
        rate = (1 - damping + damping * values).abs().nan_to_num(0.0).amax(dim=1)
        needed = torch.log(replay.asked(self._size).clamp(1e-16, 0.5)) / torch.log(rate.clamp(1e-16, 1 - 1e-12))
        oscillates = (values[:, 0].real < 0) | (values[:, 0].imag.abs() > 0.2 * values[:, 0].abs())
        stable, growth = found & ((radius < 1) | self._trials.reached_by_plain_steps()), self.spectrum.growth
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
        plainly = "Plain steps" if damping == 1 else f"Plain steps with damping={damping:g}"
        extra = f"{plainly} need about {count:.0f} steps, and max_steps is {steps}."
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
        self._find_none()
        self._add(Cause.UNKNOWN, self._left, f"The smallest residual is {self._trials.least_residual(self._left):.1e}.")
        causes = {finding.cause for finding in self.findings}
        if causes & {Cause.OSCILLATION, Cause.LIMIT_CYCLE}:
            self._trials.make_damped(values[found])
        if causes & {Cause.SLOW_CONTRACTION, Cause.OSCILLATION, Cause.TOO_FEW_STEPS} and count <= 1000:
            self._trials.make(Setting(max_steps=math.ceil(1.2 * count) + 5))

    def _find_singular(self) -> None:
        dtype = self._replay.layout.dtype
        distance = (self.spectrum.eigenvalues - 1).abs().nan_to_num(nan=math.inf, posinf=math.inf).amin(dim=1)
        self._add(
            Cause.SINGULAR_JACOBIAN,
            distance <= SINGULAR * torch.finfo(dtype).eps,
            "The Jacobian of the map has the eigenvalue 1 at the solution.",
        )

    def _find_none(self) -> None:
        if not bool(self._left.any()):
            return
        apart, sizes = self._trials.distances()
        near, least = (apart.masked_fill(~(sizes <= growth), math.inf).amin(dim=0) for growth in (GROWTH, FAR))
        rows = self._left & (near > CLOSE) & (least > 0) & (least < math.inf)
        self._add(
            Cause.NO_EQUILIBRIUM,
            rows,
            f"{len(self._trials.made)} other solvers and starts were tried; f(z) and z are "
            f"{largest(least[rows]):.1e} or more of the state's size at the start apart.",
        )

    def _check_other_starts(self) -> None:
        """Solve again from two starts that differ, and compare the values.

        The second is some plain steps away, which leave an equilibrium that repels.
        """
        replay, point, generator = self._replay, self._point, self._generator
        if self._status.ne(Status.CONVERGED).any():
            return
        apart = torch.zeros_like(self._failed)
        worst = 0.0
        for steps in (0, PLAIN):
            noise = torch.rand(point.shape, generator=generator, dtype=point.dtype).to(point.device) - 0.5
            size = torch.where(replay.start == 0, 2 * rms_norm(point).unsqueeze(1), replay.start.abs())
            size = torch.where(size == 0, 1.0, size)
            flat = replay.start + noise * size
            for _ in range(steps):
                image = replay.flat(flat)
                flat = torch.where(rms_norm(image).isfinite().unsqueeze(1), image, flat)
            start = tree_map_only(Tensor, torch.clone, replay.layout.unpack(flat))
            trial = self._trials.make(Setting(start=("another start", start)), keep=False)
            if trial is None:
                break
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
