"""Linear operators on flat vectors, and their transposes."""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.problem.norms import inner
from solvers.problem.small_systems import inverse_or_zero

# The product of a linear operator with a batch of flat vectors, (B, D) -> (B, D).
FlatMatvec = Callable[[Tensor], Tensor]


class Operator:
    """A product with its transpose.

    Args:
        matvec: (B, D) -> (B, D) the product ``A x``.
        rmatvec: (B, D) -> (B, D) the product ``A' x``.
    """

    def __init__(self, matvec: FlatMatvec, rmatvec: FlatMatvec) -> None:
        self._matvec = matvec
        self.transposed = rmatvec

    def __call__(self, x: Tensor) -> Tensor:
        return self._matvec(x)


def transpose(matvec: FlatMatvec, like: Tensor) -> FlatMatvec:
    """The product with the transpose: the operator's own, or what differentiating ``matvec`` gives.

    Args:
        matvec: The product.
        like: (B, D) a vector of the shape, dtype and device of its arguments.
    """
    if isinstance(matvec, Operator):
        return matvec.transposed
    pull = torch.func.vjp(matvec, torch.zeros_like(like))[1]
    return lambda v: pull(v)[0]


def rescaled(matvec: FlatMatvec, b: Tensor) -> tuple[FlatMatvec, Tensor]:
    """The systems ``c A x = c b`` with the number c for each sample for which ``c A b`` is nearest to b."""
    image = matvec(b)
    square = inner(image, image)
    c = inner(b, image) * inverse_or_zero(square, 0.0)
    c = torch.where((c != 0) & c.isfinite(), c, 1.0)
    return lambda x: c * matvec(x), c * b
