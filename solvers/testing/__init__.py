"""What a solver is tested and measured with."""

from solvers.testing.conformance import SolverConformance
from solvers.testing.peak_memory import PeakMemory
from solvers.testing.problems import BANK, BankProblem

__all__ = ["BANK", "BankProblem", "PeakMemory", "SolverConformance"]
