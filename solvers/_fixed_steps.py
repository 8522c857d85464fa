"""A solve of a fixed number of steps, and what a solve says of each sample at its end."""

import dataclasses

import torch
from torch import Tensor

from solvers._solution import Status
from solvers.methods.solver import State
from solvers.problem import relative, rms_norm


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stopping test has to say of every sample; fields as in :class:`solvers.Solution`, on (B, D) and (B,)."""

    value: Tensor
    is_image: Tensor
    status: Tensor
    residual: Tensor | None
    change: Tensor | None
    error_estimate: Tensor | None
    num_steps: Tensor
    history: Tensor | None


class FixedSteps:
    """No test: every sample takes all the steps. Nothing is copied to the host, so the solve compiles to one graph.

    Args:
        keep_history: Compute and keep the residual of every step.
    """

    def __init__(self, *, keep_history: bool) -> None:
        self._history: list[Tensor] | None = [] if keep_history else None
        self.residual: Tensor | None = None
        self._step = 0

    def update(self, step: int, state: State) -> bool:
        """Take in the state after a step; never done."""
        self._step = step
        self.value = state.fz
        if self._history is not None:
            with torch.no_grad():
                self.residual = relative(rms_norm(state.fz - state.z), rms_norm(state.fz))
                self._history.append(self.residual)
        return False

    def outcome(self) -> Outcome:
        """Where the samples stand after the steps taken so far."""
        batch = self.value.shape[:1]
        change = None if self.residual is None else self.residual * rms_norm(self.value.detach())
        return Outcome(
            value=self.value,
            is_image=self.value.new_ones(batch, dtype=torch.bool),
            status=self.value.new_full(batch, Status.UNTESTED, dtype=torch.int8),
            residual=self.residual,
            change=change,
            error_estimate=None,
            num_steps=self.value.new_full(batch, self._step, dtype=torch.int64),
            history=None if self._history is None else torch.stack(self._history),
        )
