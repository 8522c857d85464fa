"""The stopping tests of the driver loop: which samples are done, why, and the best value of each."""

import dataclasses
import math

import torch
from torch import Tensor

from solvers._solution import Status

# A sample still being solved. Not a Status: no solution ever carries it.
ACTIVE = -1

# A residual this many times the size of the first iterate's image means divergence: far above the transients of
# convergent iterations, far below overflow in float32.
DIVERGENCE_FACTOR = 1e6

# Steps in which the best residual of a sample does not improve before it counts as stagnated.
PATIENCE = 50


def rms_norm(x: Tensor) -> Tensor:
    """(B, D) -> (B,) root mean square of each row, so that tolerances do not depend on D."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norm / math.sqrt(max(x.shape[1], 1))


def relative(error: Tensor, scale: Tensor) -> Tensor:
    """``error / scale``, 0 where both are 0."""
    return error / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _underflow(x: Tensor) -> float:
    """Where the squares in a norm begin to lose digits to underflow."""
    info = torch.finfo(x.dtype)
    return float((info.tiny / info.eps) ** 0.5)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stopping test has to say of every sample; fields as in :class:`solvers.Solution`, on (B, D) and (B,)."""

    value: Tensor
    status: Tensor
    residual: Tensor | None
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
        return Outcome(
            value=self.value,
            status=self.value.new_full(batch, Status.UNTESTED, dtype=torch.int8),
            residual=self.residual,
            num_steps=self.value.new_full(batch, self._step, dtype=torch.int64),
            history=None if self._history is None else torch.stack(self._history),
        )


# What ToleranceTest knows of each sample and a solution tells.
_PER_SAMPLE = ("value", "status", "residual", "num_steps")


class ToleranceTest:
    """Follows every sample: its best value and residual, its status, the step it stopped at.

    A sample that has stopped, well or badly, keeps its value; later updates do not touch it.

    Args:
        rtol: Relative tolerance.
        atol: Absolute tolerance, on the root mean square of ``f(z) - z``.
        keep_history: Keep the residuals of every step.
    """

    # Set by the first update.
    value: Tensor  # (B, D)
    status: Tensor  # (B,), as all below
    residual: Tensor
    num_steps: Tensor
    _best_step: Tensor
    _limit: Tensor
    _start_z: Tensor  # (B, D)

    def __init__(self, rtol: float, atol: float, *, keep_history: bool) -> None:
        self._rtol = rtol
        self._atol = atol
        self._history: list[Tensor] | None = [] if keep_history else None
        self._step = 0
        self._all_improved_at = 0
        # How many of the samples that are left have stopped, on the host.
        self.num_done = 0
        # After drop_done: which samples of the batch are left, and the attributes of all of them.
        self._rows: Tensor | None = None
        self._aside: dict[str, Tensor] = {}

    def update(self, step: int, z: Tensor, fz: Tensor) -> bool:
        """Take in one step's iterate and its image, both (B, D); True when every sample is done."""
        first, self._step = self._step == 0, step
        with torch.no_grad():
            # Plain norms: the root of the size cancels in all but atol.
            error = torch.linalg.vector_norm(fz - z, dim=1)  # (B,)
            scale = torch.linalg.vector_norm(fz, dim=1)  # (B,)
            residual = relative(error, scale)
            bound = self._rtol * scale
            if self._atol:
                bound = bound + self._atol * math.sqrt(z.shape[1])
            if first:
                self._start(error, scale, z, fz)
            improved = residual < self.residual
            # In most steps nothing happens to any sample but a smaller residual; one look at the host settles that.
            # A nan compares false, so it is never ordinary.
            if not self.num_done and bool((improved & (error > bound) & (error < self._limit)).all()):
                self._record(residual)
                self.residual = residual
                self._all_improved_at = self._step
                self.value = fz
                return False
            # Norms whose squares overflow or underflow compare as they should not: neither is an answer.
            meaningful = bound.isfinite() & ((scale > _underflow(scale)) | (fz == z).all(dim=1))
            taken = self._settle(residual, error, improved, (error <= bound) & meaningful)
        self.value = torch.where(taken.unsqueeze(1), fz, self.value)
        return self.num_done == len(self.status)

    def _start(self, error: Tensor, scale: Tensor, z: Tensor, fz: Tensor) -> None:
        self.value = fz
        self._start_z = z
        self.residual = torch.full_like(error, math.inf)
        self.status = torch.full_like(error, ACTIVE, dtype=torch.int8)
        self.num_steps = torch.zeros_like(error, dtype=torch.int64)
        self._best_step = torch.zeros_like(self.num_steps)
        self._limit = DIVERGENCE_FACTOR * (error + scale)

    def _settle(self, residual: Tensor, error: Tensor, improved: Tensor, met: Tensor) -> Tensor:
        """Decide sample by sample; returns (B,) which of them take the new value."""
        active = self.status == ACTIVE
        met = met & active
        taken = met | (improved & active)
        self.residual = torch.where(taken, residual, self.residual)
        self._best_step = torch.where(taken, self._step, self._best_step.clamp_min(self._all_improved_at))
        self._record(torch.where(active, residual, self.residual))

        # The later line wins: what is not finite is no matter of stagnation.
        status = self.status
        status = status.masked_fill(active & (self._step - self._best_step >= PATIENCE), Status.STAGNATED)
        status = status.masked_fill(active & (error > self._limit), Status.DIVERGED)
        status = status.masked_fill(active & ~error.isfinite(), Status.NONFINITE)
        self.status = status.masked_fill(met, Status.CONVERGED)

        self.num_steps = torch.where(active, self._step, self.num_steps)
        self.num_done = int(self.done.sum())
        return taken

    @property
    def done(self) -> Tensor:
        """(B,) bool: which samples have stopped."""
        return self.status != ACTIVE

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
        for name in (*_PER_SAMPLE, "_best_step", "_limit", "_start_z"):
            setattr(self, name, getattr(self, name)[keep])
        self.num_done = 0
        return keep

    def outcome(self) -> Outcome:
        """Where the samples stand; one that is still active has not made it within the steps taken."""
        active = self.status == ACTIVE
        return Outcome(
            value=self._whole("value"),
            status=self._merged("status", self.status.masked_fill(active, Status.MAX_STEPS)),
            residual=self._whole("residual"),
            num_steps=self._merged("num_steps", torch.where(active, self._step, self.num_steps)),
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
