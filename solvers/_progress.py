"""The stopping tests of the driver loop: which samples are done, why, and the best value of each."""

import dataclasses
import math

import torch
from torch import Tensor

from solvers._solution import Status
from solvers._stopping import Measure, Stopping
from solvers.problem.norms import relative, rms_norm

# A sample still being solved. Not a Status: no solution ever carries it.
ACTIVE = -1

# A relative residual of so many eps is at the precision floor, where rounding in the map decides; on the problem bank
# it ends at 3 eps or below.
FLOOR = 32

# Steps without a smaller residual after which a sample that is at the floor ends there.
FLOOR_PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stopping test has to say of every sample; fields as in :class:`solvers.Solution`, on (B, D) and (B,)."""

    value: Tensor
    status: Tensor
    residual: Tensor | None
    change: Tensor | None
    error_estimate: Tensor | None
    num_steps: Tensor
    history: Tensor | None


class FixedSteps:
    """No test: every sample takes all the steps. Nothing is copied to the host, so that it compiles to one graph.

    Args:
        keep_history: Compute and keep the residual of every step.
    """

    def __init__(self, *, keep_history: bool) -> None:
        self._history: list[Tensor] | None = [] if keep_history else None
        self.residual: Tensor | None = None
        self._step = 0

    def update(self, step: int, z: Tensor, fz: Tensor) -> bool:
        """Take in one step's iterate and its image, both (B, D); never done."""
        self._step = step
        self.value = fz
        if self._history is not None:
            with torch.no_grad():
                self.residual = relative(rms_norm(fz - z), rms_norm(fz))
                self._history.append(self.residual)
        return False

    def outcome(self) -> Outcome:
        """Where the samples stand after the steps taken so far."""
        batch = self.value.shape[:1]
        change = None if self.residual is None else self.residual * rms_norm(self.value.detach())
        return Outcome(
            value=self.value,
            status=self.value.new_full(batch, Status.UNTESTED, dtype=torch.int8),
            residual=self.residual,
            change=change,
            error_estimate=None,
            num_steps=self.value.new_full(batch, self._step, dtype=torch.int64),
            history=None if self._history is None else torch.stack(self._history),
        )


# What ToleranceTest knows of each sample and a solution tells.
_PER_SAMPLE = ("value", "status", "residual", "error_ratio", "num_steps")


