"""Upper bounds of the largest singular value, which rounding does not break.

Both rest on |A|^2 = |A A'|, for the spectral norm |.|, and on what rounding does to a product: with the Frobenius norm
|.|_F, and n the length of its sums, the computed A A' is off by at most 2 n eps |A|_F^2, whatever the order of the sums
(Higham, "Accuracy and stability of numerical algorithms", second edition, SIAM (2002), section 3.5). Divided by its
Frobenius norm before, A cannot overflow, and

    |A| <= |A|_F sqrt(|computed A A'| + slack).

All is computed in float64: the slack disappears, and no setting of PyTorch lowers the precision of a product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


def gram_bound(matrices: Tensor, iterations: int) -> Tensor:
    """The bound of Gram iteration: the Frobenius norm after squaring ``iterations`` times.

        |A| <= |(A A')^(2^(n-1))|_F^(1/2^n)

    Too large by a factor of at most ``rank^(1 / 2^(n+1))``. Matrix products alone, and differentiable.

    Args:
        matrices: (..., rows, columns) real or complex.
        iterations: n >= 1.

    Returns:
        (...) float64.

    References:
        Delattre, Barthelemy, Araujo and Allauzen, "Efficient bound of Lipschitz constant for convolutional layers by
        Gram iteration", ICML (2023).
    """
    return _bound(matrices, iterations, torch.linalg.matrix_norm)


def exact_bound(matrices: Tensor) -> Tensor:
    """The largest singular value from the eigenvalues of A A', not below it by rounding.

    The gradient is that of the leading singular vectors. Where several values are the largest, it is a subgradient.

    Args:
        matrices: (..., rows, columns) real or complex.

    Returns:
        (...) float64.
    """
    # PyTorch raises for nan, which the lengths outside of this product keep.
    return _bound(matrices, 1, lambda gram: torch.linalg.eigvalsh(gram.where(gram.isfinite(), 0))[..., -1])


def _bound(matrices: Tensor, squarings: int, norm: Callable[[Tensor], Tensor]) -> Tensor:
    a = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    if a.shape[-2] > a.shape[-1]:
        a = a.mT
    rows, columns = a.shape[-2:]
    # The error of the product, and with room to spare those of the division, the square root and the eigenvalues.
    slack = 8 * (columns + 2) * _EPS
    lengths = []
    for _ in range(squarings):
        length = torch.linalg.matrix_norm(a).clamp_min(torch.finfo(torch.float64).tiny)  # (...)
        a = a / length[..., None, None]
        a = a @ a.mH
        lengths.append(length)
    bound = norm(a)
    for length in reversed(lengths):
        bound = length * (bound + slack).sqrt()
    # The last norm is itself a rounded sum, of as many terms.
    return bound * (1 + rows * columns * _EPS)
