"""What a backward mode is: how the solution of a fixed-point problem gets its gradient."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from solvers import Solution, Solver, solve
from solvers._failure import OnFailure
from solvers._hyperparameters import Hyperparameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """The options of :func:`solvers.solve`, together."""

    solver: Solver
    rtol: float | None
    atol: float | None
    max_steps: int
    batch_dims: int
    history: bool
    on_failure: OnFailure

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...] = ()) -> Solution:
        """``solvers.solve`` with these options."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return solve(f, z0, args=args, **options)


class Backward(Hyperparameters, abc.ABC):
    """A backward mode: a frozen, keyword-only dataclass of its hyperparameters, independent of the solver."""

    def check(self, solver: Solver) -> None:
        """Raise a ValueError that names both if this mode cannot go with a solver."""

    @abc.abstractmethod
    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        """Solve ``z = f(z, *args)``; ``solution.value`` carries the gradient."""
