"""The solvers of other packages behind the contract of ours, to compare with and to fall back on.

A package is imported when one of its solvers is made. Every call of the map that a foreign solver makes is a step, also
one that tries a step length or measures a derivative; tolerances, failures and the best iterate are those of
:func:`solvers.solve`, and the foreign stopping tests are off. Gradients do not flow through the steps.

torchdeq's solvers take the whole batch. SciPy's take one vector, so that each sample has a solver, and a thread, of its
own: they are made for batches of up to about a hundred samples, and refuse more than 1024. Each solver's own arithmetic
runs for one sample after the other, in tens of microseconds for a step, beside one call of the map for all of them.
"""

from solvers.adapters.scipy import SciPyAnderson, SciPyBroyden1, SciPyDFSane, SciPyHybr, SciPyKrylov
from solvers.adapters.torchdeq import (
    TorchDEQAnderson,
    TorchDEQBroyden,
    TorchDEQFixedPointIter,
    TorchDEQSimpleFixedPointIter,
)

__all__ = [
    "SciPyAnderson",
    "SciPyBroyden1",
    "SciPyDFSane",
    "SciPyHybr",
    "SciPyKrylov",
    "TorchDEQAnderson",
    "TorchDEQBroyden",
    "TorchDEQFixedPointIter",
    "TorchDEQSimpleFixedPointIter",
]
