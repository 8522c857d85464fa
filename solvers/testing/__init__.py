"""Tools to test and measure solvers: conformance tests, a bank of problems, and a meter of peak memory."""

from solvers.testing.conformance import SolverConformance
from solvers.testing.nonlinear_problems import NONLINEAR, NonlinearProblem
from solvers.testing.peak_memory import PeakMemory
from solvers.testing.problems import BANK, BankProblem

__all__ = ["BANK", "BankProblem", "NONLINEAR", "NonlinearProblem", "PeakMemory", "SolverConformance"]
