"""Full Newton steps for many small systems as one graph: what :class:`solvers._full_steps.FullSteps` does, compiled.

F, its Jacobian, the step and the tests of a step become a few passes over memory, and one loop takes all steps.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers._full_steps import Pace, Reached, at_start, found, next_step
from solvers._measure import Measure
from solvers._secant import Secant, some_entries
from solvers.methods.dense_jacobian import by_reverse_mode
from solvers.methods.root_map import RootMap
from solvers.methods.solver import State
from solvers.problem import AutocastMode, Layout, Traced, all_of, relative


@dataclasses.dataclass
class FullPlan:
    """What is solved, and how.

    Attributes:
        F: The user's function.
        z0: The start, whose structure and shapes are those of the state.
        args: Further arguments of ``F``.
        batch_dims: As in :func:`solvers.solve_root`.
        autocast: The mode in which ``F`` runs.
        eps: The relative rounding error of ``F``.
        measure: The norms and bounds, with tensors for tolerances.
        max_steps: () int64.
        stride: The distance of the entries of a state that a secant takes.
    """

    F: Callable[..., Any] | Traced
    z0: Any
    args: tuple[Any, ...]
    batch_dims: int
    autocast: AutocastMode
    eps: float
    measure: Measure
    max_steps: Tensor
    stride: int


def reach(plan: FullPlan) -> tuple[Reached, Tensor, Tensor]:
    """What full steps reach, (B,) the norm of F there, and () int64, the number of the last step."""
    with plan.F.context() if isinstance(plan.F, Traced) else contextlib.nullcontext():
        return _reach(plan)


def _reach(plan: FullPlan) -> tuple[Reached, Tensor, Tensor]:
    measure, layout = plan.measure, Layout(plan.z0, plan.batch_dims)
    z0 = layout.pack(plan.z0).contiguous()

    def evaluated(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """F and its Jacobian, the next iterate, and norms: of the step, with rounding, of that iterate, of F."""
        # The map is made where it is called: torch.export finds no shapes in an object that was made outside of a loop.
        f = RootMap(plan.F, plan.args, Layout(plan.z0, plan.batch_dims), plan.autocast)
        residual, matrix = by_reverse_mode(f.evaluated, z)
        step = next_step(residual, matrix)
        fz = z - step
        error, scale = measure.parts(step), measure.parts(fz)
        rounded = torch.add(error, scale, alpha=plan.eps / 2)
        return residual, matrix, fz, error, rounded, scale, torch.linalg.vector_norm(residual, dim=1)

    residual, matrix, fz, error, rounded, scale, size = evaluated(z0)
    of_root = RootMap(plan.F, plan.args, layout, plan.autocast)

    def unit() -> Tensor | None:
        of_root.set_scaling_by_matrix(z0, residual, matrix)
        return of_root.unit

    start_size = measure.sizes_at_start(z0, scale)
    absolute = measure.absolute(start_size, unit)
    met, allowed = at_start(measure, error, scale, size, start_size, absolute)
    one = torch.ones_like(plan.max_steps)

    # Which samples are left is 1.0 or 0.0: truth values take Inductor's loops ten times as long to write (2.14).
    def goes_on(step: Tensor, left: Tensor, *_: Tensor) -> Tensor:
        return (left.amax() > 0) & (step < plan.max_steps)

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
        last, latest = (some_entries(State(*pair), plan.stride) for pair in ((before, z), (z, fz)))
        secant = Secant.between(last, latest, complete=plan.stride == 1, contracts=True)
        shown, error_estimate = found(measure, secant, now, error, scale, start_size, absolute)
        met, step = all_of(allowed, measure.bound(scale, absolute) >= error, shown), step + 1
        return (
            step,
            torch.where(met < allowed, 1.0, 0.0).to(left.dtype),
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
        torch.where(met < allowed, 1.0, 0.0).to(error.dtype),
        z0.clone(),
        torch.where(allowed.unsqueeze(1), fz, z0),
        met.to(torch.int64),
        torch.where(met, relative(error, scale), nan),
        nan.clone(),
        *Pace(size, rounded, torch.minimum(start_size, scale)),
    )
    step, _, _, z, num_steps, relative_step, estimate, *_ = torch.while_loop(goes_on, advance, values)
    value = torch.where((num_steps > 0).unsqueeze(1), z, z0)
    change = measure.norm(of_root.evaluated(value))
    return Reached(value, num_steps, relative_step, estimate), change, step
