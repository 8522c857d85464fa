"""The contract of a solver as a class of tests, for the library's solvers and for your own."""

from solvers.testing.conformance._answers import AnswerTests
from solvers.testing.conformance._gradients import GradientTests
from solvers.testing.conformance._independence import IndependenceTests
from solvers.testing.conformance._reports import ReportTests
from solvers.testing.conformance._restarts import RestartTests
from solvers.testing.conformance._steps import StepTests

__all__ = ["SolverConformance"]


class SolverConformance(StepTests, AnswerTests, IndependenceTests, RestartTests, ReportTests, GradientTests):
    """Tests that a solver keeps the contract of :class:`solvers.Solver`; inherit from it in your own test class.

    Give your class a name that begins with ``Test`` and set ``solver``; pytest then runs every test on that solver. A
    failure says what the solver did and what is expected. The tests run on the CPU and take a few seconds.

    Attributes:
        solver: The solver under test. Its class must be defined at the top level of a module, so that it can be
            pickled.
        calls_per_step: How often a step calls the map, or None if that varies. ``init`` must call it once.
        problems: Names of problems in ``solvers.testing.BANK`` that the solver must solve, to a relative residual of
            1e-5 in float32 and 1e-10 in float64.
        max_steps: The number of steps that it may take for any problem. Problems outside the bank contract by a factor
            of at most 0.9.
        movable: Whether a sample that ``restarted`` puts elsewhere must find its solution from there. False for solvers
            that cannot be told, such as those of other packages.

    Example:
        >>> from solvers import Picard
        >>> from solvers.testing import SolverConformance
        >>> class TestDampedPicard(SolverConformance):
        ...     solver = Picard(damping=0.9)
    """
