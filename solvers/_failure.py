"""What is done when a sample of a solve fails."""

import warnings
from typing import Literal

from solvers._solution import ConvergenceError, ConvergenceWarning, Solution, Status

OnFailure = Literal["warn", "raise", "ignore"]


def report_failure(solution: Solution, on_failure: OnFailure, what: str = "The fixed-point solve") -> None:
    """Warn or raise, as asked, if a sample of ``solution`` failed.

    The error says how many samples failed, and how far. The warning does not, so that its text is the same every time
    and Python shows it once for each place in a program, not in every step of a training.
    """
    if on_failure == "ignore" or not bool(solution.failed.any()):
        return
    what = f"{what} did not converge for every sample."
    if on_failure == "raise":
        raise ConvergenceError(f"{what}\n{solution.summary()}", solution)
    kinds = [status for status in Status if bool((solution.failed & (solution.status == status)).any())]
    meaning = "\n".join(f"{status.name}: {status.message}" for status in kinds)
    warnings.warn(
        f"{what}\n{meaning}\nsolution.summary() tells which samples, and how far they got.",
        ConvergenceWarning,
        stacklevel=3,
    )
