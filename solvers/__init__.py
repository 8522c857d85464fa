"""Fixed-point solvers for PyTorch, batched, with a status for every sample."""

from solvers._compiled import NotCompiledWarning
from solvers._compiled_adjoint import compiled_adjoint_solver
from solvers._failure import report_failure
from solvers._registry import get_solver
from solvers._solution import ConvergenceError, ConvergenceWarning, Solution, Status
from solvers._solve import Iteration, solve
from solvers._solve_root import solve_root
from solvers._stopping import NOT_GIVEN, NotGiven, Steps, Stopping, StopRule, Tolerance, stop_rule
from solvers.methods.anderson import Anderson
from solvers.methods.auto import Auto
from solvers.methods.broyden import Broyden
from solvers.methods.newton import Newton
from solvers.methods.newton_krylov import NewtonKrylov
from solvers.methods.picard import Picard
from solvers.methods.solver import Solver, State
from solvers.methods.squarem import Squarem

__all__ = [
    "Anderson",
    "Auto",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "Iteration",
    "NOT_GIVEN",
    "Newton",
    "NewtonKrylov",
    "NotCompiledWarning",
    "NotGiven",
    "Picard",
    "Solution",
    "Solver",
    "Squarem",
    "State",
    "Status",
    "Steps",
    "StopRule",
    "Stopping",
    "Tolerance",
    "compiled_adjoint_solver",
    "get_solver",
    "report_failure",
    "solve",
    "solve_root",
    "stop_rule",
]
