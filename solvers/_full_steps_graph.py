"""Full Newton steps for many small systems as one graph: what :class:`solvers._full_steps.FullSteps` does, compiled.

F, its Jacobian, the step and the tests of a step become a few passes over memory, and one loop takes all steps.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from solvers._full_steps import Pace, Reached, at_start, found, limit_of, next_step
from solvers._graph import LimitedTask
from solvers._loop import Loop, Run
from solvers._secant import Secant
from solvers.methods.dense_jacobian import by_reverse_mode
from solvers.methods.root_map import RootMap
from solvers.methods.solver import State
from solvers.problem import FlatMap, Layout, all_of, as_number, relative


@dataclasses.dataclass
class Progress(Run):
    """Where the steps have led.

    Attributes:
        start: (B, D).
        start_size: (B,) as in :meth:`Measure.sizes_at_start`.
        absolute: As in :meth:`Measure.absolute`.
        limit: (B,) as :func:`limit_of` gives it.
        step: () int64.
        left: (B,) bool, the samples that go on.
        before: (B, D) the last iterate.
        reached: The iterates, and what is known of those that are roots.
        pace: With what the next step is compared.
    """

    start: Tensor
    start_size: Tensor
    absolute: Tensor
    limit: Tensor
    step: Tensor
    left: Tensor
    before: Tensor
    reached: Reached
    pace: Pace

    @property
    def constants(self) -> tuple[Tensor, ...]:
        return (self.start, self.start_size, self.absolute, self.limit)


class _Evaluated(NamedTuple):
    """F at an iterate, its Jacobian, the next iterate, and norms: of the step, with rounding, of that iterate, of F."""

    residual: Tensor
    matrix: Tensor
    fz: Tensor
    error: Tensor
    rounded: Tensor
    scale: Tensor
    size: Tensor

    @classmethod
    def at(cls, task: LimitedTask, z: Tensor) -> "_Evaluated":
        measure = task.limits.measure
        residual, matrix = by_reverse_mode(task.map_of(FlatMap).image, z)
        step = next_step(residual, matrix)
        fz = z - step
        error, scale = measure.parts(step), measure.parts(fz)
        rounded = torch.add(error, scale, alpha=task.limits.eps / 2)
        return cls(residual, matrix, fz, error, rounded, scale, torch.linalg.vector_norm(residual, dim=1))


def _start(task: LimitedTask, _: Tensor) -> Progress:
    measure = task.limits.measure
    z0 = Layout(task.z0, task.batch_dims).pack(task.z0).contiguous()
    first = _Evaluated.at(task, z0)
    of_root = task.map_of(RootMap)
    of_root.set_scaling_by_matrix(z0, first.residual, first.matrix)
    start_size = measure.sizes_at_start(z0, first.scale)
    absolute = measure.absolute(start_size, of_root.unit)
    met, allowed = at_start(measure, first.error, first.scale, first.size, start_size, absolute)
    nan = torch.full_like(first.error, math.nan)
    return Progress(
        start=z0,
        start_size=start_size,
        absolute=absolute,
        limit=limit_of(measure, first.residual, first.error, measure.bound(first.scale, absolute)),
        step=torch.ones_like(task.limits.max_steps),
        left=met < allowed,
        before=z0,
        reached=Reached(
            value=torch.where(allowed.unsqueeze(1), first.fz, z0),
            num_steps=met.to(torch.int64),
            residual=torch.where(met, relative(first.error, first.scale), nan),
            error_estimate=nan,
        ),
        pace=Pace(first.size, first.rounded, torch.minimum(start_size, first.scale)),
    )


def _goes_on(task: LimitedTask, now: Progress) -> Tensor:
    return (as_number(now.left, now.start_size).amax() > 0) & (now.step < task.limits.max_steps)


def _turn(task: LimitedTask, now: Progress) -> Progress:
    limits, measure, known = task.limits, task.limits.measure, now.reached
    z = known.value
    _, _, fz, error, rounded, scale, size = _Evaluated.at(task, z)
    pace, allowed = now.pace.after(size, rounded, scale)
    allowed = all_of(allowed, now.left)
    last, latest = limits.entries_of(State(now.before, z)), limits.entries_of(State(z, fz))
    secant = Secant.between(last, latest, complete=limits.stride == 1, contracts=True)
    shown, estimate = found(measure, secant, pace, error, scale, now.start_size, now.absolute)
    met, step = all_of(allowed, measure.bound(scale, now.absolute) >= error, shown), now.step + 1
    reached = Reached(
        value=torch.where(allowed.unsqueeze(1), fz, z),
        num_steps=torch.where(met, step, known.num_steps),
        residual=torch.where(met, relative(error, scale), known.residual),
        error_estimate=torch.where(met, estimate, known.error_estimate),
    )
    return dataclasses.replace(now, step=step, left=met < allowed, before=z, reached=reached, pace=pace)


def _end(task: LimitedTask, now: Progress) -> tuple[Reached, Tensor, Tensor]:
    """What is reached, (B,) the norm of F there, and (B,) up to which norm nothing is suspected."""
    value = torch.where((now.reached.num_steps > 0).unsqueeze(1), now.reached.value, now.start)
    change = task.limits.measure.norm(task.map_of(FlatMap).image(value))
    return dataclasses.replace(now.reached, value=value), change, now.limit


LOOP: Loop[LimitedTask, Progress] = Loop(_start, _goes_on, _turn, numbers=lambda now: (now.step,), end=_end)
