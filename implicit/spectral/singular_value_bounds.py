"""Upper bounds of the largest singular value that hold despite rounding.

Both bounds use |A|^2 = |A A'|, where |.| is the spectral norm, and a bound on the rounding error of the product: with
|.|_F the Frobenius norm and n the length of the sums, the computed A A' is off by at most 2 n eps |A|_F^2, whatever the
order of the sums (Higham, "Accuracy and stability of numerical algorithms", second edition, SIAM (2002), section 3.5).
A is divided by its Frobenius norm first, so that nothing overflows. Then

    |A| <= |A|_F sqrt(|computed A A'| + slack).

Everything is computed in float64: the slack is then negligible, and no setting of PyTorch lowers the precision of a
product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


def gram_bound(matrices: Tensor, iterations: int) -> Tensor:
    """Bound the largest singular value by Gram iteration: the Frobenius norm after squaring ``iterations`` times.

        |A| <= |(A A')^(2^(n-1))|_F^(1/2^n)

    The bound is too large by a factor of at most ``rank^(1 / 2^(n+1))``. It is differentiable and needs only matrix
    products.

    Args:
        matrices: (..., rows, columns), real or complex.
        iterations: The number n >= 1 of iterations.

    Returns:
        (...), float64.

    References:
        Delattre, Barthelemy, Araujo and Allauzen, "Efficient bound of Lipschitz constant for convolutional layers by
        Gram iteration", ICML (2023).
    """
    return _bound(matrices, iterations, torch.linalg.matrix_norm)


def exact_bound(matrices: Tensor) -> Tensor:
    """Compute the largest singular value from the eigenvalues of A A', raised by a bound on the rounding error.

    The gradient is that of the leading singular vectors. If several singular values are the largest, it is a
    subgradient.

    Args:
        matrices: (..., rows, columns), real or complex.

    Returns:
        (...), float64.
    """
    # eigvalsh raises for NaN. Zeros may replace it here, since the lengths that multiply the result are NaN as well.
    return _bound(matrices, 1, lambda gram: torch.linalg.eigvalsh(gram.where(gram.isfinite(), 0))[..., -1])


def _bound(matrices: Tensor, squarings: int, norm: Callable[[Tensor], Tensor]) -> Tensor:
    a = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    if a.shape[-2] > a.shape[-1]:
        a = a.mT
    rows, columns = a.shape[-2:]
    if not rows:  # no inputs, or no outputs
        return a.new_zeros(a.shape[:-2], dtype=torch.float64)
    # A generous bound on the errors of the product, the division, the square root and the eigenvalues.
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
    # The last norm is a rounded sum too, of rows * columns terms.
    return bound * (1 + rows * columns * _EPS)
