"""An inverse Jacobian of low rank, which is updated by secant pairs and truncated by size."""

import dataclasses

import torch
from torch import Tensor

from solvers.problem.window import add_combination, dot

# Angles between vectors count down to the root of this in a truncation: small beside what it decides about, and large
# enough that the new vectors carry no large rounding errors of the old.
_RIDGE = 1e-3


@dataclasses.dataclass
class LowRankInverse:
    """An estimate of the inverse Jacobian of ``g(z) = f(z) - z``: per sample ``H = -I + sum_i u_i v_i'``.

    Attributes:
        rank: How many pairs are in use.
        u: (B, m, D), None before the first pair.
        v: (B, m, D), None before the first pair.
    """

    rank: int = 0
    u: Tensor | None = None
    v: Tensor | None = None

    def mv(self, x: Tensor) -> Tensor:
        """``H x`` for x of shape (B, D)."""
        if self.u is None or self.v is None or self.rank == 0:
            return -x
        return add_combination(x, self.u[:, : self.rank], dot(self.v[:, : self.rank], x), 1.0, scale=-1.0)

    def rmv(self, x: Tensor) -> Tensor:
        """``H' x`` for x of shape (B, D): ``(rmv(x) * y).sum() == (x * mv(y)).sum()``."""
        return LowRankInverse(self.rank, self.v, self.u).mv(x)

    def truncated(self, rank: int) -> "LowRankInverse":
        """The part of ``H + I`` with about its ``rank`` largest singular values, at this smaller rank.

        Uses the memory of the pairs where no gradient is recorded.
        """
        if self.u is None or self.v is None:
            return self
        u, v = self.u[:, : self.rank], self.v[:, : self.rank]
        to_u, to_v = _order_by_size(_gram(u), _gram(v))
        return LowRankInverse(rank, _recombined(u, to_u[:, :rank]), _recombined(v, to_v[:, :rank]))


def _order_by_size(gram_u: Tensor, gram_v: Tensor) -> tuple[Tensor, Tensor]:
    """Other pairs with the same sum, the largest first, from the Gram matrices (B, m, m) of these.

    A pivoted QLP decomposition (Stewart, SIAM J. Sci. Comput. 20, 1999), a singular value decomposition in outline: in
    the order of size, first the v are orthogonalized, and then the u that belong to them. The sum is the same whatever
    the triangular factors are; how exact they are decides only what counts as large. No singular vectors are computed:
    their gradients are infinite where two sizes are equal, and on a GPU they would wait for the device.

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
    """(B, m, D) -> (B, m, m) inner products, as multiples of the largest; new pairs do not depend on this factor."""
    gram = torch.bmm(block, block.mT)
    largest = gram.detach().diagonal(dim1=1, dim2=2).amax(dim=1).view(-1, 1, 1)
    return gram / torch.where(largest > torch.finfo(gram.dtype).tiny, largest, 1.0)


def _squares(p: Tensor, gram: Tensor) -> Tensor:
    """(B, m) the diagonal of ``p gram p'``."""
    return ((p @ gram) * p).sum(dim=2)


def _cholesky(gram: Tensor) -> Tensor:
    """The lower factor of a Gram matrix (B, m, m), whose vectors may depend on each other or vanish."""
    squares = gram.diagonal(dim1=1, dim2=2)
    scale = torch.where(squares > torch.finfo(gram.dtype).eps ** 2, squares, 1.0).rsqrt()
    ridge = _RIDGE * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    # The variant that does not check, which would wait for the device: the matrices are definite, or not finite.
    factor: Tensor = torch.linalg.cholesky_ex(gram * scale.unsqueeze(1) * scale.unsqueeze(2) + ridge)[0]
    return factor / scale.unsqueeze(2)


def _recombined(block: Tensor, coefficients: Tensor) -> Tensor:
    """(B, m, D), (B, k, m) -> (B, k, D), which may lie in the memory of ``block``."""
    if torch.is_grad_enabled() and (block.requires_grad or coefficients.requires_grad):
        return torch.bmm(coefficients, block)
    # By parts, so that no second block is needed.
    for part in block.split(max(3 * block.shape[2] // block.shape[1], 1), dim=2):
        part[:, : coefficients.shape[1]] = torch.bmm(coefficients, part)
    return block
