"""The last few (B, D) vectors of an iteration, kept as one (B, m, D) block for batched matrix products."""

import torch
from torch import Tensor


def store(block: Tensor | None, slot: int, vector: Tensor, capacity: int, first: int = 8) -> Tensor:
    """Put ``vector`` (B, D) at ``slot`` of ``block`` (B, m, D), growing the block to at most ``capacity`` slots.

    Writes in place where no gradient is recorded; builds a new block where one is, because autograd keeps the old one.

    Args:
        block: What an earlier call returned; None at first.
        slot: Where to write; at most one past the last slot written so far.
        vector: (B, D).
        capacity: The most slots there will ever be.
        first: How many slots to begin with; their number then doubles as needed.
    """
    if torch.is_grad_enabled() and (vector.requires_grad or (block is not None and block.requires_grad)):
        row = vector.unsqueeze(1)
        return row if block is None else torch.cat((block[:, :slot], row, block[:, slot + 1 :]), dim=1)
    if block is None or slot >= block.shape[1]:
        held = 0 if block is None else block.shape[1]
        grown = vector.new_empty(vector.shape[0], min(capacity, max(2 * held, first)), vector.shape[1])
        if block is not None:
            grown[:, :held] = block
        block = grown
    block[:, slot] = vector
    return block


def dot(block: Tensor, vector: Tensor) -> Tensor:
    """(B, m, D), (B, D) -> (B, m) inner products."""
    # A row times a matrix: several times faster on the CPU than the same matrix times a column.
    return torch.bmm(vector.unsqueeze(1), block.transpose(1, 2)).squeeze(1)


def combine(block: Tensor, coefficients: Tensor) -> Tensor:
    """(B, m, D), (B, m) -> (B, D) linear combinations."""
    return torch.bmm(coefficients.unsqueeze(1), block).squeeze(1)
