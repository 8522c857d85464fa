"""Solvers by name, for command lines and configuration files."""

from typing import Any

from solvers.adapters.scipy import SciPyAnderson, SciPyBroyden1, SciPyDFSane, SciPyHybr, SciPyKrylov
from solvers.adapters.torchdeq import (
    TorchDEQAnderson,
    TorchDEQBroyden,
    TorchDEQFixedPointIter,
    TorchDEQSimpleFixedPointIter,
)
from solvers.methods.anderson import Anderson
from solvers.methods.auto import Auto
from solvers.methods.broyden import Broyden
from solvers.methods.newton import Newton
from solvers.methods.newton_krylov import NewtonKrylov
from solvers.methods.picard import Picard
from solvers.methods.solver import Solver
from solvers.methods.squarem import Squarem
from solvers.problem.names import resolve

_SOLVERS: dict[str, type[Solver]] = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
    "newton": Newton,
    "newton_krylov": NewtonKrylov,
    "squarem": Squarem,
    "auto": Auto,
    "torchdeq:anderson": TorchDEQAnderson,
    "torchdeq:broyden": TorchDEQBroyden,
    "torchdeq:fixed_point_iter": TorchDEQFixedPointIter,
    "torchdeq:simple_fixed_point_iter": TorchDEQSimpleFixedPointIter,
    "scipy:anderson": SciPyAnderson,
    "scipy:broyden1": SciPyBroyden1,
    "scipy:krylov": SciPyKrylov,
    "scipy:df-sane": SciPyDFSane,
    "scipy:hybr": SciPyHybr,
}


def get_solver(solver: Solver | str, **options: Any) -> Solver:
    """The solver of that name with these options; a solver object passes through.

    Args:
        solver: ``"picard"``, ``"anderson"``, ``"broyden"``, ``"newton"``, ``"newton_krylov"``, ``"squarem"`` or
            ``"auto"``, or one of another package, such as ``"torchdeq:anderson"`` or ``"scipy:krylov"`` (see
            :mod:`solvers.adapters`), or a solver object.
        **options: The hyperparameters of the named solver.

    Raises:
        ValueError: No solver has that name; the message lists those that exist.
        TypeError: The solver has no such option, or options came with a solver object, or it is no solver.
        ImportError: The solver is of a package that is not installed.

    Example:
        >>> from solvers import get_solver
        >>> get_solver("anderson", memory=10)
        Anderson(memory=10, damping=1.0, least_squares='gram', safeguard=True)
    """
    return resolve(solver, options, Solver, _SOLVERS, "solver")
