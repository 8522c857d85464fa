"""What a linear solver is."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from solvers._solution import Status
from solvers.linear.operator import FlatMatvec
from solvers.problem.hyperparameters import Hyperparameters
from solvers.problem.norms import FLOOR

Preconditioner = Callable[[Any], Any]


@dataclasses.dataclass
class LinearResult:
    """What a linear solver returns for the flat problem; fields as in :class:`solvers.Solution`.

    Attributes:
        x: (B, D); nan for a sample that ended NONFINITE before any progress.
        status: (B,) int8. CONVERGED also where the residual is a few rounding errors of the dtype, at most 32 eps,
            and the tolerance asks for less.
        residual: (B,) ``norm(b - A x) / norm(b)``.
        num_steps: (B,) int64.
        history: (steps, B) residuals as the method estimates them while it runs.
        solver: The solver that was chosen, for one that chooses among others.
        num_compiled: How many products with A were computed in compiled code, of which ``matvec`` does not know.
    """

    x: Tensor
    status: Tensor
    residual: Tensor
    num_steps: Tensor
    history: Tensor
    solver: "LinearSolver | None" = None
    num_compiled: int = 0

    def settled(self) -> "LinearResult":
        """This result, with CONVERGED where the residual is at the floor that rounding sets."""
        at_floor = (self.residual <= FLOOR * torch.finfo(self.x.dtype).eps) & (self.status != Status.UNTESTED)
        return dataclasses.replace(self, status=self.status.masked_fill(at_floor, Status.CONVERGED))

    def continued(self, rows: Tensor, found: "LinearResult", start: Tensor, size: Tensor) -> "LinearResult":
        """This result, but for the systems ``rows`` (B,), which another solver took further.

        Args:
            rows: (B,) bool.
            found: What it found for the residual that was left of them.
            start: (B, D) the x that this residual belongs to.
            size: (B,) the norm of this residual in units of ``norm(b)``.
        """
        return LinearResult(
            x=torch.where(rows.unsqueeze(1), start + found.x, self.x),
            status=torch.where(rows, found.status, self.status),
            residual=torch.where(rows, found.residual * size, self.residual),
            num_steps=self.num_steps + torch.where(rows, found.num_steps, 0),
            history=torch.cat((self.history, torch.where(rows, found.history * size, self.residual))),
            num_compiled=self.num_compiled,
        )


class LinearSolver(Hyperparameters, abc.ABC):
    """A method for ``A x = b`` given only products with A; a frozen dataclass with its own tolerances.

    Attributes:
        tested: Whether the method tests its residual. One that does not never waits for the device, and compiles.
        is_series: Whether the method sums powers of I - A, so that the size and the sign of A matter.
        on_breakdown: What else BREAKDOWN may mean for this method, for messages; a sentence that begins with a space.
    """

    tested: ClassVar[bool] = True
    is_series: ClassVar[bool] = False
    on_breakdown: ClassVar[str] = ""

    def with_default_rtol(self, rtol: float) -> Self:
        """This solver, with ``rtol`` for its relative tolerance if its own is None."""
        if getattr(self, "rtol", 0.0) is not None:
            return self
        this: Any = self
        with_it: Self = dataclasses.replace(this, rtol=rtol)
        return with_it

    def with_preconditioners(self, change: Callable[[Preconditioner], Preconditioner]) -> Self:
        """This solver, with ``change`` of its preconditioner and those of the linear solvers that it falls back on."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(cast(Any, self)):
            value = new = getattr(self, field.name)
            if isinstance(value, LinearSolver):
                new = value.with_preconditioners(change)
            elif field.name == "preconditioner" and value is not None:
                new = change(value)
            if new is not value:
                changed[field.name] = new
        this: Any = self
        with_them: Self = dataclasses.replace(this, **changed) if changed else self
        return with_them

    @abc.abstractmethod
    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        """Solve ``matvec(x) = b`` for x; both (B, D), each row a system of its own.

        Args:
            matvec: The product with A.
            b: (B, D) right-hand sides.
            tolerance: (B,) the root mean square of ``b - A x`` that is small enough, in the place of the solver's own
                tolerances.
        """


def default_rtol(dtype: torch.dtype) -> float:
    """The relative tolerance of a linear solve for which nobody chose one: ``eps ** 0.75``."""
    return float(torch.finfo(dtype).eps ** 0.75)


def tolerance_of(rtol: float | None, atol: float, norm_b: Tensor) -> Tensor:
    """(B,) the norm of ``b - A x`` that these tolerances allow, from (B,) norms of ``b``."""
    return atol + (default_rtol(norm_b.dtype) if rtol is None else rtol) * norm_b


def require_tolerances(owner: object, rtol: float | None, atol: float) -> None:
    """Raise a ValueError naming ``owner`` unless both are numbers >= 0; ``rtol`` may be None."""
    if not ((rtol is None or rtol >= 0) and atol >= 0):
        raise ValueError(f"{type(owner).__name__} tolerances must be >= 0, got rtol={rtol!r}, atol={atol!r}.")
