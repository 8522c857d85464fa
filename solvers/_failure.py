"""What is done when a sample of a solve fails."""

import warnings
from typing import Literal

from solvers._solution import ConvergenceError, ConvergenceWarning, Solution

OnFailure = Literal["warn", "raise", "ignore"]


def report_failure(solution: Solution, on_failure: OnFailure, what: str = "The fixed-point solve") -> None:
    """Warn or raise, as asked, if a sample of ``solution`` failed."""
    if on_failure == "ignore" or not bool(solution.failed.any()):
        return
    message = f"{what} did not converge for every sample.\n{solution.summary()}"
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
