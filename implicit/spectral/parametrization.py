"""The base class of the parametrizations that normalize a weight by its spectral norm."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from implicit.spectral.linear_operator import LinearOperator


class SpectralNorm(nn.Module, ABC):
    """The parametrization that :func:`spectral_norm` registers: it computes ``weight / max(1, sigma / coeff)``.

    Attributes:
        coeff: Upper bound on the spectral norm; larger weights are rescaled to it.
    """

    def __init__(self, operator: LinearOperator, *, coeff: float) -> None:
        super().__init__()
        if not coeff > 0:
            raise ValueError(f"spectral_norm(coeff=...) must be > 0, got {coeff!r}.")
        self.operator = operator
        self.coeff = coeff

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalized weight, which has the same shape and dtype."""

    @abstractmethod
    def sigma(self, weight: Tensor) -> Tensor:
        """Return the spectral norm of the unnormalized ``weight`` as this method computes it, without gradient."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what to store when ``weight`` is assigned: the weight itself, which is normalized when it is used."""
        return weight
