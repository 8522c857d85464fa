"""The contract of a solver as tests, for solvers of ours and of yours."""

from solvers.testing.conformance._answers import AnswerTests
from solvers.testing.conformance._gradients import GradientTests
from solvers.testing.conformance._independence import IndependenceTests
from solvers.testing.conformance._reports import ReportTests
from solvers.testing.conformance._restarts import RestartTests
from solvers.testing.conformance._steps import StepTests

__all__ = ["SolverConformance"]


class SolverConformance(StepTests, AnswerTests, IndependenceTests, RestartTests, ReportTests, GradientTests):
    """Tests that a solver keeps the contract of :class:`solvers.Solver`.

    Derive a test class from this one, give it a name that begins with Test, and set the solver in it: pytest then runs
    every test. A failure says what the solver did and what is expected of it. The tests run on the CPU and take a few
    seconds.

    Attributes:
        solver: The solver under test. Its class must stand at the top level of a module, so that it can be pickled.
        calls_per_step: How many times a step calls the map; None if that varies. ``init`` always calls it once.
        problems: Names of problems of ``solvers.testing.BANK`` that the solver must solve, to a relative residual of
            1e-5 in float32 and 1e-10 in float64.
        max_steps: How many steps it may take for any problem. Those outside the bank contract by 0.9 or better.
        movable: Whether a sample that ``restarted`` puts elsewhere must find its solution from there. False for solvers
            that cannot be told, such as those of other packages.

    Example:
        >>> from solvers import Picard
        >>> from solvers.testing import SolverConformance
        >>> class TestDampedPicard(SolverConformance):
        ...     solver = Picard(damping=0.9)
    """
