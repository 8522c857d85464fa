"""Truth values in graphs, whose loops Inductor compiles badly for CPUs where they hold any (PyTorch 2.14)."""

import torch
from torch import Tensor


def all_of(first: Tensor, *others: Tensor) -> Tensor:
    """Whether all tests hold, elementwise.

    In a graph without ``&``, for which truth values are converted to numbers and back.
    """
    for other in others:
        first = torch.where(first, other, False) if torch.compiler.is_compiling() else first & other
    return first


def as_number(flag: Tensor, like: Tensor) -> Tensor:
    """1 for True and 0 for False, in the dtype of ``like``: to write these takes a tenth of the time."""
    return torch.where(flag, 1.0, 0.0).to(like.dtype)
