"""What a solver is: hyperparameters, an initial state, and a step."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from solvers._autocast import AutocastMode
from solvers._batching import Layout
from solvers._hyperparameters import Hyperparameters
from solvers._replaced_tensors import with_tensors

FlatMapping = Callable[[Tensor], Tensor]

# Which dimension of each argument indexes the samples, as in torch.func.vmap.
InDims = int | None | tuple[int | None, ...]


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


class FlatMap:
    """The user's map as the solvers see it: (B, D) -> (B, D), counted, checked, and frozen for finished samples."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], layout: Layout) -> None:
        self._f = f
        self._args = args
        self._layout = layout
        # The driver switches autocast off for the solver's algebra; f runs in the mode that it was given in.
        self._autocast = AutocastMode.current(layout.device.type)
        self._done: Tensor | None = None
        self._value: Tensor | None = None
        self.num_evals = 0

    @property
    def eps(self) -> float:
        """The relative rounding error of what f returns: that of the coarsest dtype of the state, or of autocast."""
        dtypes = [*self._layout.dtypes, *((self._autocast.dtype,) if self._autocast.dtype else ())]
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def freeze(self, done: Tensor, value: Tensor) -> None:
        """From now on call f with the rows of ``value`` (B, D) where ``done`` (B,), whatever the solver asks for.

        A finished sample's row in the solver's state may degenerate (differences of equal vectors); f never sees it.
        """
        self._done, self._value = done.unsqueeze(1), value

    def check_in_dims(self, in_dims: InDims) -> None:
        """Raise a ValueError unless every argument has the samples where ``in_dims`` says."""
        for number, (arg, dim) in enumerate(zip(self._args, self._dims(in_dims), strict=True)):
            for leaf in tree_leaves(arg):
                if dim is None or not isinstance(leaf, Tensor):
                    continue
                if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != self._layout.batch_size:
                    raise ValueError(
                        f"compact=True takes dimension {dim} of argument {number} for the {self._layout.batch_size} "
                        f"samples, but its shape is {tuple(leaf.shape)}. Say in in_dims which dimension it is, or None."
                    )

    def take_samples(self, keep: Tensor, in_dims: InDims) -> None:
        """From now on the batch is the samples at the positions ``keep`` (n,)."""

        def take(arg: Any, dim: int | None) -> Any:
            return arg if dim is None else tree_map_only(Tensor, lambda leaf: leaf.index_select(dim, keep), arg)

        self._args = tuple(take(arg, dim) for arg, dim in zip(self._args, self._dims(in_dims), strict=True))
        self._layout = self._layout.resized(len(keep))
        self._done = self._value = None

    def _dims(self, in_dims: InDims) -> tuple[int | None, ...]:
        """One entry an argument."""
        if not isinstance(in_dims, tuple):
            return (in_dims,) * len(self._args)
        if len(in_dims) != len(self._args):
            raise ValueError(f"in_dims must have one entry for each of the {len(self._args)} args, got {in_dims!r}.")
        return in_dims

    def __call__(self, z: Tensor) -> Tensor:
        if self._done is not None and self._value is not None:
            z = torch.where(self._done, self._value, z)
        argument = self._layout.unpack(z)
        self.num_evals += 1
        versioned = not (torch.compiler.is_compiling() or z.is_inference())
        version = z._version if versioned else 0
        with self._autocast.in_force():
            output = self._f(argument, *self._args)
            self._layout.check(output)
        if versioned and z._version != version:
            raise RuntimeError(
                "f changed its argument z in place, so the iterate is lost. Write out of place: z = z + ... "
                "instead of z += ..., torch.relu(z) instead of torch.relu_(z)."
            )
        return self._layout.pack(output)


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
