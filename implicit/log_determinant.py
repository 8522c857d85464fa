"""Estimators of the log-determinant of a residual block, ``log|det(I + dg/dx)|``."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from solvers.problem.hyperparameters import Hyperparameters, require_positive_int

# The map g of a residual block on flat samples, (B, D) -> (B, D).
FlatMapping = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactLogDet(Hyperparameters):
    """Compute ``log|det(I + J)|`` from the dense Jacobian J = dg/dx of each sample.

    Use it for samples of up to about a hundred entries D. It costs one call of g, D vector-Jacobian products in one
    batch, and the LU decomposition of a (D, D) matrix per sample; the gradient takes D times the memory of a call.
    """

    def run(self, g: FlatMapping, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``g(x)`` (B, D), the log-determinants (B,), and whether each determinant is positive, (B,) bool."""
        gx, pullback = torch.func.vjp(g, x)[:2]
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        rows = torch.func.vmap(lambda row: pullback(row.expand_as(x))[0])(eye)  # (D, B, D)
        sign, log_det = torch.linalg.slogdet(eye + rows.transpose(0, 1))
        return gx, log_det, sign > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerSeriesLogDet(Hyperparameters):
    """Estimate ``log det(I + J)``, with J = dg/dx, from products with J.

        log det(I + J)  =  sum_{k >= 1} (-1)^(k + 1) tr(J^k) / k,        tr(J^k) = E[v' J^k v],

    where v has independent random signs (Hutchinson's estimator). Use it for samples too large for
    :class:`ExactLogDet`. By default the series is truncated after ``terms`` terms, which biases the estimate by at most
    :meth:`bias_bound`. With ``continuation`` p > 0, each sample takes one more term with probability p, then another
    one, and so on (Russian roulette). A term that is reached with probability p^j is divided by it, so the estimate is
    unbiased. Its variance is finite if ``Lip(g)^2 < p``.

    The gradient is that of the estimate with the same signs, and is unbiased if the estimate is. The cost is one call
    of g and ``num_samples`` vector-Jacobian products per term, and for the gradient a double backward pass through all
    of them, which are stored for it. To store only the input of a block, run the block under
    ``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)``. With roulette, a batch takes as many terms as the
    sample that takes the most, about ``terms + log(B) / log(1 / p)``.

    Args:
        terms: Number of terms that are always taken.
        num_samples: Number of random vectors to average over. One suffices in training, since the noise averages out
            over batches.
        continuation: The probability p in [0, 1) of each further term; 0 truncates the series.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, "Invertible residual networks", ICML (2019), section 3.
        Chen, Behrmann, Duvenaud and Jacobsen, "Residual flows for invertible generative modeling", NeurIPS (2019),
        theorem 1.

    Example:
        >>> from implicit import PowerSeriesLogDet
        >>> f"{PowerSeriesLogDet(terms=8).bias_bound(0.5, size=2):.4f}"
        '0.0009'
    """

    terms: int = 8
    num_samples: int = 1
    continuation: float = 0.0

    def __post_init__(self) -> None:
        require_positive_int(self, "terms", self.terms)
        require_positive_int(self, "num_samples", self.num_samples)
        if not 0 <= self.continuation < 1:
            raise ValueError(f"PowerSeriesLogDet(continuation=...) must be in [0, 1), got {self.continuation!r}.")

    def bias_bound(self, contraction: float, size: int) -> float:
        """Return a bound on the bias of the estimate: ``D q^(n + 1) / ((n + 1) (1 - q))`` after n terms.

        It follows from ``|tr(J^k)| <= D q^k``. With roulette the estimate is unbiased, and the bound is 0.

        Args:
            contraction: A bound q in [0, 1) on the Lipschitz constant of g.
            size: The number D of entries in a sample.

        Raises:
            ValueError: q is not in [0, 1).
        """
        if not 0 <= contraction < 1:
            raise ValueError(
                f"bias_bound needs a contraction factor in [0, 1), got {contraction!r}. The series converges only if g "
                "contracts: bound its layers, for instance with implicit.spectral_norm."
            )
        n = self.terms
        return 0.0 if self.continuation else size * contraction ** (n + 1) / ((n + 1) * (1 - contraction))

    def run(self, g: FlatMapping, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``g(x)`` (B, D), the estimates (B,), and whether the last products are no larger than v, (B,) bool."""
        gx, pullback = torch.func.vjp(g, x)[:2]
        product = torch.func.vmap(lambda u: pullback(u)[0])
        bits = torch.randint(2, (self.num_samples, *x.shape), generator=generator, dtype=x.dtype, device=x.device)
        signs = 2 * bits - 1  # (num_samples, B, D)
        further, last = None, self.terms
        if self.continuation:
            further = torch.empty_like(signs[..., 0]).geometric_(1 - self.continuation, generator=generator) - 1
            last += int(max(further.flatten().tolist(), default=0))
        u, total = signs, torch.zeros_like(signs[..., 0])  # (num_samples, B), further as well
        for k in range(1, last + 1):
            u = product(u)
            term = (u * signs).sum(dim=-1) / (k if k % 2 else -k)
            if further is not None and k > self.terms:
                j = k - self.terms
                term = torch.where(further >= j, term / self.continuation**j, 0.0)
            total = total + term
        with torch.no_grad():
            sound = (u.square().sum(dim=-1) <= x.shape[1]).all(dim=0)
        return gx, total.mean(dim=0), sound


def check_estimator(estimator: object) -> ExactLogDet | PowerSeriesLogDet:
    """Return the estimator, or raise a TypeError if it is not one."""
    if isinstance(estimator, (ExactLogDet, PowerSeriesLogDet)):
        return estimator
    raise TypeError(f"estimator must be ExactLogDet() or PowerSeriesLogDet(...), got {estimator!r}.")
