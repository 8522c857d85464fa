"""The series ``w + J' w + J'^2 w + ...`` of an adjoint problem as one graph: what :class:`Richardson` does, compiled.

What the products take of the map at z, around which it is linearized, is the same in all steps; the compiler takes it
out of the loop, see :mod:`solvers._loop_invariants`.
"""

import dataclasses

import torch
from torch import Tensor

from solvers._loop import Loop, Run, Task
from solvers.linear.richardson import Series
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
        series: Where they have led; no history is kept.
    """

    z: Tensor
    step: Tensor
    series: Series

    @property
    def constants(self) -> tuple[Tensor, ...]:
        return (self.z, self.series.history)


def _start(task: SeriesTask, w: Tensor) -> Progress:
    """Before the first step, for right-hand sides ``w`` (B, D)."""
    error = rms_norm(w)
    slow = ~error.isfinite()
    series = Series(
        x=torch.zeros_like(w),
        r=w,
        error=error,
        running=(error > task.tolerance) & ~slow,
        slow=slow,
        num_steps=torch.zeros_like(error, dtype=torch.int64),
        history=w.new_zeros(0, len(w)),
    )
    return Progress(Layout(task.z0, task.batch_dims).pack(task.z0), torch.zeros_like(task.max_steps), series)


def _goes_on(task: SeriesTask, now: Progress) -> Tensor:
    return (as_number(now.series.running, now.series.error).amax() > 0) & (now.step < task.max_steps)


def _turn(task: SeriesTask, now: Progress) -> Progress:
    """A step of :meth:`solvers.linear.Richardson.series` for ``A = I - J'``, with J the Jacobian at ``task.z0``."""
    old = now.series
    running = old.running.unsqueeze(1)
    step = torch.where(running, old.r, 0.0)
    product = torch.func.vjp(task.map_of(FlatMap).image, now.z)[1](step)[0]
    # Of samples that are done, the product is zero if they do not mix.
    next_r = torch.where(running, product, old.r + product)
    next_error = rms_norm(next_r)
    fast = next_error <= task.max_rate * old.error
    taken = all_of(old.running, next_error < old.error)
    done = all_of(~old.running, ~old.slow, next_error.isfinite())
    rows, renewed = taken.unsqueeze(1), taken | done
    series = dataclasses.replace(
        old,
        x=torch.where(rows, old.x + old.r, old.x),
        r=torch.where(renewed.unsqueeze(1), next_r, old.r),
        error=torch.where(renewed, next_error, old.error),
        running=all_of(old.running, fast, next_error > task.tolerance) | all_of(done, next_error > 2 * task.tolerance),
        slow=old.slow | all_of(old.running, ~fast),
        num_steps=old.num_steps + old.running,
    )
    return Progress(now.z, now.step + 1, series)


LOOP: Loop[SeriesTask, Progress] = Loop(_start, _goes_on, _turn, numbers=lambda now: (now.step,))
