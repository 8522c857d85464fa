"""The equilibria of the last epoch as the starts of the next."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten


class WarmStart(nn.Module):
    """The last solution of every sample of a data set, by its index, to start the next solve of it from.

    Between two epochs the weights change a little, and so do the equilibria: a solve from the last one takes fewer
    steps. It pays where a sample comes back as it was and the weights move slowly, as in the later part of a training
    and in fine-tuning. Random augmentation, dropout and large learning rates take the gain away: on handwritten digits
    a third to a half of the calls of f were saved at a learning rate of 1e-4, next to none at 1e-2. What a solve to
    tolerance converges to stays the same, unless the map has several fixed points.

    States are stored without gradient, in buffers, so that they are saved with ``state_dict`` and move with ``to``.
    They may lie elsewhere and in another precision than the layer's: ``like=z.half().cpu()`` spares memory. A state
    that is not finite is not stored.

    Under DistributedDataParallel each process keeps the samples that it saw. DDP would overwrite the buffers of its
    model with those of the first process: keep the warm start outside of the model that is wrapped, and save it by
    rank.

    Args:
        num_samples: How many samples there are; indices are 0 to ``num_samples - 1``.
        like: A state of the layer, a tensor or a pytree, with any number of samples in its first dimension. For the
            shapes, dtypes and device; the values do not matter.

    Attributes:
        seen: (num_samples,) bool, which samples have a stored state.

    Raises:
        TypeError, ValueError, IndexError: An index, or a state, is unfit.

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
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"WarmStart(num_samples=...) must be a positive integer, got {num_samples!r}.")
        leaves, spec = tree_flatten(like)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
            raise TypeError(
                "WarmStart(like=...) must be a tensor or a pytree of tensors with the samples as first dimension, got "
                f"{like!r}."
            )
        # A pytree like the state, whose leaves are the names of their buffers. A TreeSpec does not copy well.
        self._names = tree_unflatten([f"state{i}" for i in range(len(leaves))], spec)
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool, device=leaves[0].device))
        for name, leaf in zip(tree_leaves(self._names), leaves, strict=True):
            self.register_buffer(name, leaf.new_zeros(num_samples, *leaf.shape[1:]))

    def get(self, index: Tensor, default: Any) -> Any:
        """The stored states of these samples, and ``default`` for those that have none.

        Args:
            index: (B,) integers. Checked where they are on the CPU, as a DataLoader gives them.
            default: The state to start from otherwise, as ``layer.start(*inputs)`` gives it.

        Returns:
            Like ``default``, with its dtypes and device.
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
        """Store the states of these samples, those that are finite.

        Args:
            index: (B,) integers, each once.
            state: Their states, as the layer returned them.
        """
        pairs = self._pairs(state, "The state")
        index = self._checked(index, pairs)
        pairs = [(buffer, leaf.to(buffer)) for buffer, leaf in pairs]
        finite = torch.stack([leaf.isfinite().flatten(1).all(dim=1) for _, leaf in pairs]).all(dim=0)  # (B,)
        for buffer, leaf in pairs:
            buffer[index] = torch.where(_column(finite, leaf), leaf, buffer[index])
        self.seen[index] |= finite

    def clear(self) -> None:
        """Forget all states, as for new weights."""
        self.seen.zero_()

    @property
    def _buffers_of_leaves(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in tree_leaves(self._names)]

    def _pairs(self, state: Any, name: str) -> list[tuple[Tensor, Tensor]]:
        """Each leaf of a state, behind the buffer for it."""
        leaves, spec = tree_flatten(state)
        expected = tree_structure(self._names)
        if spec != expected:
            raise ValueError(f"{name} must have the structure of the states of this WarmStart, {expected}; got {spec}.")
        return list(zip(self._buffers_of_leaves, leaves, strict=True))

    def _checked(self, index: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``index`` on the device of the buffers, found to fit these states."""
        index = torch.as_tensor(index)
        if index.is_floating_point() or index.dtype == torch.bool or index.dim() != 1:
            raise TypeError(
                "The samples of a WarmStart are given by their indices, integers of shape (B,): got a tensor of "
                f"{index.dtype} and shape {tuple(index.shape)}."
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
                f"{int(index.max())}. Give it num_samples=len(dataset), and the data set's own indices."
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
