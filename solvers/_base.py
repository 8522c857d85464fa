"""What a solver is: hyperparameters, an initial state, and a step."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from solvers._batching import Layout
from solvers._hyperparameters import Hyperparameters

FlatMapping = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class State:
    """What every solver's state holds; a method adds what it remembers.

    Attributes:
        z: (B, D) the iterate.
        fz: (B, D) the map at ``z``.
    """

    z: Tensor
    fz: Tensor


class Solver(Hyperparameters, abc.ABC):
    """A fixed-point method: a frozen, keyword-only dataclass of its hyperparameters.

    A solver works on a flat problem: ``f`` maps (B, D) to (B, D), each row a problem of its own, and a row of the new
    state must depend on that row alone. It does no stopping test, keeps nothing on ``self`` and may reuse the memory
    of the state that it is given. Tolerances, per-sample stopping, failures, the best iterate and the history belong
    to :func:`solvers.solve`, which drives every solver in the same way.

    Attributes:
        differentiable: Whether gradients flow through the steps; the unrolled backward modes refuse a solver whose
            steps they do not flow through.
    """

    differentiable: ClassVar[bool] = True

    @abc.abstractmethod
    def init(self, f: FlatMapping, z0: Tensor) -> State:
        """The state at ``z0`` (B, D); calls ``f`` once, which counts as the first step."""

    @abc.abstractmethod
    def step(self, f: FlatMapping, state: Any) -> Any:
        """The next state. A solver's states are of its own subclass of :class:`State`."""


class FlatMap:
    """The user's map as the solvers see it: (B, D) -> (B, D), counted, checked, and frozen for finished samples."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], layout: Layout) -> None:
        self._f = f
        self._args = args
        self._layout = layout
        self._done: Tensor | None = None
        self._value: Tensor | None = None
        self.num_evals = 0

    def freeze(self, done: Tensor, value: Tensor) -> None:
        """From now on call f with the rows of ``value`` (B, D) where ``done`` (B,), whatever the solver asks for.

        A finished sample's row in the solver's state may degenerate (differences of equal vectors); f never sees it.
        """
        self._done, self._value = done.unsqueeze(1), value

    def __call__(self, z: Tensor) -> Tensor:
        if self._done is not None and self._value is not None:
            z = torch.where(self._done, self._value, z)
        argument = self._layout.unpack(z)
        self.num_evals += 1
        if torch.compiler.is_compiling() or z.is_inference():
            output = self._f(argument, *self._args)
        else:
            version = z._version
            output = self._f(argument, *self._args)
            if z._version != version:
                raise RuntimeError(
                    "f changed its argument z in place, so the iterate is lost. Write out of place: z = z + ... "
                    "instead of z += ..., torch.relu(z) instead of torch.relu_(z)."
                )
        self._layout.check(output)
        return self._layout.pack(output)
