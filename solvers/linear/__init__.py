"""Matrix-free linear solvers, batched per sample."""

from solvers.linear.bicgstab import BiCGStab
from solvers.linear.gmres import GMRES
from solvers.linear.linear_solve import linear_solve
from solvers.linear.linear_solver import FlatMatvec, LinearResult, LinearSolver
from solvers.linear.neumann import NeumannSeries
from solvers.linear.richardson import Richardson

__all__ = [
    "BiCGStab",
    "FlatMatvec",
    "GMRES",
    "LinearResult",
    "LinearSolver",
    "NeumannSeries",
    "Richardson",
    "linear_solve",
]
