"""The linear solver of an adjoint problem, with its steps in one compiled graph."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers import _compiled as compiled
from solvers._loop import Task
from solvers._series_graph import SeriesTask
from solvers.linear import FlatMatvec, LinearResult, LinearSolver
from solvers.linear.richardson import Richardson, Series
from solvers.problem import AutocastMode

# The largest rate of a fast step: a compiled one costs so much less than one of GMRES.
MAX_RATE = 0.8


def compiled_adjoint_solver(
    solver: LinearSolver,
    f: Callable[..., Any],
    z: Any,
    args: tuple[Any, ...],
    autocast: AutocastMode,
    *,
    batch_dims: int,
) -> LinearSolver:
    """A linear solver for ``u = J' u + w``, with J the Jacobian of f in z, that runs as one graph where it can.

    Args:
        solver: The linear solver. Steps of :class:`solvers.linear.Richardson` are compiled; others run as they are.
        f: The map, ``f(z, *args)``, or a :class:`solvers.problem.Traced`.
        z: Where it is linearized.
        args: Further arguments of f.
        autocast: The mode in which f runs.
        batch_dims: As in :func:`solvers.solve`.
    """
    if type(solver) is not Richardson:
        return solver
    fields = {field.name: getattr(solver, field.name) for field in dataclasses.fields(solver)}
    return _CompiledRichardson(**fields, task=Task(f, z, args, batch_dims, autocast), shown=solver)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CompiledRichardson(Richardson):
    """Richardson iteration in one graph.

    Args:
        task: The map, and where it is linearized.
        shown: The solver that reports name.
    """

    task: Task
    shown: LinearSolver

    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        result = super().run(matvec, b, tolerance)
        return dataclasses.replace(result, solver=result.solver or self.shown)

    def series(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor) -> Series:
        if not b.numel():
            return super().series(matvec, b, tolerance)
        task = SeriesTask(
            **vars(self.task),
            tolerance=tolerance,
            max_rate=b.new_full((), MAX_RATE if self.max_rate is None else self.max_rate),
            max_steps=torch.full((), self.max_steps, dtype=torch.int64, device=b.device),
        )
        done = compiled.series(task, b)
        if done is None:
            return super().series(matvec, b, tolerance)
        end, num_products = done
        found = dataclasses.replace(end.series, num_compiled=num_products)
        if self.max_rate is None:  # steps that are fast in this form alone may be too many
            found.slow = found.slow | found.running
        return found
