"""What all conformance tests share: the solver, solves that must converge, and failures that read well."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers._solution import Solution
from solvers._solve import solve
from solvers.methods.solver import Solver
from solvers.testing.row_contractions import RowContractions

# What a solve of a contraction in float64 is asked for: few enough digits that rounding is not amplified up to them.
RTOL = 1e-6

# Relative difference of answers that are equal but for rounding in the kernels of batches of different sizes.
ROUNDING = 1e-9


class ConformanceTests:
    """Attributes and helpers of the groups of tests; see :class:`solvers.testing.SolverConformance`."""

    solver: Solver
    calls_per_step: int | None = 1
    problems: tuple[str, ...] = ("linear 0.5", "linear 0.9", "cos", "tanh", "contractive 2x2")
    max_steps: int = 500
    movable: bool = True

    @property
    def _yours(self) -> str:
        return f"Your solver {self.solver!r}"

    def _solve(self, f: Callable[..., Any], z0: Any, *, rtol: float = RTOL, **options: Any) -> Solution:
        """A solve that must converge for every sample."""
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
        """Copies of z and fz after init and after each further step."""
        state = self.solver.init(f, z0)
        iterates = [(state.z.clone(), state.fz.clone())]
        for _ in range(steps - 1):
            state = self.solver.step(f, state)
            iterates.append((state.z.clone(), state.fz.clone()))
        return iterates

    def _require_same(self, solution: Solution, reference: Solution, what: str) -> None:
        """The same status and number of steps, the same value to rounding; a nan equals a nan."""
        __tracebackhide__ = True
        require(
            torch.equal(solution.status, reference.status),
            f"{self._yours} ends otherwise {what}: status {solution.status.tolist()}, where it is "
            f"{reference.status.tolist()}. {INDEPENDENCE}",
        )
        require(
            torch.equal(solution.num_steps, reference.num_steps),
            f"{self._yours} takes another number of steps {what}: {solution.num_steps.tolist()}, where it is "
            f"{reference.num_steps.tolist()}. {INDEPENDENCE}",
        )
        difference = float((solution.value - reference.value).abs().max()) if reference.value.numel() else 0.0
        require(
            torch.allclose(solution.value, reference.value, rtol=ROUNDING, atol=ROUNDING, equal_nan=True),
            f"{self._yours} gives another answer {what}: it differs by {difference:.1e}. {INDEPENDENCE}",
        )


INDEPENDENCE = (
    "A row of the new state must depend on that row alone: reduce over dim=1 with keepdim=True, never over the batch, "
    "and choose row by row with torch.where."
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
    """An AssertionError with this message unless the condition holds; pytest shows the test, not this function."""
    __tracebackhide__ = True
    if not bool(condition):
        raise AssertionError(message)
