"""The fixed-point methods, one file each, and what only they share."""

from solvers.methods.anderson import Anderson
from solvers.methods.auto import Auto
from solvers.methods.broyden import Broyden
from solvers.methods.newton_krylov import NewtonKrylov
from solvers.methods.picard import Picard
from solvers.methods.solver import Solver, State
from solvers.methods.squarem import Squarem

__all__ = ["Anderson", "Auto", "Broyden", "NewtonKrylov", "Picard", "Solver", "Squarem", "State"]
