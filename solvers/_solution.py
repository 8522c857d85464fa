"""What a solve returns: the answer and, per sample, whether and how far to trust it."""

import dataclasses
import enum
from collections import Counter
from typing import Any, Generic

import torch
from torch import Tensor

from solvers.problem import S


class Status(enum.IntEnum):
    """How the solve of one sample ended. ``status.message`` says what it means and what to do."""

    message: str

    def __new__(cls, code: int, message: str = "") -> "Status":
        member = int.__new__(cls, code)
        member._value_ = code
        member.message = message
        return member

    CONVERGED = 0, "The residual met the tolerance, and at least one digit of the value is right."
    MAX_STEPS = (
        1,
        "The sample had not converged after max_steps steps. Raise max_steps, loosen rtol or atol, or use a faster "
        "solver.",
    )
    STAGNATED = (
        2,
        "The residual stopped decreasing above the tolerance. The iteration cycles (use another solver, or damping), "
        "there is no fixed point near, or rounding in the map costs digits (loosen the tolerance, or use float64).",
    )
    DIVERGED = (
        3,
        "The residual grew far beyond its start: the map is not a contraction here. Use Anderson or Broyden, lower "
        "the damping, start closer, or constrain the map (for instance with implicit.spectral_norm).",
    )
    NONFINITE = (
        4,
        "The map returned inf or nan, also after shorter steps. Check the inputs and the map at the returned "
        "value, which is the best finite one seen, if there was any.",
    )
    BREAKDOWN = (
        5,
        "The linear solver cannot go on: its search space is exhausted and the operator is singular on it. Check "
        "that 1 is not an eigenvalue of the map's Jacobian (for a root: that the Jacobian of F is not singular), or "
        "regularize the map.",
    )
    UNTESTED = (6, "A fixed number of steps was asked for, so convergence was not tested.")
    PRECISION_FLOOR = (
        7,
        "The residual is a few rounding errors of the dtype and gets no smaller: the answer is as good as the dtype "
        "allows, and the tolerance asks for more. Loosen rtol or atol, or use a wider dtype (also in autocast).",
    )

    UNSETTLED = (
        9,
        "The sample met the tolerance and stopped, but the map has returned another value for it since then: it mixes "
        "samples, or changes from call to call. Samples that are one coupled problem are solved with batch_dims=0.",
    )
    NOT_A_SOLUTION = (
        8,
        "The given answer does not satisfy the condition that it is differentiated by, so that its derivatives would "
        "belong to another problem. Compute it to a smaller tolerance, check that the condition is that of the same "
        "problem (its terms, signs and arguments), or raise the tolerance of the check.",
    )


# The code of a sample that is still being solved. It is not a Status, because no solution has it.
ACTIVE = -1


class ConvergenceWarning(UserWarning):
    """Some samples of a solve did not converge, and ``on_failure="warn"``."""


class ConvergenceError(RuntimeError):
    """Some samples of a solve did not converge. ``error.solution`` holds what was reached."""

    def __init__(self, message: str, solution: "Solution[Any]") -> None:
        super().__init__(message)
        self.solution = solution