class ToleranceTest:
    """Follows every sample: its best value and residual, its status, the step it stopped at.

    A sample that has stopped, well or badly, keeps its value; later updates do not touch it. In most steps nothing
    happens to any sample but a smaller residual: one look at the host settles that, and the rest is put off.

    Args:
        stopping: When a sample is done.
        measure: The norms and bounds for its state.
        eps: The relative rounding error of the map.
        keep_history: Keep the residuals of every step.
    """

    # Set by the first update.
    status: Tensor  # (B,), as all below but those that are (B, D)
    residual: Tensor
    error_ratio: Tensor
    num_steps: Tensor
    done: Tensor
    _value: Tensor  # (B, D)
    _best_step: Tensor
    _limit: Tensor
    _start_z: Tensor  # (B, D)
    _z: Tensor  # (B, D) the latest iterate and its image, and those before
    _fz: Tensor
    _earlier: tuple[Tensor, Tensor] | None

    def __init__(self, stopping: Stopping, measure: Measure, eps: float, *, keep_history: bool) -> None:
        self._measure = measure
        self._patience = stopping.patience
        self._max_growth = stopping.max_growth
        self._floor = FLOOR * eps
        self._least_patience = min(self._patience, FLOOR_PATIENCE)
        self._history: list[Tensor] | None = [] if keep_history else None
        self._step = 0
        # The last step in which every sample that was left improved, so that its image is the best value of all.
        self._all_improved_at = 0
        self._newest: Tensor | None = None  # (B, D) that image, until it is merged into the values
        # No sample can have run out of patience before this step.
        self._stale_at = 0
        # How many of the samples that are left have stopped, on the host.
        self.num_done = 0
        # After drop_done: which samples of the batch are left, and the attributes of all of them.
        self._rows: Tensor | None = None
        self._aside: dict[str, Tensor] = {}

    def update(self, step: int, z: Tensor, fz: Tensor) -> bool:
        """Take in one step's iterate and its image, both (B, D); True when every sample is done."""
        first, self._step = self._step == 0, step
        with torch.no_grad():
            error, scale = self._measure.parts(fz - z), self._measure.parts(fz)
            whole, whole_scale = self._measure.whole(error), self._measure.whole(scale)
            residual = relative(whole, whole_scale)  # (B,)
            if first:
                self._start(whole, whole_scale, z, fz)
            self._earlier, self._z, self._fz = (self._z, self._fz), z, fz
            improved = residual < self.residual
            # A nan compares false, so it is never open.
            still_open = self._measure.exceeds(error, scale) & (whole < self._limit)
            ordinary = improved & still_open
            if bool((ordinary | self.done if self.num_done else ordinary).all()):
                self.residual = torch.where(self.done, self.residual, residual) if self.num_done else residual
                self._record(self.residual)
                self._all_improved_at = step
                self._stale_at = step + self._least_patience
                if self.num_done:
                    self._newest = fz
                else:
                    self._value = fz
                return False
        value = self.value  # before any sample ends
        with torch.no_grad():
            active = ~self.done
            taken = active & improved
            if step >= self._stale_at or bool((active & ~still_open).any()):
                met = active & self._measure.met(error, scale, z, fz)
                taken = taken | met
                self._take(taken, residual)
                self._stop(met, whole)
            else:
                self._take(taken, residual)
        self._value = fz if bool(taken.all()) else torch.where(taken.unsqueeze(1), fz, value)
        return self.num_done == len(self.status)

    def _start(self, error: Tensor, scale: Tensor, z: Tensor, fz: Tensor) -> None:
        self._value = self._fz = fz
        self._start_z = self._z = z
        self.residual = torch.full_like(error, math.inf)
        self.error_ratio = torch.full_like(error, math.nan)
        self.status = torch.full_like(error, ACTIVE, dtype=torch.int8)
        self.done = torch.zeros_like(error, dtype=torch.bool)
        self.num_steps = torch.zeros_like(error, dtype=torch.int64)
        self._best_step = torch.zeros_like(self.num_steps)
        self._limit = self._max_growth * (error + scale)

    def _take(self, taken: Tensor, residual: Tensor) -> None:
        """Give the samples that are ``taken`` (B,) their new residual."""
        self._record(torch.where(self.done, self.residual, residual))
        self.residual = torch.where(taken, residual, self.residual)
        self._best_step = torch.where(taken, self._step, self._best_step.clamp_min(self._all_improved_at))

    def _stop(self, met: Tensor, error: Tensor) -> None:
        """Decide of each sample whether it ends here, and how."""
        active = ~self.done
        waited = self._step - self._best_step
        # The later line wins: what is not finite is no matter of stagnation.
        status = self.status
        status = status.masked_fill(active & (waited >= self._patience), Status.STAGNATED)
        at_floor = (self.residual <= self._floor) & (waited >= FLOOR_PATIENCE)
        status = status.masked_fill(active & at_floor, Status.PRECISION_FLOOR)
        status = status.masked_fill(active & (error > self._limit), Status.DIVERGED)
        status = status.masked_fill(active & ~error.isfinite(), Status.NONFINITE)
        self.status = status.masked_fill(met, Status.CONVERGED)
        self.num_steps = torch.where(active, self._step, self.num_steps)
        self.done = self.status != ACTIVE
        ended = (active & self.done).nonzero().squeeze(1)
        self.num_done += len(ended)
        self.error_ratio = self._with_secant_ratio(ended)
        if self.num_done < len(self.done):
            oldest = self._best_step.masked_fill(self.done, self._step).min()
            self._stale_at = int(oldest) + self._least_patience

    def _with_secant_ratio(self, rows: Tensor) -> Tensor:
        """The error ratios with those of ``rows`` (n,) set: near a solution, what error is to residual.

        That is how much longer f(z) changed than f(z) - z in the last step. Near the solution f(z) - z* is
        J (J - I)^-1 (f(z) - z), and the same matrix takes the change of f(z) - z to that of f(z).
        """
        if not len(rows) or self._earlier is None:
            return self.error_ratio
        (earlier_z, earlier_fz), self._earlier = self._earlier, None
        if len(rows) < len(self.done):
            earlier_z, earlier_fz = earlier_z.index_select(0, rows), earlier_fz.index_select(0, rows)
            z, fz = self._z.index_select(0, rows), self._fz.index_select(0, rows)
        else:
            z, fz = self._z, self._fz
        # With one vector: there may be no room for more.
        change = fz - earlier_fz
        del earlier_fz
        size = self._measure.norm(change)
        change.sub_(z).add_(earlier_z)
        return self.error_ratio.index_copy(0, rows, size / self._measure.norm(change))

    @property
    def value(self) -> Tensor:
        """(B, D) the image of the best iterate of each sample."""
        if self._newest is not None:
            newest, self._newest = self._newest, None
            self._value = torch.where(self.done.unsqueeze(1), self._value, newest) if self.num_done else newest
        return self._value

    def forget_earlier(self) -> None:
        """Drop the iterate before the latest, which only a solution asks for: a step needs the room."""
        self._earlier = None

    def held(self) -> Tensor:
        """(B, D) what the map is to be called with for samples that have stopped: always finite, if z0 was."""
        lost = (self.status == Status.NONFINITE) & ~self.residual.isfinite()
        return torch.where(lost.unsqueeze(1), self._start_z, self.value).detach()

    def drop_done(self) -> Tensor:
        """Put the finished samples aside; from now on updates are of the others alone.

        Returns:
            (n,) the positions of those, among the samples that were left before.
        """
        keep = (~self.done).nonzero().squeeze(1)
        self._aside = {name: self._whole(name) for name in _PER_SAMPLE}
        self._rows = keep if self._rows is None else self._rows[keep]
        self._value = self.value[keep]
        for name in (*_PER_SAMPLE[1:], "done", "_best_step", "_limit", "_start_z", "_z", "_fz"):
            setattr(self, name, getattr(self, name)[keep])
        self.num_done = 0
        return keep

    def outcome(self) -> Outcome:
        """Where the samples stand; one that is still active has not made it within the steps taken."""
        status = self.status.masked_fill(~self.done, Status.MAX_STEPS)
        num_steps = self.num_steps.masked_fill(~self.done, self._step)
        value, residual = self._whole("value"), self._whole("residual")
        with torch.no_grad():
            self.error_ratio = self._with_secant_ratio((~self.done).nonzero().squeeze(1))
            change = residual * self._measure.norm(value)
            estimate = self._whole("error_ratio") * change
        return Outcome(
            value=value,
            status=self._merged("status", status),
            residual=residual,
            change=change,
            error_estimate=estimate.masked_fill(change == 0, 0.0),
            num_steps=self._merged("num_steps", num_steps),
            history=None if self._history is None else torch.stack(self._history),
        )

    def _record(self, residual: Tensor) -> None:
        """Keep one step's residuals, of all samples."""
        if self._history is not None:
            self._history.append(self._merged("residual", residual))

    def _whole(self, name: str) -> Tensor:
        """An attribute for all samples, those put aside too."""
        return self._merged(name, getattr(self, name))

    def _merged(self, name: str, current: Tensor) -> Tensor:
        return current if self._rows is None else self._aside[name].index_copy(0, self._rows, current)
