"""An estimate of the inverse Jacobian that is -I plus a matrix of low rank, which can be truncated."""

import dataclasses

import torch
from torch import Tensor

from solvers.problem.window import add_combination, cleared, row_of_products

# A truncation resolves angles between vectors down to the square root of this. The value is small compared with the
# angles that matter, and large enough to keep the rounding errors of the old vectors from growing in the new ones.
_RIDGE = 1e-3


@dataclasses.dataclass
class LowRankInverse:
    """An estimate of the inverse Jacobian of ``g(z) = f(z) - z``: per sample ``H = -I + sum_i u_i v_i'``.

    Attributes:
        rank: How many pairs are in use; () int64 in a state of fixed shape, where the others are zero.
        u: (B, m, D), None before the first pair.
        v: (B, m, D), None before the first pair.
    """

    rank: int | Tensor = 0
    u: Tensor | None = None
    v: Tensor | None = None

    def mv(self, x: Tensor) -> Tensor:
        """``H x`` for x of shape (B, D)."""
        u, v = self.used(self.u), self.used(self.v)
        return -x if u is None or v is None else add_combination(x, u, row_of_products(v, x), 1.0, scale=-1.0)

    def used(self, block: Tensor | None) -> Tensor | None:
        """The pairs' vectors in a block, ``u`` or ``v``: the first of it, or all; None if there are none."""
        if block is None or isinstance(self.rank, Tensor):
            return block
        return block[:, : self.rank] if self.rank else None

    def rmv(self, x: Tensor) -> Tensor:
        """``H' x`` for x of shape (B, D): ``(rmv(x) * y).sum() == (x * mv(y)).sum()``."""
        return LowRankInverse(self.rank, self.v, self.u).mv(x)

    def truncated(self, rank: int) -> "LowRankInverse":
        """The estimate with ``H + I`` truncated approximately to its ``rank`` largest singular values.

        Overwrites the pairs where no gradient is recorded.
        """
        u, v = self.used(self.u), self.used(self.v)
        if u is None or v is None:
            return self
        to_u, to_v = _order_by_size(_gram(u), _gram(v))
        return LowRankInverse(rank, _recombined(u, to_u[:, :rank]), _recombined(v, to_v[:, :rank]))

    def cleared(self, rows: Tensor) -> "LowRankInverse":
        """The estimate with ``H = -I`` for the samples ``rows`` (B,), even if their pairs are not finite.

        Overwrites the pairs where no gradient is recorded.
        """
        if self.u is None or self.v is None:
            return self
        return LowRankInverse(self.rank, cleared(self.u, rows), cleared(self.v, rows))


def _order_by_size(gram_u: Tensor, gram_v: Tensor) -> tuple[Tensor, Tensor]:
    """A change to other pairs with the same sum, sorted by decreasing size.

    This is a pivoted QLP decomposition (Stewart, SIAM J. Sci. Comput. 20, 1999), which approximates a singular value
    decomposition: the v are orthogonalized in the order of size, and then the u that belong to them. The sum of the
    pairs is the same for any triangular factors; their accuracy affects only which pairs count as large. Singular
    vectors are avoided because their gradients are infinite where two singular values are equal, and because on a GPU
    computing them would wait for the device.

    Args:
        gram_u: (B, m, m) the Gram matrix of the u.
        gram_v: (B, m, m) the Gram matrix of the v.

    Returns:
        P and Q (B, m, m) with P'Q = I, such that the new pairs are P u and Q v.
    """
    p = q = torch.eye(gram_u.shape[1], dtype=gram_u.dtype, device=gram_u.device).expand_as(gram_u)
    for _ in "vu":
        size = _squares(p, gram_u) * _squares(q, gram_v)
        order = size.argsort(dim=1, descending=True).unsqueeze(2)
        p, q = p.take_along_dim(order, dim=1), q.take_along_dim(order, dim=1)
        factor = _cholesky(q @ gram_v @ q.mT)
        q, p = factor.mT @ p, torch.linalg.solve_triangular(factor, q, upper=False)
        gram_u, gram_v = gram_v, gram_u
    return p, q


def _gram(block: Tensor) -> Tensor:
    """(B, m, D) -> (B, m, m) inner products divided by the largest; the new pairs do not depend on this factor."""
    gram = torch.bmm(block, block.mT)
    largest = gram.detach().diagonal(dim1=1, dim2=2).amax(dim=1).view(-1, 1, 1)
    return gram / torch.where(largest > torch.finfo(gram.dtype).tiny, largest, 1.0)


def _squares(p: Tensor, gram: Tensor) -> Tensor:
    """(B, m) the diagonal of ``p gram p'``."""
    return ((p @ gram) * p).sum(dim=2)


def _cholesky(gram: Tensor) -> Tensor:
    """The lower Cholesky factor of a Gram matrix (B, m, m) whose vectors may be linearly dependent or zero."""
    squares = gram.diagonal(dim1=1, dim2=2)
    scale = torch.where(squares > torch.finfo(gram.dtype).eps ** 2, squares, 1.0).rsqrt()
    ridge = _RIDGE * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    # cholesky_ex does not check its result, which would wait for the device: with the ridge the matrices are positive
    # definite or not finite.
    factor: Tensor = torch.linalg.cholesky_ex(gram * scale.unsqueeze(1) * scale.unsqueeze(2) + ridge)[0]
    return factor / scale.unsqueeze(2)


def _recombined(block: Tensor, coefficients: Tensor) -> Tensor:
    """(B, m, D), (B, k, m) -> (B, k, D) combinations, in the memory of ``block`` where no gradient is recorded."""
    if torch.is_grad_enabled() and (block.requires_grad or coefficients.requires_grad):
        return torch.bmm(coefficients, block)
    # Part by part, so that no second block is needed.
    for part in block.split(max(3 * block.shape[2] // block.shape[1], 1), dim=2):
        part[:, : coefficients.shape[1]] = torch.bmm(coefficients, part)
    return block
