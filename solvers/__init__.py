"""Fixed-point solvers for PyTorch: batched, per-sample convergence, no silent failure."""

from solvers._base import Solver, State
from solvers._registry import get_solver
from solvers._solution import ConvergenceError, ConvergenceWarning, Solution, Status
from solvers._solve import Iteration, solve
from solvers._stopping import Stopping
from solvers.anderson import Anderson
from solvers.auto import Auto
from solvers.broyden import Broyden
from solvers.newton_krylov import NewtonKrylov
from solvers.picard import Picard
from solvers.squarem import Squarem

__all__ = [
    "Anderson",
    "Auto",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "Iteration",
    "NewtonKrylov",
    "Picard",
    "Solution",
    "Solver",
    "Squarem",
    "State",
    "Status",
    "Stopping",
    "get_solver",
    "solve",
]
