"""What a backward mode is: how the solution of a fixed-point problem gets its gradient."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import TreeSpec, tree_leaves

from implicit.autograd.constant_weights import constant_weights
from solvers import Iteration, Solution, Solver, Stopping, solve
from solvers._failure import OnFailure
from solvers.problem.hyperparameters import Hyperparameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """The options of :func:`solvers.solve`, together; ``stopping`` is None for a fixed number of steps."""

    solver: Solver
    stopping: Stopping | None
    max_steps: int
    batch_dims: int
    history: bool
    on_failure: OnFailure

    @property
    def linear_rtol(self) -> float | None:
        """The relative tolerance of the linear solves of derivatives: a tenth of that of the solve, if it has one."""
        tolerances = [] if self.stopping is None else [rtol for rtol in tree_leaves(self.stopping.rtol) if rtol]
        return 0.1 * min(tolerances) if tolerances else None

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...] = ()) -> Solution:
        """``solvers.solve`` with these options."""
        return solve(f, z0, args=args, on_failure=self.on_failure, **self._of_iteration())

    def iteration(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...] = ()) -> Iteration:
        """The same solve, to be driven by hand."""
        return Iteration(f, z0, args=args, **self._of_iteration())

    def _of_iteration(self) -> dict[str, Any]:
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del options["on_failure"]
        if self.stopping is None:
            options.update(rtol=None, atol=None)
        return options

    def for_leaves(self, spec: TreeSpec, batch_dims: int) -> "SolveOptions":
        """The same for the list of the leaves of a state of this structure, with so many batch dimensions."""
        stopping = None if self.stopping is None else self.stopping.flattened(spec)
        return dataclasses.replace(self, stopping=stopping, batch_dims=batch_dims)


class Backward(Hyperparameters, abc.ABC):
    """A backward mode: a frozen, keyword-only dataclass of its hyperparameters, independent of the solver."""

    def check(self, solver: Solver) -> None:
        """Raise a ValueError that names both if this mode cannot go with a solver."""

    def chosen(self, options: SolveOptions) -> "Backward":
        """The mode that makes the gradient of such a solve: this one, but for a mode that chooses among others."""
        return self

    @abc.abstractmethod
    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        """Solve ``z = f(z, *args)``; ``solution.value`` carries the gradient."""

    def evaluate(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        """The same value and status for a call of which no derivative is taken.

        This one is the solver's solution. A mode whose value is another one overrides it.
        """
        with constant_weights():
            return options.solve(f, z0, args)


def require_differentiable(mode: Backward, solver: Solver) -> None:
    """Raise a ValueError, for a mode that differentiates the solver's steps, if no gradients flow through them."""
    if not solver.differentiable:
        raise ValueError(
            f"{mode!r} needs gradients through the steps of the solver, and none flow through those of {solver!r}. "
            "Use the implicit backward mode, or Picard, Anderson or Broyden."
        )
