"""The base class of the conformance tests: the solver, solves that must converge, and readable failures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers._solution import Solution
from solvers._solve import solve
from solvers.methods.solver import Solver
from solvers.testing.row_contractions import RowContractions

# The tolerance for contractions in float64: loose enough that amplified rounding errors stay below it.
RTOL = 1e-6

# Relative difference of answers that are equal except for rounding in the kernels of batches of different sizes.
ROUNDING = 1e-9


class ConformanceTests:
    """The attributes and methods that the groups of tests share; see :class:`solvers.testing.SolverConformance`."""

    solver: Solver
    calls_per_step: int | None = 1
    problems: tuple[str, ...] = ("linear 0.5", "linear 0.9", "cos", "tanh", "contractive 2x2")
    max_steps: int = 500
    movable: bool = True

    @property
    def _yours(self) -> str:
        return f"Your solver {self.solver!r}"

    def _solve(self, f: Callable[..., Any], z0: Any, *, rtol: float = RTOL, **options: Any) -> Solution[Any]:
        """Solve a problem, which must converge for every sample."""
        __tracebackhide__ = True
        solution = solve(
            f, z0, self.solver, rtol=rtol, atol=0.0, max_steps=self.max_steps, on_failure="ignore", **options
        )
        require(
            not solution.failed.any(),
            f"{self._yours} does not solve what this test begins with, to rtol={rtol:.0e} within max_steps="
            f"{self.max_steps}:\n{solution.summary()}",
        )
        return solution

    def _iterates(self, f: Callable[[Tensor], Tensor], z0: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
        """Return copies of z and fz after init and after each further step."""
        state = self.solver.init(f, z0)
        iterates = [(state.z.clone(), state.fz.clone())]
        for _ in range(steps - 1):
            state = self.solver.step(f, state)
            iterates.append((state.z.clone(), state.fz.clone()))
        return iterates

    def _require_same(self, solution: Solution[Any], reference: Solution[Any], what: str) -> None:
        """Require the same statuses and numbers of steps, and the same values up to rounding; NaN equals NaN."""
        __tracebackhide__ = True
        require(
            torch.equal(solution.status, reference.status),
            f"{self._yours} ends differently {what}: the statuses are {solution.status.tolist()} instead of "
            f"{reference.status.tolist()}. {INDEPENDENCE}",
        )
        require(
            torch.equal(solution.num_steps, reference.num_steps),
            f"{self._yours} takes a different number of steps {what}: {solution.num_steps.tolist()} instead of "
            f"{reference.num_steps.tolist()}. {INDEPENDENCE}",
        )
        difference = float((solution.value - reference.value).abs().max()) if reference.value.numel() else 0.0
        require(
            torch.allclose(solution.value, reference.value, rtol=ROUNDING, atol=ROUNDING, equal_nan=True),
            f"{self._yours} gives a different answer {what}: it differs by {difference:.1e}. {INDEPENDENCE}",
        )


INDEPENDENCE = (
    "Each row of the new state must depend only on that row: reduce over dim=1 with keepdim=True, never over the "
    "batch, and choose row by row with torch.where."
)


class Counted:
    """A map that counts its calls."""

    def __init__(self, f: RowContractions) -> None:
        self.f = f
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.f(z)


def require(condition: bool | Tensor, message: str) -> None:
    """Raise an AssertionError with this message unless the condition holds; pytest then shows only the test."""
    __tracebackhide__ = True
    if not bool(condition):
        raise AssertionError(message)
