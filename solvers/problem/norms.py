"""Norms and inner products of the rows of a (B, D) problem."""

import math

import torch
from torch import Tensor

# A relative residual of at most this many rounding errors of the dtype is at the precision floor: evaluating the
# residual loses as much. On the problem bank, residuals end at 3 rounding errors or below.
FLOOR = 32


def rms_norm(x: Tensor) -> Tensor:
    """(B, D) -> (B,) root mean square of each row, with which tolerances do not depend on D."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norm / math.sqrt(max(x.shape[1], 1))


def relative(error: Tensor, scale: Tensor) -> Tensor:
    """``error / scale``, 0 where both are 0."""
    return error / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """(B, D), (B, D) -> (B, 1) inner products of rows."""
    return (x * y).sum(dim=1, keepdim=True)


def underflow(x: Tensor) -> float:
    """The norm below which its squares begin to lose digits to underflow."""
    info = torch.finfo(x.dtype)
    return float((info.tiny / info.eps) ** 0.5)


def vanishing(x: Tensor) -> float:
    """The norm below which it may come out as zero."""
    return float(torch.finfo(x.dtype).tiny ** 0.5)
