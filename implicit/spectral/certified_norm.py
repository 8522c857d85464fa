"""Spectral normalization by an upper bound."""

import torch
from torch import Tensor, nn

from implicit.spectral.linear_operator import LinearOperator
from implicit.spectral.singular_values import exact_bound, gram_bound
from implicit.spectral.soft_norm import SpectralNorm, check_positive


class CertifiedNorm(SpectralNorm):
    """Sigma by an upper bound, so that the normalized weight has a spectral norm of at most ``coeff``.

    The bound is computed in float64 at each computation of the weight, in training and in eval mode; it depends on the
    weight alone and needs no buffers. The weight is scaled such that rounding it to its dtype does not lift the norm
    above ``coeff`` again (barring underflow).

    Args:
        operator: What the layer does with the weight.
        coeff: The largest spectral norm that is left alone.
        n_gram_iterations: Iterations of Gram iteration, or None for the exact norm.
    """

    def __init__(self, operator: LinearOperator, *, coeff: float, n_gram_iterations: int | None) -> None:
        super().__init__(operator, coeff=coeff)
        if n_gram_iterations is not None:
            check_positive("n_gram_iterations", n_gram_iterations)
        operator.check_bound()
        self.n_gram_iterations = n_gram_iterations
        self.register_load_state_dict_pre_hook(_drop_singular_vectors)  # type: ignore[no-untyped-call]

    def forward(self, weight: Tensor) -> Tensor:
        """The same shape and dtype, with a spectral norm of at most ``coeff``."""
        wide = weight.double()
        # Rounding changes each entry by half an eps, and the norm by no more than the sum of the taps' Frobenius norms.
        rounding = 0.51 * torch.finfo(weight.dtype).eps * self.operator.taps**0.5
        sigma = self._bound(weight) + rounding * torch.linalg.vector_norm(wide)
        normalized: Tensor = wide / (sigma / self.coeff).clamp_min(1.0)
        return normalized.to(weight.dtype)

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """The upper bound of the spectral norm of the unnormalized ``weight``."""
        return self._bound(weight)

    def _bound(self, weight: Tensor) -> Tensor:
        iterations = self.n_gram_iterations
        if iterations is None:
            return self.operator.bound(weight, exact_bound)
        return self.operator.bound(weight, lambda matrices: gram_bound(matrices, iterations))

    def extra_repr(self) -> str:
        method = "exact" if self.n_gram_iterations is None else f"n_gram_iterations={self.n_gram_iterations}"
        return f"coeff={self.coeff}, {method}"


def _drop_singular_vectors(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """So that a checkpoint of method "power" loads."""
    for name in ("u", "v"):
        state_dict.pop(prefix + name, None)