@dataclasses.dataclass(eq=False, repr=False)
class Solution(Generic[S]):
    """The result of :func:`solvers.solve` and :func:`solvers.linear.linear_solve`.

    Below, B stands for the batch shape: the leading ``batch_dims`` dimensions of the state.

    Attributes:
        value: Like ``z0``. For each sample, of the iterate z with the smallest ``norm(f(z) - z)``, ``f(z)`` if every
            step so far has brought images closer together than iterates, so that f(z) is nearer to the fixed point;
            else z itself, also where the start has converged, so that no step can tell. For a linear solve, the
            solution vector. A sample whose first evaluation is not finite keeps that evaluation.
        status: (B,) int8, one :class:`Status` per sample.
        residual: (B,) relative residual ``norm(f(z) - z) / norm(f(z))`` of that iterate (linear:
            ``norm(b - A x) / norm(b)``); None when a fixed number of steps was taken without ``history=True``.
        change: (B,) ``norm(f(z) - z)`` at that iterate, in the units of the state and the norm of the stopping test
            (root mean square by default); for a root, ``norm(F(value))`` in the units of F. None where the residual is,
            and for a linear solve.
        error_estimate: (B,) an estimate, no bound, of ``norm(value - fixed point)``: ``change`` times the ratio of
            error and residual along the sample's last step. 0 where the residual is 0, NaN after a single step; None
            where ``change`` is, and after a fixed number of steps.
        num_steps: (B,) int64, the step at which each sample stopped. The first evaluation of f counts as step 1.
        num_evals: Number of calls of f (of the matrix-vector product) for the whole batch; a tensor () where the solve
            is part of a larger graph.
        history: (steps really taken, B) residuals when ``history=True``, else None. A stopped sample repeats its
            best one.
        state: The solver's last state, on the flattened (B, D) problem; None for roots that were found in parts.
        adjoint: The Solution of the linear solve in the backward pass, filled in by backward modes that make one.
        scaling: (B,) for a root, the c with which the solver saw it as a fixed point of ``z - c F(z)``; else None,
            as for roots that were found in parts.
        solver: The linear solver that a linear solve was made by; else None.
        backward: The backward mode that the value's gradient is computed by; None where no gradient is recorded.
        is_image: (B,) bool, whether the value is ``f(z)``, and not z; None for a linear solve, and for roots that were
            found in parts.
    """

    value: S
    status: Tensor
    residual: Tensor | None
    num_steps: Tensor
    num_evals: int
    history: Tensor | None = None
    change: Tensor | None = None
    error_estimate: Tensor | None = None
    state: Any = None
    scaling: Tensor | None = None
    solver: Any = None
    adjoint: "Solution[Any] | None" = None
    backward: Any = None
    is_image: Tensor | None = None

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self._names()).items())
        worst = "" if self.residual is None or not self.residual.numel() else f", residual <= {self._worst():.1e}"
        solver = "" if self.solver is None else f", solver={self.solver!r}"
        return f"Solution({counts or 'no samples'}{worst}, num_evals={self.num_evals}{solver})"

    def statuses(self) -> Any:
        """The names of the statuses, as nested lists in the batch shape; one string for a single problem.

        Example:
            >>> import torch
            >>> from solvers import solve
            >>> a = torch.tensor([[0.5], [3.0]])
            >>> solve(lambda z: a * z + 1, torch.zeros(2, 1), "picard", on_failure="ignore").statuses()
            ['CONVERGED', 'DIVERGED']
        """

        def named(codes: Any) -> Any:
            return [named(code) for code in codes] if isinstance(codes, list) else Status(codes).name

        return named(self.status.tolist())

    def _names(self) -> list[str]:
        return [Status(code).name for code in self.status.flatten().tolist()]

    def _worst(self) -> float:
        assert self.residual is not None
        return float(self.residual.detach().nan_to_num(nan=torch.inf).max())

    @property
    def converged(self) -> Tensor:
        """(B,) bool: which samples met the tolerance."""
        return self.status == Status.CONVERGED

    @property
    def failed(self) -> Tensor:
        """(B,) bool: which samples were tested and did not meet the tolerance."""
        return (self.status != Status.CONVERGED) & (self.status != Status.UNTESTED)

    def error_bound(self, contraction: float | Tensor) -> Tensor:
        """How far the value can be from the fixed point, given that the map contracts.

        If ``norm(f(x) - f(y)) <= q norm(x - y)`` for all x and y, then by Banach's theorem

            norm(value - fixed point) <= norm(f(z) - z) / (1 - q),

        and q times that where the value is f(z). Rounding in the map comes on top. The bound is certain only if q is: a
        bound on the map's Lipschitz constant in the norm of the stopping test; in the Euclidean norm, and so in the
        root mean square, such as a product of spectral norms and of the largest slopes of activations. Without q there
        is ``error_estimate``.

        Args:
            contraction: q in [0, 1), one for all samples or (B,).

        Returns:
            (B,) bounds on the error, in the norm of the stopping test (root mean square by default).

        Raises:
            ValueError: q is not in [0, 1), or the solution has no residual.

        Example:
            >>> import torch
            >>> from solvers import solve
            >>> solution = solve(lambda z: 0.5 * z + 1, torch.zeros(1, 1), "picard", rtol=1e-3)
            >>> float((solution.value - 2).abs()) <= float(solution.error_bound(0.5)) * (1 + 1e-6)
            True
        """
        q = contraction
        if not bool(torch.as_tensor((q >= 0) & (q < 1)).all()):  # of a number that no dtype has rounded
            raise ValueError(f"error_bound needs a contraction factor in [0, 1), got {contraction!r}.")
        if self.change is None:
            raise ValueError(
                "This solution has no residual, so nothing bounds its error. Solve to a tolerance or with history=True."
            )
        bound = self.change / (1 - q)
        return bound if self.is_image is None else torch.where(self.is_image, q * bound, bound)

    def raise_if_failed(self) -> None:
        """Raise :class:`ConvergenceError`, with this solution on it, if any sample failed."""
        if bool(self.failed.any()):
            raise ConvergenceError(self.summary(), self)

    def summary(self) -> str:
        """How many samples ended how, the worst of each kind, and what to do about it."""
        status = self.status.flatten().cpu()
        residual = None if self.residual is None else self.residual.detach().flatten().cpu()
        lines = []
        for member in Status:
            indices = (status == member).nonzero().flatten().tolist()
            if not indices:
                continue
            line = f"{len(indices)} of {status.numel()} samples {member.name}"
            if member is not Status.CONVERGED:
                line += f": {member.message}"
                if member is Status.BREAKDOWN:
                    line += getattr(self.solver, "on_breakdown", "")
            if member is not Status.UNTESTED and residual is not None:
                worst = max(indices, key=lambda i: _nan_to_inf(float(residual[i])))
                line += f" (worst residual {float(residual[worst]):.2e}, sample {self._index(worst)})"
            lines.append(line)
        return "\n".join(lines) or "The batch is empty."

    def _index(self, flat: int) -> int | tuple[int, ...]:
        """The position of a flattened sample in the batch shape, as a user would index it."""
        if self.status.dim() <= 1:
            return flat
        return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), self.status.shape))


def _nan_to_inf(x: float) -> float:
    return float("inf") if x != x else x
