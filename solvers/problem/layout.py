"""Conversion of a pytree of batched tensors to one (B, D) matrix for the solvers, and back."""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from solvers.problem.hyperparameters import checked_int


def checked_batch_dims(batch_dims: object) -> int:
    """``batch_dims`` as an int; a ValueError if it is none or negative."""
    return checked_int("batch_dims", batch_dims, least=0)


class Layout:
    """The shapes of a state's leaves, the leading dimensions that are the batch, and the dtype of the algebra.

    The solvers see a (B, D) matrix whose rows are independent problems. For half-precision states this matrix is
    float32, but f is still called with the state's own dtype.

    Args:
        z0: A tensor or a pytree of tensors, each with the same leading ``batch_dims`` dimensions.
        batch_dims: How many leading dimensions index independent problems; 0 is one problem.

    Raises:
        TypeError: A leaf is not a tensor, or not of a real floating-point dtype.
        ValueError: The leaves disagree on the batch shape or the device, or there are none.
    """

    def __init__(self, z0: Any, batch_dims: int) -> None:
        batch_dims = checked_batch_dims(batch_dims)
        leaves, self.spec = tree_flatten(z0)
        if not leaves:
            raise ValueError(f"The state has no tensors: z0 = {z0!r}.")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"The state must be a tensor or a pytree of tensors, got a {type(leaf).__name__} in it."
                )
            if not leaf.dtype.is_floating_point:
                raise TypeError(
                    f"The state must be real and floating-point, got {leaf.dtype}. Convert it with z0.float(); for a "
                    "complex state, solve for torch.view_as_real(z)."
                )
            if leaf.dim() < batch_dims:
                raise ValueError(
                    f"batch_dims={batch_dims} but a state tensor has shape {tuple(leaf.shape)}. Lower batch_dims "
                    "(0 means one problem, also for each entry of torch.func.vmap) or give the state its batch "
                    "dimensions."
                )
        first = leaves[0]
        self.batch_shape = first.shape[:batch_dims]
        for leaf in leaves[1:]:
            if leaf.shape[:batch_dims] != self.batch_shape or leaf.device != first.device:
                raise ValueError(
                    f"All tensors of the state must share their first {batch_dims} dimensions and their device: got "
                    f"{tuple(first.shape)} on {first.device} and {tuple(leaf.shape)} on {leaf.device}."
                )
        self.device = first.device
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.batch_size = math.prod(self.batch_shape)
        self.sizes = [math.prod(leaf.shape[batch_dims:]) for leaf in leaves]
        self.dtype = torch.float32
        for dtype in self.dtypes:
            if dtype == torch.float64:
                self.dtype = dtype
        # Whether the state is one (B, D) tensor in the dtype of the algebra, which needs no conversion.
        self._flat = self.spec.is_leaf() and first.dtype == self.dtype and first.dim() == 2 and batch_dims == 1

    def resized(self, batch_size: int) -> "Layout":
        """The layout for another number of samples, with one batch dimension."""
        other = copy.copy(self)
        other.batch_size = batch_size
        other.batch_shape = torch.Size((batch_size,))
        other.shapes = [torch.Size((batch_size, *shape[len(self.batch_shape) :])) for shape in self.shapes]
        return other

    def _is_flat(self, tree: Any) -> bool:
        """Whether ``tree``, like the state, is one (B, D) tensor in the dtype of the algebra."""
        return self._flat and isinstance(tree, Tensor) and tree.dtype == self.dtype and tree.shape == self.shapes[0]

    def pack(self, tree: Any) -> Tensor:
        """A pytree like z0 -> (B, D) in the dtype of the algebra. A view where possible."""
        if self._is_flat(tree):
            flat: Tensor = tree
            return flat
        leaves = [tree] if isinstance(tree, Tensor) else tree_flatten(tree)[0]
        rows = [leaf.reshape(self.batch_size, size) for leaf, size in zip(leaves, self.sizes, strict=True)]
        rows = [row if row.dtype == self.dtype else row.to(self.dtype) for row in rows]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def unpack(self, flat: Tensor) -> Any:
        """(B, D) -> a pytree like z0, with its dtypes."""
        if self._is_flat(flat):
            return flat
        columns = [flat] if len(self.sizes) == 1 else flat.split(self.sizes, dim=1)
        leaves = [
            column.reshape(shape).to(dtype)
            for column, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def unpack_batch(self, per_sample: Tensor) -> Tensor:
        """(..., B), with one entry per sample -> (..., *batch shape)."""
        return per_sample.reshape((*per_sample.shape[:-1], *self.batch_shape))

    def check(self, output: Any, name: str = "f") -> None:
        """Raise unless ``output``, which ``name`` returned, has the structure, shapes, device and dtypes of the state.

        Under autocast any floating-point dtype is accepted; the state keeps its own.
        """
        if self._is_flat(output) and output.device == self.device:
            return
        leaves, spec = tree_flatten(output)
        check_structure(spec, self.spec, name)
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name} must return tensors, got a {type(leaf).__name__}.")
            if leaf.shape != shape:
                raise ValueError(
                    f"{name} must return the shape of the state: got {tuple(leaf.shape)} for a state of shape "
                    f"{tuple(shape)}."
                )
            if leaf.device != self.device:
                raise ValueError(f"{name} must return tensors on {self.device}, where the state is; got {leaf.device}.")
            if leaf.dtype != dtype and not (
                leaf.dtype.is_floating_point and torch.is_autocast_enabled(self.device.type)
            ):
                raise TypeError(
                    f"{name} must return the dtype of the state: got {leaf.dtype} for a state of {dtype}. Convert z0 "
                    "or the output of the map."
                )


def check_structure(found: TreeSpec, expected: TreeSpec, name: str) -> None:
    """Raise a ValueError unless the structure that ``name`` returned is that of the state."""
    if found != expected:
        raise ValueError(
            f"{name} must return the structure of the state: got {found} for a state of structure {expected}."
        )
