"""Truth values in graphs."""

import torch
from torch import Tensor


def all_of(first: Tensor, *others: Tensor) -> Tensor:
    """Whether all tests hold, elementwise.

    In a graph without ``&``, for which Inductor's loops on CPUs convert truth values to numbers and back (2.14).
    """
    for other in others:
        first = torch.where(first, other, False) if torch.compiler.is_compiling() else first & other
    return first
