"""Linear solvers by name, for command lines and configuration files."""

from typing import Any

from solvers.linear.bicgstab import BiCGStab
from solvers.linear.cg import CG, NormalCG
from solvers.linear.dense import AutoLinear, Dense
from solvers.linear.gmres import GMRES
from solvers.linear.linear_solver import LinearSolver
from solvers.linear.neumann import NeumannSeries
from solvers.linear.richardson import Richardson
from solvers.problem.names import resolve

_LINEAR_SOLVERS: dict[str, type[LinearSolver]] = {
    "gmres": GMRES,
    "cg": CG,
    "normal_cg": NormalCG,
    "bicgstab": BiCGStab,
    "dense": Dense,
    "richardson": Richardson,
    "neumann": NeumannSeries,
    "auto": AutoLinear,
}


def get_linear_solver(solver: LinearSolver | str, **options: Any) -> LinearSolver:
    """The linear solver of that name with these options; a solver object passes through.

    Args:
        solver: ``"gmres"``, ``"cg"``, ``"normal_cg"``, ``"bicgstab"``, ``"dense"``, ``"richardson"``, ``"neumann"`` or
            ``"auto"``, or a linear solver.
        **options: The hyperparameters of the named solver.

    Raises:
        ValueError: No linear solver has that name; the message lists those that exist.
        TypeError: The solver has no such option, or options came with a solver object, or it is no linear solver.

    Example:
        >>> from solvers.linear import get_linear_solver
        >>> get_linear_solver("neumann", terms=3)
        NeumannSeries(terms=3)
    """
    return resolve(solver, options, LinearSolver, _LINEAR_SOLVERS, "linear solver")
