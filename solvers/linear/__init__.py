"""Matrix-free linear solvers, batched per sample."""

from solvers.linear.bicgstab import BiCGStab
from solvers.linear.cg import CG, NormalCG
from solvers.linear.dense import AutoLinear, Dense
from solvers.linear.gmres import GMRES
from solvers.linear.linear_solve import linear_solve
from solvers.linear.linear_solver import LinearResult, LinearSolver
from solvers.linear.names import get_linear_solver
from solvers.linear.neumann import NeumannSeries
from solvers.linear.operator import FlatMatvec
from solvers.linear.richardson import Richardson

__all__ = [
    "AutoLinear",
    "BiCGStab",
    "CG",
    "Dense",
    "FlatMatvec",
    "GMRES",
    "LinearResult",
    "LinearSolver",
    "NeumannSeries",
    "NormalCG",
    "Richardson",
    "get_linear_solver",
    "linear_solve",
]
