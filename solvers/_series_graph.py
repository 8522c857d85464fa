"""The series ``w + J' w + J'^2 w + ...`` of an adjoint problem as one graph: what :class:`Richardson` does, compiled.

What the products take of the map at z, around which it is linearized, is the same in all steps; the compiler takes it
out of the loop, see :mod:`solvers._loop_invariants`.
"""

import torch
from torch import Tensor

from solvers._graph import Task, spares, take
from solvers.problem import FlatMap, Layout, all_of, as_number, rms_norm

# x, r, the error, which samples are running and which are slow, and their numbers of steps, all as attributes of
# solvers.linear.richardson.Series.
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def series(task: Task, w: Tensor, tolerance: Tensor, max_rate: Tensor, max_steps: Tensor) -> tuple[Parts, Tensor]:
    """The steps of :meth:`solvers.linear.Richardson.series` for ``A = I - J'``, with J the Jacobian at ``task.z0``.

    Args:
        task: The map, and where it is linearized.
        w: (B, D) the right-hand sides.
        tolerance: (B,).
        max_rate: ().
        max_steps: () int64.

    Returns:
        Where they lead, and () int64, the number of products.
    """
    with task.tracing():
        return _series(task, w, tolerance, max_rate, max_steps)


def _series(task: Task, w: Tensor, tolerance: Tensor, max_rate: Tensor, max_steps: Tensor) -> tuple[Parts, Tensor]:
    # A copy, because no two inputs of a loop may be the same memory.
    z = Layout(task.z0, task.batch_dims).pack(task.z0).clone(memory_format=torch.contiguous_format)
    error, spare = rms_norm(w), spares(tolerance)
    slow = ~error.isfinite()
    running = (error > tolerance) & ~slow

    def goes_on(step: Tensor, running: Tensor, *_: Tensor) -> Tensor:
        return (running.amax() > 0) & (step < max_steps)

    def advance(
        step: Tensor, running: Tensor, slow: Tensor, x: Tensor, r: Tensor, error: Tensor, num_steps: Tensor
    ) -> tuple[Tensor, ...]:
        take(spare)
        next_r = torch.func.vjp(task.map_of(FlatMap).image, z)[1](r)[0]
        next_error, runs = rms_norm(next_r), running > 0
        fast = next_error <= max_rate * error
        taken = all_of(runs, next_error < error)
        rows = taken.unsqueeze(1)
        return (
            step + 1,
            as_number(all_of(runs, fast, next_error > tolerance), error),
            as_number((slow > 0) | all_of(runs, ~fast), error),
            torch.where(rows, x + r, x),
            torch.where(rows, next_r, r).contiguous(),
            torch.where(taken, next_error, error),
            num_steps + runs,
        )

    flags = (as_number(flag, error) for flag in (running, slow))
    num_steps = torch.zeros_like(error, dtype=torch.int64)
    values = (torch.zeros_like(max_steps), *flags, torch.zeros_like(w), w.clone(), error, num_steps)
    step, running, slow, x, r, error, num_steps = torch.while_loop(goes_on, advance, values)
    return (x, r, error, running > 0, slow > 0, num_steps), step
