"""What a linear solver is."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from solvers._hyperparameters import Hyperparameters

FlatMatvec = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class LinearResult:
    """What a linear solver returns for the flat problem; fields as in :class:`solvers.Solution`.

    Attributes:
        x: (B, D); nan for a sample that ended NONFINITE before any progress.
        status: (B,) int8.
        residual: (B,) ``norm(b - A x) / norm(b)``.
        num_steps: (B,) int64.
        history: (steps, B) residuals as the method estimates them while it runs.
    """

    x: Tensor
    status: Tensor
    residual: Tensor
    num_steps: Tensor
    history: Tensor


class LinearSolver(Hyperparameters, abc.ABC):
    """A method for ``A x = b`` given only products with A; a frozen dataclass with its own tolerances.

    Attributes:
        tested: Whether the method tests its residual. One that does not never waits for the device, and compiles.
    """

    tested: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, matvec: FlatMatvec, b: Tensor, tolerance: Tensor | None = None) -> LinearResult:
        """Solve ``matvec(x) = b`` for x; both (B, D), each row a system of its own.

        Args:
            matvec: The product with A.
            b: (B, D) right-hand sides.
            tolerance: (B,) the root mean square of ``b - A x`` that is small enough, in the place of the solver's own
                tolerances.
        """
