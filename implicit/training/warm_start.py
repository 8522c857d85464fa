"""Starting each solve from the solution of the same sample in the last epoch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten

from solvers.problem.hyperparameters import checked_int


class WarmStart(nn.Module):
    """Store the last solution of every sample of a data set, by its index, as the start of the sample's next solve.

    Between two epochs, the weights change a little, and so do the solutions; a solve that starts from the last solution
    takes fewer steps. Use it when samples come back unchanged and the weights move slowly, as late in training and in
    fine-tuning. Random augmentation, dropout and large learning rates take the gain away: on handwritten digits it
    saved a third to a half of the calls of f at a learning rate of 1e-4, and almost none at 1e-2. The limit of a solve
    to a tolerance stays the same unless the map has several fixed points.

    States are stored in buffers, without gradient. They are saved with ``state_dict`` and move with ``to``. They may be
    on another device and in another precision than the layer's states: ``like=z.half().cpu()`` saves memory. States
    that are not finite are not stored.

    Under DistributedDataParallel (DDP), each process stores the samples that it has seen. DDP would overwrite the
    buffers of the model it wraps with those of the first process, so keep the warm start outside of that model, and
    save it for each rank.

    Args:
        num_samples: The number of samples; indices run from 0 to ``num_samples - 1``.
        like: A state of the layer, a tensor or pytree with any number of samples in the first dimension, which gives
            the shapes, dtypes and device; its values do not matter.

    Attributes:
        seen: (num_samples,) bool, True for the samples that have a stored state.

    Raises:
        TypeError, ValueError, IndexError: An index or a state is invalid.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, WarmStart
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x)
        >>> warm = WarmStart(100, like=torch.empty(0, 3))
        >>> x, index = torch.ones(2, 3), torch.tensor([7, 4])
        >>> z = layer(x, z0=warm.get(index, layer.start(x)))
        >>> warm[index] = z
        >>> warm
        WarmStart(2 of 100 samples, float32 (3,))
    """

    seen: Tensor

    def __init__(self, num_samples: int, like: Any) -> None:
        super().__init__()
        num_samples = checked_int("WarmStart(num_samples=...)", num_samples)
        leaves, spec = tree_flatten(like)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
            raise TypeError(
                "WarmStart(like=...) must be a tensor or a pytree of tensors with the samples as first dimension, got "
                f"{like!r}. Pass a state of the layer, such as layer.start(x)."
            )
        # A pytree like the state whose leaves are the names of the buffers. Unlike a TreeSpec, a class that is private
        # to PyTorch, it can be pickled with the module and read by another version.
        self._names = tree_unflatten([f"state{i}" for i in range(len(leaves))], spec)
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool, device=leaves[0].device))
        for name, leaf in zip(tree_leaves(self._names), leaves, strict=True):
            self.register_buffer(name, leaf.new_zeros(num_samples, *leaf.shape[1:]))

    def get(self, index: Tensor, default: Any) -> Any:
        """Return the stored states of these samples, and ``default`` for those that have none.

        Args:
            index: (B,) integers. Their range is checked if they are on the CPU, as those from a DataLoader are.
            default: The state for samples without a stored one, such as ``layer.start(*inputs)``.

        Returns:
            A state like ``default``, with its dtypes and device.
        """
        pairs = self._pairs(default, "The default")
        index = self._checked(index, pairs)
        seen = self.seen[index]
        states = [
            torch.where(_column(seen.to(leaf.device), leaf), buffer[index].to(leaf), leaf) for buffer, leaf in pairs
        ]
        return tree_unflatten(states, tree_structure(self._names))

    @torch.no_grad()
    def __setitem__(self, index: Tensor, state: Any) -> None:
        """Store the states of these samples, except those that are not finite.

        Args:
            index: (B,) integers, all different.
            state: The states that the layer returned for them.
        """
        pairs = self._pairs(state, "The state")
        index = self._checked(index, pairs)
        pairs = [(buffer, leaf.to(buffer)) for buffer, leaf in pairs]
        of_leaves = [leaf.isfinite().unsqueeze(1).flatten(1).all(dim=1) for _, leaf in pairs]
        finite = torch.stack(of_leaves).all(dim=0)  # (B,)
        for buffer, leaf in pairs:
            buffer[index] = torch.where(_column(finite, leaf), leaf, buffer[index])
        self.seen[index] |= finite

    def clear(self) -> None:
        """Forget all states, for instance because the weights are new."""
        self.seen.zero_()

    @property
    def _buffers_of_leaves(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in tree_leaves(self._names)]

    def _pairs(self, state: Any, name: str) -> list[tuple[Tensor, Tensor]]:
        """Pair the buffers with the leaves of a state."""
        leaves, spec = tree_flatten(state)
        expected = tree_structure(self._names)
        if spec != expected:
            raise ValueError(f"{name} must have the structure of the states of this WarmStart, {expected}; got {spec}.")
        return list(zip(self._buffers_of_leaves, leaves, strict=True))

    def _checked(self, index: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Check that ``index`` fits these states, and move it to the device of the buffers."""
        index = torch.as_tensor(index)
        if index.is_floating_point() or index.dtype == torch.bool or index.dim() != 1:
            raise TypeError(
                "The samples of a WarmStart are given by their indices, integers of shape (B,): got a tensor of "
                f"{index.dtype} and shape {tuple(index.shape)}. For one sample, pass torch.tensor([i])."
            )
        for buffer, leaf in pairs:
            expected = (len(index), *buffer.shape[1:])
            if leaf.shape != expected:
                raise ValueError(
                    f"{len(index)} samples of this WarmStart have a state of shape {expected}, got {tuple(leaf.shape)}."
                )
        if index.device.type == "cpu" and bool(((index < 0) | (index >= len(self.seen))).any()):
            raise IndexError(
                f"The indices of this WarmStart are 0 to {len(self.seen) - 1}, got {int(index.min())} to "
                f"{int(index.max())}. Give it num_samples=len(dataset), and index by position in the data set."
            )
        return index.to(self.seen.device, torch.int64)

    def extra_repr(self) -> str:
        shapes = ", ".join(
            f"{str(buffer.dtype).removeprefix('torch.')} {tuple(buffer.shape[1:])}"
            for buffer in self._buffers_of_leaves
        )
        return f"{int(self.seen.sum())} of {len(self.seen)} samples, {shapes}"


def _column(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) with as many dimensions as ``like``."""
    return per_sample.view(-1, *[1] * (like.dim() - 1))
