"""Tools to test and measure solvers: conformance tests, a bank of problems, and a meter of peak memory."""

from solvers.problem.peak_memory import PeakMemory
from solvers.testing.conformance import SolverConformance
from solvers.testing.nonlinear_problems import NONLINEAR, NonlinearProblem
from solvers.testing.problems import BANK, BankProblem
from solvers.testing.real_maps import REAL_MAPS, RealMap
from solvers.testing.status_maps import STATUS_MAPS, StatusMap

__all__ = [
    "BANK",
    "BankProblem",
    "NONLINEAR",
    "NonlinearProblem",
    "PeakMemory",
    "REAL_MAPS",
    "RealMap",
    "STATUS_MAPS",
    "SolverConformance",
    "StatusMap",
]
