"""The user's map as the solvers see it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from solvers.problem.autocast import AutocastMode
from solvers.problem.layout import Layout

# Which dimension of each argument indexes the samples, as in torch.func.vmap.
InDims = int | None | tuple[int | None, ...]
# What a map returns twice for the same arguments may differ by so many rounding errors.
ROUNDING = 64


def version_of(z: Tensor) -> int | None:
    """How often z has been written to in place; None where PyTorch does not say."""
    return None if torch.compiler.is_compiling() or z.is_inference() else z._version


def check_not_written(z: Tensor, version: int | None, what_happened: str) -> None:
    """Raise a RuntimeError that begins with ``what_happened`` if z is no longer at :func:`version_of` then."""
    if version is not None and z._version != version:
        raise RuntimeError(
            f"{what_happened} Write out of place: z = z + ... instead of z += ..., torch.relu(z) instead of "
            "torch.relu_(z)."
        )


def require_callable(name: str, f: object) -> None:
    """Raise a TypeError that begins with ``name`` unless ``f`` can be called, and is no class."""
    if isinstance(f, type):
        raise TypeError(
            f"{name} must be given a map, got the class {f.__name__}. Make an object of it first: {f.__name__}(...)."
        )
    if not callable(f):
        raise TypeError(f"{name} must be given a callable, got {f!r}. Pass a function or a module.")


class FlatMap:
    """The user's map as the solvers see it: (B, D) -> (B, D), counted, checked, and frozen for finished samples.

    Attributes:
        called: What messages call the user's function.
        layout: The layout of the state.
        args: What the user's function takes after the state.
        autocast: The mode in which the user's function runs: by default that in force at construction.
        scaling: (B, 1) what the user's function is multiplied by, for one whose roots are sought; else None.
        scaling_of_all: (B,) the same, of the samples that have been taken out as well.
    """

    called = "f"
    scaling: Tensor | None = None
    scaling_of_all: Tensor | None = None

    def __init__(
        self, f: Callable[..., Any], args: tuple[Any, ...], layout: Layout, autocast: AutocastMode | None = None
    ) -> None:
        require_callable("The solver", f)
        if not isinstance(args, (tuple, list)):
            raise TypeError(
                f"args must be a tuple of what f takes after z, got a {type(args).__name__}. For one, write args=(x,)."
            )
        self._f = f
        self.args = tuple(args)
        self.layout = layout
        # The driver switches autocast off for the solver's algebra; f runs in the mode that it was given in.
        self.autocast = autocast or AutocastMode.current(layout.device.type)
        self._active: Tensor | None = None
        self._value: Tensor | None = None
        self.num_evals: Any = 0
        # Of the last two calls in which rows were frozen: which ones were not (B, 1), and what f returned (B, D).
        self.held_calls: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def eps(self) -> float:
        """The relative rounding error of what f returns: that of the coarsest dtype of the state, or of autocast."""
        return max(torch.finfo(dtype).eps for dtype in self.autocast.dtypes_of(self.layout.dtypes))

    @property
    def unit(self) -> Tensor | None:
        """(B,) the size of a state that belongs to an absolute tolerance of 1; None where it is 1."""
        return None

    def freeze(self, active: Tensor, value: Tensor) -> None:
        """From now on call f with the rows of ``value`` (B, D) where not ``active`` (B,), whatever the solver asks for.

        A finished sample's row in the solver's state may degenerate (differences of equal vectors); f never sees it.
        """
        self._active, self._value = active.unsqueeze(1), value

    @property
    def frozen(self) -> Tensor | None:
        """(B,) bool, the samples for which f is called with another value than is asked for; None without any."""
        return None if self._active is None else ~self._active.squeeze(1)

    def check_in_dims(self, in_dims: InDims) -> None:
        """Raise a ValueError unless every argument has the samples where ``in_dims`` says."""
        for number, (arg, dim) in enumerate(zip(self.args, self._dims(in_dims), strict=True)):
            for leaf in tree_leaves(arg):
                if dim is None or not isinstance(leaf, Tensor):
                    continue
                if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != self.layout.batch_size:
                    raise ValueError(
                        f"compact=True and chunk_size take dimension {dim} of argument {number} for the "
                        f"{self.layout.batch_size} samples, but its shape is {tuple(leaf.shape)}. Say in in_dims "
                        "which dimension it is, or None."
                    )

    def take_samples(self, keep: Tensor | range, in_dims: InDims) -> None:
        """From now on the batch is the samples at the positions ``keep`` (n,)."""
        self.args = self.args_of(keep, in_dims)
        self.layout = self.layout.resized(len(keep))
        self._active = self._value = None
        self.held_calls = ()

    def args_of(self, keep: Tensor | range, in_dims: InDims) -> tuple[Any, ...]:
        """The arguments for only the samples at the positions ``keep`` (n,); views of them for a range."""

        def take(arg: Any, dim: int | None) -> Any:
            if dim is None:
                return arg
            if isinstance(keep, range):
                return tree_map_only(Tensor, lambda leaf: leaf.narrow(dim, keep.start, len(keep)), arg)
            return tree_map_only(Tensor, lambda leaf: leaf.index_select(dim, keep), arg)

        return tuple(take(arg, dim) for arg, dim in zip(self.args, self._dims(in_dims), strict=True))

    def _dims(self, in_dims: InDims) -> tuple[int | None, ...]:
        """One entry an argument."""
        if not isinstance(in_dims, tuple):
            return (in_dims,) * len(self.args)
        if len(in_dims) != len(self.args):
            raise ValueError(f"in_dims must have one entry for each of the {len(self.args)} args, got {in_dims!r}.")
        return in_dims

    def __call__(self, z: Tensor) -> Tensor:
        if self._active is not None and self._value is not None:
            z = torch.where(self._active, z, self._value)
        self.num_evals += 1
        version = version_of(z)
        output = self._evaluated(z)
        check_not_written(z, version, f"{self.called} changed its argument z in place, so the iterate is lost.")
        if self._active is not None and not torch.compiler.is_compiling():  # which would make graphs for 0, 1 and 2
            self.held_calls = (*self.held_calls[-1:], (self._active, output.detach()))
        return output

    def image(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, D) the map after its first call, neither counted nor frozen: for a compiled loop."""
        return self._evaluated(z)

    def _evaluated(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, D) what the user's function returns."""
        with self.autocast.in_force():
            output = self._f(self.layout.unpack(z), *self.args)
            self.layout.check(output, self.called)
        return self.layout.pack(output)

    def moved(self) -> Tensor | None:
        """(B,) bool: frozen samples for which f has returned something else in its last call; None after one alone."""
        if len(self.held_calls) < 2:
            return None
        (active, image), (_, latest) = self.held_calls
        return ~active.squeeze(1) & differs(latest, image, self.eps)

    @torch.no_grad()
    def varies(self, z: Tensor) -> Literal["", "mixes", "changes"]:
        """Whether f at ``z`` (B, D) mixes samples: returns something else for one when others are changed.

        Or whether it changes: returns something else when it is called again. Costs up to four calls of f; where f
        fails, nothing is found.
        """
        number = torch.arange(len(z), device=z.device)
        if len(z) < 2:
            return ""
        self._active = self._value = None
        try:
            with torch.random.fork_rng(devices=[]):
                image = self(z)
                if bool(differs(self(z), image, self.eps).any()):
                    return "changes"
                for changed in (number % 2 == 1, number < len(z) // 2):
                    other = torch.where(changed.unsqueeze(1), z + 0.1 * torch.where(z == 0, 1.0, z.abs()), z)
                    if bool((differs(self(other), image, self.eps) & ~changed).any()):
                        return "mixes"
        except Exception:
            return ""
        return ""


def differs(image: Tensor, other: Tensor, eps: float) -> Tensor:
    """(B,) bool: whether rows of what a map of rounding error ``eps`` has returned differ by more than rounding."""
    change, size = (image - other).abs().amax(dim=1), other.abs().amax(dim=1)
    return change > ROUNDING * eps * size


def mixing_advice(f: FlatMap, z: Tensor, batch_shape: torch.Size) -> str:
    """What to do about a map that mixes samples or changes, as far as it shows at ``z`` (B, D); empty if it does not.

    Args:
        f: The map.
        z: Where to look.
        batch_shape: The leading dimensions of the state that count as samples.
    """
    found = f.varies(z)
    if not found:
        return ""
    if found == "changes":
        return (
            f"{f.called} changes from call to call: called again with the same arguments, it returns something else. "
            "Look for the cause, such as dropout, with implicit.check_map."
        )
    return (
        f"{f.called} mixes samples: what it returns for one sample depends on others. If the whole state "
        "is one coupled problem, such as a vector of parameters, solve it with batch_dims=0; now its leading "
        f"dimensions {tuple(batch_shape)} count as samples. Else look for the cause with "
        "implicit.check_map."
    )
