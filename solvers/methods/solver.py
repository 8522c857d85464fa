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
    """What every solver's state holds; each method adds what it remembers.

    The first dimension of every tensor in a state indexes the samples, also in dataclasses within it. Per-sample data
    that is not a tensor, or must be closed, goes into a :class:`Resource`.

    Attributes:
        z: (B, D) the iterate.
        fz: (B, D) the map at ``z``.
    """

    z: Tensor
    fz: Tensor

    @property
    def displacement(self) -> Tensor:
        """(B, D) ``f(z) - z``. A state that stores it returns the stored one."""
        return self.fz - self.z

    @property
    def image_is_nearer(self) -> bool | None:
        """Whether f(z) is nearer to the solution than z; None: it is if the steps bring images closer together.

        Override it with False for a method that converges where the map does not contract, such as operator splitting:
        there its steps may contract, and f(z) can miss the tolerance that z meets. The value is then z.
        """
        return None

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """The tensors that a step of a state of fixed shape writes into; all others it makes anew."""
        return ()


class Resource(abc.ABC):
    """A field of a state that is more than data, such as a running solver of another package."""

    @abc.abstractmethod
    def select(self, keep: Tensor) -> Self:
        """The same for only the samples at the positions ``keep`` (n,); this object is not used afterwards."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what this object holds. :func:`solvers.solve` calls it after the last step."""


class Solver(Hyperparameters, abc.ABC):
    """A fixed-point method: a frozen, keyword-only dataclass of its hyperparameters.

    A solver works on a flat problem: ``f`` maps (B, D) to (B, D), each row is a problem of its own, and a row of the
    new state must depend only on that row. A solver does no stopping test and keeps nothing on ``self``. ``step`` and
    ``restarted`` may overwrite any tensor of the given state except ``z`` and ``fz``, which the caller and ``f`` may
    hold. Tolerances, per-sample stopping, failures, the best iterate and the history belong to :func:`solvers.solve`,
    which drives every solver in the same way. :class:`solvers.testing.SolverConformance` tests all this on any solver.

    Attributes:
        differentiable: Whether gradients flow through the steps. The unrolled backward modes refuse a solver for which
            this is False. The gradients are those of the steps taken: where the start is solved already, in a sample
            or in some of its entries, few steps suffice for the value but not for its gradient. Take more steps, or
            use the implicit backward mode, whose gradient does not depend on the start.
        estimates_inverse: Whether its states have an attribute ``inverse``, an estimate of the inverse Jacobian of
            ``f(z) - z``, with the product ``mv`` and the product with its transpose, ``rmv``.
    """

    differentiable: ClassVar[bool] = True
    estimates_inverse: ClassVar[bool] = False
    options_of_solves: ClassVar[tuple[str, ...]] = ("rtol", "atol", "max_steps")

    @abc.abstractmethod
    def init(self, f: FlatMapping, z0: Tensor) -> State:
        """The state at ``z0`` (B, D); calls ``f`` once, which counts as the first step."""

    @abc.abstractmethod
    def step(self, f: FlatMapping, state: Any) -> Any:
        """The next state. A solver's states are of its own subclass of :class:`State`."""

    @property
    def compiles(self) -> bool:
        """Whether the method has a form whose tensors keep their shapes: :meth:`fixed_shape`, for compiled solves."""
        return False

    def fixed_shape(self, state: Any, room: int) -> Any:
        """The state in a form whose tensors keep their shapes and strides in a step.

        ``step`` must take it as well, without looking at the host: numbers of steps, and all else that changes, are
        tensors then, and what is remembered has all its room already, filled with zeros. The tensors that a step writes
        into are the :attr:`State.blocks`. Called after any step, if :attr:`compiles`.

        Args:
            state: A state of either form.
            room: For how many more steps there must be room at least, if the method's memory has no limit.
        """
        raise NotImplementedError(f"{type(self).__name__} has no state of fixed shape.")

    def room(self, state: Any) -> Tensor | None:
        """For a state of fixed shape: () int64, how many steps it has room for; None where that has no end."""
        return None

    def restarted(self, state: Any, rows: Tensor, z: Tensor, fz: Tensor) -> Any:
        """The state with some samples at other points, as if they began there.

        :func:`solvers.solve` calls this when a step led a sample astray, for example to values that are not finite. The
        other samples keep their state bit for bit. This default replaces ``z`` and ``fz``. Override it if the state
        holds anything else that those steps determined, such as differences of iterates or step lengths: forget all
        of it for these samples, even if it is not finite.

        Args:
            state: The state after a step.
            rows: (B,) bool, the samples to restart.
            z: (B, D) where to restart them; the other rows are not used.
            fz: (B, D) the map at ``z``, likewise.
        """
        return dataclasses.replace(state, z=replaced(state.z, rows, z), fz=replaced(state.fz, rows, fz))


def replaced(tensor: Tensor, rows: Tensor, other: Tensor) -> Tensor:
    """A new tensor (B, ...): ``other`` in the samples ``rows`` (B,), or () for all, and ``tensor`` in the rest."""
    rows = rows.view(-1, *[1] * (tensor.dim() - 1))
    if tensor.dtype == torch.bool:  # between which ONNX Runtime cannot choose
        return (rows & other) | (~rows & tensor)
    return torch.where(rows, other, tensor)


def take_samples(state: Any, keep: Tensor) -> Any:
    """A solver's state for only the samples at the positions ``keep`` (n,)."""

    def take(part: Tensor | Resource) -> Tensor | Resource:
        return part.select(keep) if isinstance(part, Resource) else part.index_select(0, keep)

    return with_tensors(state, take, (Tensor, Resource))


def checked_state(solver: Solver, method: str, state: Any, z: Tensor) -> Any:
    """The ``state`` that a method of a solver has returned; an error if it is none for states like ``z`` (B, D)."""
    if not isinstance(state, State):
        raise TypeError(f"{solver!r}.{method} must return a solvers.State, got a {type(state).__name__}.")
    if state.z.shape != z.shape or state.fz.shape != z.shape:
        raise ValueError(
            f"{solver!r}.{method} must return a state with z and fz of the shape {tuple(z.shape)}, one row a sample, "
            f"got {tuple(state.z.shape)} and {tuple(state.fz.shape)}."
        )
    return state


def close(state: State) -> None:
    """Release what a solver's state holds besides data."""
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Resource):
            value.close()
