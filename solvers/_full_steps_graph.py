"""Full Newton steps for many small systems as one graph: what :class:`solvers._full_steps.FullSteps` does, compiled.

F, its Jacobian, the step and the tests of a step become a few passes over memory, and one loop takes all steps.
"""

import math

import torch
from torch import Tensor

from solvers._full_steps import Pace, Reached, at_start, found, next_step
from solvers._graph import LimitedTask
from solvers._secant import Secant
from solvers.methods.dense_jacobian import by_reverse_mode
from solvers.methods.root_map import RootMap
from solvers.methods.solver import State
from solvers.problem import FlatMap, Layout, all_of, as_number, relative


def reach(task: LimitedTask) -> tuple[Reached, Tensor, Tensor]:
    """What full steps reach, (B,) the norm of F there, and () int64, the number of the last step."""
    with task.tracing():
        return _reach(task)


def _reach(task: LimitedTask) -> tuple[Reached, Tensor, Tensor]:
    limits, measure, layout = task.limits, task.limits.measure, Layout(task.z0, task.batch_dims)
    z0 = layout.pack(task.z0).contiguous()

    def evaluated(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """F and its Jacobian, the next iterate, and norms: of the step, with rounding, of that iterate, of F."""
        residual, matrix = by_reverse_mode(task.map_of(FlatMap).image, z)
        step = next_step(residual, matrix)
        fz = z - step
        error, scale = measure.parts(step), measure.parts(fz)
        rounded = torch.add(error, scale, alpha=limits.eps / 2)
        return residual, matrix, fz, error, rounded, scale, torch.linalg.vector_norm(residual, dim=1)

    residual, matrix, fz, error, rounded, scale, size = evaluated(z0)
    of_root = task.map_of(RootMap)
    of_root.set_scaling_by_matrix(z0, residual, matrix)
    start_size = measure.sizes_at_start(z0, scale)
    absolute = measure.absolute(start_size, of_root.unit)
    met, allowed = at_start(measure, error, scale, size, start_size, absolute)
    one = torch.ones_like(limits.max_steps)

    def goes_on(step: Tensor, left: Tensor, *_: Tensor) -> Tensor:
        return (left.amax() > 0) & (step < limits.max_steps)

    def advance(
        step: Tensor,
        left: Tensor,
        before: Tensor,
        z: Tensor,
        num_steps: Tensor,
        residual: Tensor,
        estimate: Tensor,
        *pace: Tensor,
    ) -> tuple[Tensor, ...]:
        _, _, fz, error, rounded, scale, size = evaluated(z)
        now, allowed = Pace(*pace).after(size, rounded, scale)
        allowed = all_of(allowed, left > 0)
        last, latest = limits.entries_of(State(before, z)), limits.entries_of(State(z, fz))
        secant = Secant.between(last, latest, complete=limits.stride == 1, contracts=True)
        shown, error_estimate = found(measure, secant, now, error, scale, start_size, absolute)
        met, step = all_of(allowed, measure.bound(scale, absolute) >= error, shown), step + 1
        return (
            step,
            as_number(met < allowed, left),
            z.clone(),
            torch.where(allowed.unsqueeze(1), fz, z),
            torch.where(met, step, num_steps),
            torch.where(met, relative(error, scale), residual),
            torch.where(met, error_estimate, estimate),
            *now,
        )

    nan = torch.full_like(error, math.nan)
    values = (
        one,
        as_number(met < allowed, error),
        z0.clone(),
        torch.where(allowed.unsqueeze(1), fz, z0),
        met.to(torch.int64),
        torch.where(met, relative(error, scale), nan),
        nan.clone(),
        *Pace(size, rounded, torch.minimum(start_size, scale)),
    )
    step, _, _, z, num_steps, relative_step, estimate, *_ = torch.while_loop(goes_on, advance, values)
    value = torch.where((num_steps > 0).unsqueeze(1), z, z0)
    change = measure.norm(task.map_of(FlatMap).image(value))
    return Reached(value, num_steps, relative_step, estimate), change, step
