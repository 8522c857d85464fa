"""What is done when a sample of a solve fails."""

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

from solvers._solution import ConvergenceError, ConvergenceWarning, Solution
from solvers.problem import OnFailure

# Packages whose lines a user did not write: a warning points above them.
_LIBRARY = {"solvers", "implicit", "imixer", "torch"}


def report_failure(
    solution: Solution[Any],
    on_failure: OnFailure,
    what: str = "The fixed-point solve",
    *,
    failed: str = "did not converge",
    goal: str = "",
    advice: Callable[[], str] | None = None,
) -> None:
    """Warn or raise, as asked, if a sample of ``solution`` failed.

    The message says how many samples failed and how, the worst residual, and what to do. The warning points at the line
    of the caller's program; Python's default filter shows it once for each such line and each ``what``.

    Args:
        solution: The solution.
        on_failure: "warn", "raise" or "ignore".
        what: What was solved, as the beginning of a sentence.
        failed: What the failed samples did, as the end of a sentence.
        goal: The tolerance.
        advice: Gives a further sentence. It is called only if there is something to report.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
    """
    if on_failure == "ignore" or not bool(solution.failed.any()):
        return
    number, total = int(solution.failed.sum()), solution.failed.numel()
    to = f" to {goal}" if goal else ""
    lines = [f"{what} {failed}{to} for {number} of {total} samples.", solution.summary()]
    if advice is not None and (extra := advice()):
        lines.append(extra)
    message = "\n".join(lines)
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warn_caller(message, ConvergenceWarning, same=what)


def warn_caller(message: str, category: type[Warning], *, same: str) -> None:
    """Warn at the line of the user's program that led here.

    Args:
        message: The text.
        category: The kind of warning.
        same: Warnings at one line count as the same for Python's filters if this is equal, whatever their numbers.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARY:
        frame = frame.f_back
    if frame is None:  # in a thread of autograd's engine
        warnings.warn(category(_Text(message, same)), stacklevel=2)
        return
    warnings.warn_explicit(
        category(_Text(message, same)),
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


class _Text(str):
    """A message that Python's record of warnings shown takes for equal to another one of the same kind."""

    _same: str

    def __new__(cls, text: str, same: str) -> "_Text":
        self = super().__new__(cls, text)
        self._same = same
        return self

    def __str__(self) -> str:
        return self

    def __eq__(self, other: object) -> bool:
        return self._same == other._same if isinstance(other, _Text) else str.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(self._same)
