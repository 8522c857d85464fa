"""Spectral normalization by an upper bound of the norm."""

import torch
from torch import Tensor, nn

from implicit.spectral.linear_operator import LinearOperator
from implicit.spectral.parametrization import SpectralNorm
from implicit.spectral.singular_value_bounds import exact_bound, gram_bound
from solvers.problem.hyperparameters import checked_int


class CertifiedNorm(SpectralNorm):
    """Normalize by an upper bound of sigma, so that the normalized weight has a spectral norm of at most ``coeff``.

    The bound is computed in float64 whenever the weight is computed, in training mode and in eval mode. It depends only
    on the weight and needs no buffers. Rounding the normalized weight to its dtype does not lift the norm above
    ``coeff`` again, unless entries underflow.

    Args:
        operator: The linear operator that the layer forms from the weight.
        coeff: Upper bound on the spectral norm; larger weights are rescaled to it.
        n_gram_iterations: Number of Gram iterations, or None for the exact norm.
    """

    def __init__(self, operator: LinearOperator, *, coeff: float, n_gram_iterations: int | None) -> None:
        super().__init__(operator, coeff=coeff)
        if n_gram_iterations is not None:
            n_gram_iterations = checked_int("spectral_norm(n_gram_iterations=...)", n_gram_iterations)
        operator.check_bound()
        self.n_gram_iterations = n_gram_iterations
        self.register_load_state_dict_pre_hook(_drop_singular_vectors)  # type: ignore[no-untyped-call]

    def forward(self, weight: Tensor) -> Tensor:
        """Return a weight of the same shape and dtype whose spectral norm is at most ``coeff``."""
        wide = weight.double()
        # Rounding changes each entry by at most half an eps of its size, and the norm of the operator by at most the
        # sum of the Frobenius norms of these changes over the taps.
        rounding = 0.51 * torch.finfo(weight.dtype).eps * self.operator.taps**0.5
        sigma = self._bound(weight) + rounding * torch.linalg.vector_norm(wide)
        normalized: Tensor = wide / (sigma / self.coeff).clamp_min(1.0)
        return normalized.to(weight.dtype)

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """Return the upper bound of the spectral norm of the unnormalized ``weight``."""
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
    """Drop the buffers that only ``method="power"`` has, so that its checkpoints load here too."""
    for name in ("u", "v"):
        state_dict.pop(prefix + name, None)
