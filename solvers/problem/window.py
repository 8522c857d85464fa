"""The last few (B, D) vectors of an iteration, kept as one (B, m, D) block for batched matrix products."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A place in a block: a number; or a tensor () with one, for a block that has all its slots and no gradients, as in a
# compiled solve, whose steps are all the same code.
Slot = int | Tensor


def store(block: Tensor | None, slot: Slot, vector: Tensor, capacity: int, first: int = 8) -> Tensor:
    """Put ``vector`` (B, D) at ``slot`` of ``block`` (B, m, D), growing the block to at most ``capacity`` slots.

    Writes in place where no gradient is recorded. Builds a new block where one is, because autograd keeps the old one.

    Args:
        block: The block that an earlier call returned; None at first.
        slot: Where to write; at most one past the last slot written so far.
        vector: (B, D).
        capacity: The largest number of slots that the block may ever have.
        first: How many slots to begin with; their number then doubles as needed.
    """
    if isinstance(slot, Tensor):
        assert block is not None
        return block.index_copy_(1, slot.view(1), vector.unsqueeze(1))
    if recorded(vector, block):
        row = vector.unsqueeze(1)
        return row if block is None else torch.cat((block[:, :slot], row, block[:, slot + 1 :]), dim=1)
    held = 0 if block is None else block.shape[1]
    block = _with_room(block, slot, vector, min(capacity, max(2 * held, first)))
    block[:, slot] = vector
    return block


def store_difference(block: Tensor | None, slot: Slot, a: Tensor, b: Tensor, capacity: int) -> Tensor:
    """``store(block, slot, a - b, capacity)``, without an intermediate vector where no gradient is recorded.

    The block then begins with up to 20 slots, so that a block of the usual size is never copied to a larger one while
    both are in memory.
    """
    if isinstance(slot, Tensor) or recorded(a, b, block):
        return store(block, slot, a - b, capacity)
    held = 0 if block is None else block.shape[1]
    block = _with_room(block, slot, a, min(capacity, max(2 * held, 20)))
    # torch.func's transforms refuse the out= argument, which would do this in one call.
    block[:, slot].copy_(a).sub_(b)
    return block


def store_quotient(
    block: Tensor | None, slot: Slot, vector: Tensor, divisor: Tensor, capacity: int, first: int = 8
) -> Tensor:
    """``store(block, slot, vector / divisor, capacity, first)`` with a divisor (B, 1).

    Needs no intermediate vector where no gradient is recorded.
    """
    if isinstance(slot, Tensor) or recorded(vector, divisor, block):
        return store(block, slot, vector / divisor, capacity, first)
    block = store(block, slot, vector, capacity, first)
    block[:, slot].div_(divisor)
    return block


def vector_at(block: Tensor, slot: Slot) -> Tensor:
    """(B, m, D) -> (B, D) the vector in a slot."""
    return block.index_select(1, slot.view(1)).squeeze(1) if isinstance(slot, Tensor) else block[:, slot]


def is_slot(slot: Slot, number: int, like: Tensor) -> Tensor:
    """(number,) bool, true at the slot, on the device of ``like``."""
    return torch.arange(number, device=like.device) == slot


def with_slots(like: Tensor, number: int, block: Tensor | None = None) -> Tensor:
    """(B, number, D) for vectors like ``like`` (B, D), with the contents of ``block`` in front and zeros behind."""
    larger = like.new_zeros(number, *like.shape).transpose(0, 1)
    if block is not None:
        larger[:, : block.shape[1]] = block
    return larger


def _with_room(block: Tensor | None, slot: int, vector: Tensor, slots: int) -> Tensor:
    """The block if it has this slot; otherwise a new one of ``slots`` slots with the old contents in front."""
    if block is not None and slot < block.shape[1]:
        return block
    # The slots are the outermost dimension in memory, which makes writes and products several times faster on the CPU.
    larger = vector.new_empty(slots, *vector.shape).transpose(0, 1)
    if block is not None:
        larger[:, : block.shape[1]] = block
    return larger


def cleared(block: Tensor, rows: Tensor) -> Tensor:
    """``block`` (B, m, D) with zeros in the samples ``rows`` (B,), even where it was not finite.

    Writes in place where no gradient is recorded.
    """
    where = rows.view(-1, 1, 1)
    return block.masked_fill(where, 0.0) if recorded(block) else block.masked_fill_(where, 0.0)


def zero_where_not_finite(vector: Tensor, like: Tensor) -> Tensor:
    """``vector`` (B, D) with zeros in the samples of which ``like`` (B, D) is not finite, where a gradient is recorded.

    A sample that is restarted forgets a step whose image was not finite. But the products that were formed with that
    image stay in the graph, and the backward pass would multiply their zero cotangents by it: 0 * NaN is NaN.
    """
    if not recorded(vector, like):
        return vector
    # A sum is finite only if all of its terms are, and takes one pass.
    return vector.masked_fill(~like.detach().sum(dim=1, keepdim=True).isfinite(), 0.0)


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd tracks any of these tensors, so that they must not be written to."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def differentiated(tensor: Tensor) -> bool:
    """Whether a derivative of the tensor is computed, in reverse or in forward mode."""
    return recorded(tensor) or forward_ad.unpack_dual(tensor).tangent is not None


def slots(block: Tensor, n: int) -> Tensor:
    """The first n slots of a block (B, m, D)."""
    return block if block.shape[1] == n else block[:, :n]


def dot(block: Tensor, vector: Tensor) -> Tensor:
    """(B, m, D), (B, D) -> (B, m) inner products."""
    return row_of_products(block, vector).squeeze(1)


def row_of_products(block: Tensor, vector: Tensor) -> Tensor:
    """``dot(block, vector)`` as a row (B, 1, m), which :func:`add_combination` takes."""
    # A row times a matrix is several times faster on the CPU than the same matrix times a column.
    return torch.bmm(vector.unsqueeze(1), block.mT)


def combine(block: Tensor, coefficients: Tensor) -> Tensor:
    """(B, m, D), (B, m) -> (B, D) linear combinations."""
    return torch.bmm(coefficients.unsqueeze(1), block).squeeze(1)


def add_combination(
    vector: Tensor, block: Tensor, coefficients: Tensor, factor: float, *, scale: float = 1.0, reuse: bool = False
) -> Tensor:
    """(B, D), (B, m, D), (B, 1, m) -> (B, D) ``scale * vector + factor * combine(block, coefficients)``.

    Args:
        vector: (B, D).
        block: (B, m, D).
        coefficients: (B, 1, m).
        factor: A Python number.
        scale: A Python number.
        reuse: Whether to return the result in the memory of ``vector`` where no gradient is recorded.
    """
    if torch.compiler.is_compiling() and not recorded(vector, block, coefficients):
        # Part of a loop over the entries, instead of a call of a library for each sample.
        return scale * vector + factor * (coefficients.mT * block).sum(dim=1)
    row = vector.unsqueeze(1)
    # Under torch.vmap the in-place variant gives a warning.
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if reuse and not transformed and not recorded(vector, block, coefficients):
        return row.baddbmm_(coefficients, block, beta=scale, alpha=factor).squeeze(1)
    return torch.baddbmm(row, coefficients, block, beta=scale, alpha=factor).squeeze(1)
