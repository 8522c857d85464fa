"""The solvers of other packages behind the contract of ours, to compare with and to fall back on.

A package is imported when one of its solvers is constructed. Every call of the map that a foreign solver makes is a
step, even if it only tries a step length or measures a derivative. Tolerances, failures and the best iterate are those
of :func:`solvers.solve`, and the foreign stopping tests are off. Gradients do not flow through the steps.

torchdeq's solvers take the whole batch. SciPy's take one vector, so that each sample has a solver and a thread of its
own: they are meant for batches of up to about a hundred samples, and refuse more than 1024. A step calls the map once
for all samples, but runs each solver's own arithmetic for one sample after another, in tens of microseconds each.
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
