"""The series ``w + J' w + J'^2 w + ...`` of an adjoint problem as one graph: what :class:`Richardson` does, compiled.

What the products take of the map at z, around which it is linearized, is the same in all steps; the compiler takes it
out of the loop, see :mod:`solvers._loop_invariants`.
"""

import dataclasses

import torch
from torch import Tensor

from solvers._loop import Loop, Run, Task
from solvers.problem import FlatMap, Layout, all_of, as_number, rms_norm


@dataclasses.dataclass
class SeriesTask(Task):
    """The map, which is linearized at ``z0``, and until when the series goes on.

    Attributes:
        tolerance: (B,).
        max_rate: ().
        max_steps: () int64.
    """

    tolerance: Tensor
    max_rate: Tensor
    max_steps: Tensor


@dataclasses.dataclass
class Progress(Run):
    """Where the series stands.

    Attributes:
        z: (B, D) where the map is linearized.
        step: () int64, the number of products.
        x: (B, D), as all that follow an attribute of :class:`solvers.linear.richardson.Series`.
        r: (B, D).
        error: (B,).
        running: (B,) bool.
        slow: (B,) bool.
        num_steps: (B,) int64.
    """

    z: Tensor
    step: Tensor
    x: Tensor
    r: Tensor
    error: Tensor
    running: Tensor
    slow: Tensor
    num_steps: Tensor

    @property
    def constants(self) -> tuple[Tensor, ...]:
        return (self.z,)


def _start(task: SeriesTask, w: Tensor) -> Progress:
    """Before the first step, for right-hand sides ``w`` (B, D)."""
    error = rms_norm(w)
    slow = ~error.isfinite()
    return Progress(
        z=Layout(task.z0, task.batch_dims).pack(task.z0),
        step=torch.zeros_like(task.max_steps),
        x=torch.zeros_like(w),
        r=w,
        error=error,
        running=(error > task.tolerance) & ~slow,
        slow=slow,
        num_steps=torch.zeros_like(error, dtype=torch.int64),
    )


def _goes_on(task: SeriesTask, now: Progress) -> Tensor:
    return (as_number(now.running, now.error).amax() > 0) & (now.step < task.max_steps)


def _turn(task: SeriesTask, now: Progress) -> Progress:
    """A step of :meth:`solvers.linear.Richardson.series` for ``A = I - J'``, with J the Jacobian at ``task.z0``."""
    next_r = torch.func.vjp(task.map_of(FlatMap).image, now.z)[1](now.r)[0]
    next_error = rms_norm(next_r)
    fast = next_error <= task.max_rate * now.error
    taken = all_of(now.running, next_error < now.error)
    rows = taken.unsqueeze(1)
    return Progress(
        z=now.z,
        step=now.step + 1,
        x=torch.where(rows, now.x + now.r, now.x),
        r=torch.where(rows, next_r, now.r),
        error=torch.where(taken, next_error, now.error),
        running=all_of(now.running, fast, next_error > task.tolerance),
        slow=now.slow | all_of(now.running, ~fast),
        num_steps=now.num_steps + now.running,
    )


LOOP: Loop[SeriesTask, Progress] = Loop(_start, _goes_on, _turn, numbers=lambda now: (now.step,))
