"""Solvers by name, for command lines and configuration files."""

from typing import Any

from solvers._base import Solver
from solvers._names import resolve
from solvers.anderson import Anderson
from solvers.broyden import Broyden
from solvers.newton_krylov import NewtonKrylov
from solvers.picard import Picard

_SOLVERS: dict[str, type[Solver]] = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
    "newton_krylov": NewtonKrylov,
}


def get_solver(solver: Solver | str, **options: Any) -> Solver:
    """The solver of that name with these options; a solver object passes through.

    Args:
        solver: ``"picard"``, ``"anderson"``, ``"broyden"`` or ``"newton_krylov"``, or a solver object.
        **options: The hyperparameters of the named solver.

    Raises:
        ValueError: No solver has that name; the message lists those that exist.
        TypeError: The solver has no such option, or options came with a solver object, or it is no solver.

    Example:
        >>> from solvers import get_solver
        >>> get_solver("anderson", memory=10)
        Anderson(memory=10, damping=1.0, least_squares='gram')
    """
    return resolve(solver, options, Solver, _SOLVERS, "solver")
