"""The keyword arguments of solves, for the type checker's view of functions whose result depends on one of them."""

from typing import TypedDict

from implicit.backward import Backward
from solvers import NotGiven, Solver, StopRule, Tolerance
from solvers.problem import InDims, OnFailure


class LayerKeywords(TypedDict, total=False):
    """Those of :class:`implicit.FixedPointLayer`."""

    solver: Solver | str
    backward: Backward | str
    stopping: StopRule | None
    rtol: Tolerance
    atol: Tolerance
    max_steps: int | NotGiven
    check_every: int | NotGiven
    batch_dims: int
    compact: bool
    in_dims: InDims
    compile: bool
    on_failure: OnFailure


class SolveKeywords(LayerKeywords, total=False):
    """Those of :func:`implicit.fixed_point`."""

    history: bool


class RootKeywords(SolveKeywords, total=False):
    """Those of :func:`implicit.root`."""

    chunk_size: int | None
