"""What a solver is: hyperparameters, an initial state, and a step."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from solvers.problem.hyperparameters import Hyperparameters
from solvers.problem.replaced_tensors import with_tensors

FlatMapping = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class State:
    """What every solver's state holds; a method adds what it remembers.

    Every tensor in a state has the samples as its first dimension, also in dataclasses within it. What has samples and
    is no tensor, or has to be let go of, is a :class:`Resource`.

    Attributes:
        z: (B, D) the iterate.
        fz: (B, D) the map at ``z``.
    """

    z: Tensor
    fz: Tensor


class Resource(abc.ABC):
    """A field of a state that is more than data, such as a solver of another package on its way."""

    @abc.abstractmethod
    def select(self, keep: Tensor) -> Self:
        """The same for the samples at the positions ``keep`` (n,) alone; this one is not used any more."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of it, for no further step is taken: :func:`solvers.solve` is over."""


class Solver(Hyperparameters, abc.ABC):
    """A fixed-point method: a frozen, keyword-only dataclass of its hyperparameters.

    A solver works on a flat problem: ``f`` maps (B, D) to (B, D), each row a problem of its own, and a row of the new
    state must depend on that row alone. It does no stopping test and keeps nothing on ``self``. Of the state that it is
    given it may reuse the memory, but for that of ``z`` and ``fz``, which the caller and ``f`` may hold. Tolerances,
    per-sample stopping, failures, the best iterate and the history belong to :func:`solvers.solve`, which drives every
    solver in the same way. :class:`solvers.testing.SolverConformance` tests all this on any solver.

    Attributes:
        differentiable: Whether gradients flow through the steps; the unrolled backward modes refuse a solver whose
            steps they do not flow through.
        estimates_inverse: Whether its states have an attribute ``inverse``, an estimate of the inverse Jacobian of
            ``f(z) - z`` with products ``mv`` and, with its transpose, ``rmv``.
    """

    differentiable: ClassVar[bool] = True
    estimates_inverse: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, f: FlatMapping, z0: Tensor) -> State:
        """The state at ``z0`` (B, D); calls ``f`` once, which counts as the first step."""

    @abc.abstractmethod
    def step(self, f: FlatMapping, state: Any) -> Any:
        """The next state. A solver's states are of its own subclass of :class:`State`."""

    def restarted(self, state: Any, rows: Tensor, z: Tensor, fz: Tensor) -> Any:
        """TEMP."""
        r = rows.unsqueeze(1)
        return dataclasses.replace(state, z=torch.where(r, z, state.z), fz=torch.where(r, fz, state.fz))


def take_samples(state: Any, keep: Tensor) -> Any:
    """A solver's state for the samples at the positions ``keep`` (n,) alone."""

    def take(part: Tensor | Resource) -> Tensor | Resource:
        return part.select(keep) if isinstance(part, Resource) else part.index_select(0, keep)

    return with_tensors(state, take, (Tensor, Resource))


def close(state: State) -> None:
    """Let go of what a solver's state holds beside data."""
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Resource):
            value.close()
